#!/usr/bin/env bash
# The short selection, in the environment that is active: a run, a run with adapters, each gone on with from its first checkpoint
# bit for bit, an adapter as the next run's model, the loss under torch.compile. It needs the package and its extra `peft`, no tests.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

python - <<'EOF'
import json, random
from dqo.grading.arith import ArithTask

task, rng = ArithTask(2, 4), random.Random(0)
with open("rollouts.jsonl", "w") as file:
    for problem in (task.problem(rng) for _ in range(12)):
        for right in (True, False):
            text = task.solution(problem)
            text = text if right else text[:-1] + str((int(text[-1]) + 1) % 10)
            file.write(json.dumps({"prompt": problem, "completion": text, "reward": float(right)}) + "\n")
EOF
dqo check rollouts.jsonl > check.txt
dqo init --dataset_name rollouts.jsonl --output_dir model --vocab_size 270 --hidden_size 32 --layers 2 --heads 2

run() {
  dqo-train --dataset_name rollouts.jsonl --per_device_train_batch_size 4 --learning_rate 1e-3 --max_steps 6 "$@"
}

# run again from checkpoint-3 gives the same model
resumed() {
  local out=$1 weights=$2
  shift 2
  run --model_name_or_path model --output_dir "$out" --save_steps 3 "$@"
  cp "$out/$weights" unbroken.safetensors
  rm -r "$out/checkpoint-6" "$out/$weights"
  run --model_name_or_path model --output_dir "$out" --save_steps 3 "$@"
  cmp "$out/$weights" unbroken.safetensors
}
resumed full model.safetensors
resumed adapter adapter_model.safetensors --use_peft --lora_r 4
run --model_name_or_path adapter --output_dir next --use_peft --lora_r 2
python - <<'EOF'
from peft import AutoPeftModelForCausalLM

AutoPeftModelForCausalLM.from_pretrained("next").merge_and_unload()
EOF
test -s next/report.html

# the loss compiled as one graph: what torch.compile can trace differs between versions
python - <<'EOF'
import torch
from dqo_kernels import soft_bellman_loss


def step(logits, ref_logits, actions, rewards, values):
    seqlens = torch.tensor([0, 4, 10])
    return soft_bellman_loss(logits, actions, rewards, values, ref_logits=ref_logits, cu_seqlens=seqlens, backend="cpp").loss


torch.manual_seed(0)
logits, values = torch.randn(10, 11, requires_grad=True), torch.randn(10, requires_grad=True)
rest = torch.randn(10, 11), torch.randint(0, 11, (10,)), torch.randn(10)
found = [
    torch.autograd.grad(function(logits, *rest, values), [logits, values])
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
]
torch.testing.assert_close(*found)
EOF
echo "short selection: passed"
