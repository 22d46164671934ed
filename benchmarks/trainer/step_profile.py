"""Where the time of one training step of a real model goes on one core: the shares of its operators.

    python -m benchmarks.trainer.step_profile MODEL [--responses 16] [--tokens 128] [--bf16] [--methods dpo dqo lora] [--padded]

Forward, loss, gradients, clipping and AdamW of DPO, of DQO with a head as value model, and of DPO that trains adapters of rank
16, on pairs of responses to one prompt of half the tokens. Ids and the reference's numbers are drawn: they change no time. Prints
JSON: the seconds that operators took by torch's profiler, and their shares in percent; `other` are autograd's own records. What
the step took beside them is dqo's kernels, Python, and the profiler itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import environment
from dqo.data.batches import Batching, groups_of
from dqo.data.episode import Episode
from dqo.models import attention
from dqo.models.critic import ValueHead
from dqo.models.lora import add_adapter, lora_config
from dqo.models.policy import load_policy
from dqo.objectives import DPO, DQO
from dqo.processes import Processes
from dqo.train import optim
from dqo.train.engine import Engine
from dqo.train.learner import Learner
from dqo.train.step import accumulate

# The first group that an operator's name has a part of.
GROUPS = {
    "matrix products": ("::mm", "addmm", "bmm", "baddbmm", "_mkl_linear", "mkldnn_linear", "onednn_linear"),
    "attention": ("attention", "softmax"),
    "optimizer": ("adam", "addcdiv", "addcmul", "lerp", "sqrt", "_foreach", "norm"),
    "casts and copies": ("copy", "clone", "contiguous", "::cat", "index", "gather", "scatter", "embedding"),
    "element by element": (
        "::mul",
        "::add",
        "::sub",
        "::div",
        "silu",
        "rsqrt",
        "pow",
        "::neg",
        "mean",
        "sum",
        "sigmoid",
    ),
    "memory": ("fill_", "zero", "empty", "resize", "::ones"),
}
ORDER = ["matrix products", "attention", "element by element", "casts and copies", "memory", "optimizer"]


def group_of(name: str) -> str:
    found = (group for group in ORDER if any(part in name for part in GROUPS[group]))
    return next(found, "other operators")


def pairs(responses: int, tokens: int, vocabulary: int) -> Iterator[Episode]:
    rng = np.random.default_rng(0)
    length = tokens // 2
    for i in range(responses // 2):
        prompt = rng.integers(5, vocabulary, tokens - length).tolist()
        for right in (True, False):
            rewards = np.zeros(length, np.float32)
            rewards[-1] = right
            said: dict[str, Any] = {
                "ref_logprobs": -rng.random(length).astype(np.float32),
                "ref_lse": np.zeros(length, np.float32),
            }
            ids = rng.integers(5, vocabulary, length).tolist()
            yield Episode(prompt, ids, rewards, float(right), right, True, i, f"row {2 * i + right}", **said)


def profiled(model: Any, objective: Any, episodes: list[Episode], bf16: bool, packed: bool, max_tokens: int) -> dict:
    """Seconds of one step, and the shares of its operators in percent."""
    critic = ValueHead(model.config.hidden_size) if objective.needs_values else None
    learner = Learner(model, critic, bf16=bf16)
    engine = Engine(learner, learner, Batching(0, max_tokens, "cpu", packed), Processes())
    optimizer = optim.make_optimizer(learner, 1e-6, 0.0, (0.9, 0.999), 1e-8, False)
    for parameter in learner.parameters():  # AdamW's averages, which are made in a first step alone
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optim.update(optimizer, 0.0)
    learner.zero_grad(set_to_none=True)
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        accumulate(engine, objective, groups_of(episodes, objective.group_size))
        optim.clip(learner, 1.0)
        optim.update(optimizer, 1e-6)
    seconds = time.perf_counter() - begun
    learner.zero_grad(set_to_none=True)
    by_operator: Counter[str] = Counter()
    for event in profiler.key_averages():
        by_operator[event.key] += event.self_cpu_time_total / 1e6
    by_group: Counter[str] = Counter()
    for name, spent in by_operator.items():
        by_group[group_of(name) if name.startswith("aten::") else "other"] += spent
    of_operators = sum(by_operator.values())
    share = {name: round(100 * spent / of_operators, 1) for name, spent in by_group.most_common()}
    most = {name: round(100 * spent / of_operators, 1) for name, spent in by_operator.most_common(15)}
    return {"seconds": round(seconds, 1), "of_operators": round(of_operators, 1), "share": share, "most": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of a response with its prompt")
    parser.add_argument("--max_batch_tokens", type=int, default=4096)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--padded", action="store_true", help="padded batches in the place of packed ones")
    parser.add_argument("--methods", nargs="+", default=["dpo", "dqo", "lora"], choices=("dpo", "dqo", "lora"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, found = load_policy(given.model), {}
    episodes = list(pairs(given.responses, given.tokens, model.config.vocab_size))
    if not given.padded:
        attention.enable(model)
    for method in sorted(given.methods, key=("dpo", "dqo", "lora").index):  # the adapters stay
        if method == "lora":
            add_adapter(model, lora_config(16, 32, None))
        objective = DQO() if method == "dqo" else DPO()
        settings = given.bf16, not given.padded, given.max_batch_tokens
        found[method] = profiled(model, objective, episodes, *settings)
    told = {"device": environment.device_name(torch.device("cpu")), "threads": 1, "commit": environment.commit()}
    told |= {"date": str(date.today()), "torch": torch.__version__} | vars(given)
    print(json.dumps(told | {"found": found}, indent=1))


if __name__ == "__main__":
    main()
