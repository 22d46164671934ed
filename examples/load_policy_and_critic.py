"""What a run leaves, read by plain transformers: the policy answers, the critic says what it expects after every token.

dqo-train ... --value_model separate --output_dir out
python examples/load_policy_and_critic.py out "2+3*4="
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer


@torch.no_grad()
def main(directory: str, prompt: str) -> list[tuple[str, float]]:
    """(token, V after it) of the greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    policy = AutoModelForCausalLM.from_pretrained(directory)
    critic = AutoModelForTokenClassification.from_pretrained(f"{directory}/critic")  # num_labels = 1
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = policy.generate(**inputs, max_new_tokens=64, do_sample=False)
    values = critic(input_ids=ids).logits[0, :, 0]  # V of the state in which this token is the last
    return [(tokenizer.decode([token]), value) for token, value in zip(ids[0].tolist(), values.tolist())]


if __name__ == "__main__":
    for token, value in main(*sys.argv[1:]):
        print(f"{value:8.3f}  {token!r}")
