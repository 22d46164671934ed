#!/usr/bin/env bash
# Exploratory Preference Optimization in rounds (arXiv 2405.21046, Alg. 1). Each round samples from the policy of the last and from the
# reference, grades both, and trains on the rows of all rounds so far, from the policy of the last.
#
#   examples/xpo.sh MODEL problems.jsonl OUTPUT [option of dqo train ...]
#   ROUNDS=3 SAMPLES=4 VERIFIER=number examples/xpo.sh MODEL problems.jsonl OUTPUT --alpha 1e-4 --max_steps 100
#
# problems.jsonl has `prompt` and `answer`. The same command goes on where it was stopped. The last policy is OUTPUT/round-N/trained.
set -euo pipefail
reference=${1:?give the model} problems=${2:?give the file of problems} out=${3:?give the directory to write to}
shift 3
: "${ROUNDS:=3}" "${SAMPLES:=4}" "${VERIFIER:=number}" "${LONGEST:=256}" "${SEED:=0}"
policy=$reference before=/dev/null
for ((round = 1; round <= ROUNDS; round++)); do
  place=$out/round-$round
  mkdir -p "$place"
  for writer in reference policy; do
    model=${!writer} seed=$((SEED + 2 * round))
    [ "$writer" = policy ] && seed=$((seed + 1))  # in the first round both are one model: other responses
    python -m dqo sample --model_name_or_path "$model" --prompts "$problems" --output_file "$place/$writer.jsonl" \
      --num_generations "$SAMPLES" --temperature 1 --max_completion_length "$LONGEST" --seed "$seed"
    python -m dqo score "$place/$writer.jsonl" --verifier "$VERIFIER" --output_file "$place/$writer-scored.jsonl"
  done
  cat "$before" "$place/reference-scored.jsonl" "$place/policy-scored.jsonl" > "$place/rows.jsonl"
  python -m dqo train --method xpo --dataset_name "$place/rows.jsonl" --model_name_or_path "$policy" \
    --ref_model_name_or_path "$reference" --output_dir "$place/trained" --seed "$SEED" "$@"
  policy=$place/trained before=$place/rows.jsonl
done
echo "the last policy: $policy"
