"""Sampling and training steps of a real model on one core: tokens a second of CPU time, which other work disturbs least.

    python -m benchmarks.trainer.real_model MODEL sample --data problems.jsonl
    python -m benchmarks.trainer.real_model MODEL step [--data sampled.jsonl]

`sample`: 8 responses to each prompt by `dqo.models.generate`, by the same with all rows kept until the last one ends, and by
transformers' own generate. `step`: forward, loss and gradients of DQO with a head as value model, of DPO, and of DPO that trains
adapters, with padded and with packed batches; TRL's DPO where it is installed, on the same pairs and reference. The data are
rows of `dqo sample`, of each prompt two; without any 16 responses of 128 tokens with their prompts, whose ids are drawn. Prints
JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

from benchmarks.harness import environment
from benchmarks.trainer import trl_steps
from benchmarks.trainer.step_profile import pairs
from dqo.data.batches import Batching, groups_of
from dqo.data.ends import ends_of
from dqo.data.episode import Episode
from dqo.models import attention, decoding, generate
from dqo.models.critic import ValueHead
from dqo.models.generate import Request, Sampling
from dqo.models.lora import add_adapter, lora_config
from dqo.models.named import load_tokenizer, stop_ids
from dqo.models.policy import load_policy
from dqo.objectives import DPO, DQO
from dqo.processes import Processes
from dqo.train.engine import Engine
from dqo.train.learner import Learner
from dqo.train.step import accumulate


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()
    return work(), time.process_time() - begun


def sampling(path: str, data: Path, count: int, length: int) -> dict[str, dict[str, float]]:
    tokenizer, model = load_tokenizer(path), load_policy(path)
    stops, pad = ends_of(tokenizer, stop_ids(model)).stops, tokenizer.pad_token_id
    rows = [json.loads(line) for line in data.open()][:count]
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    prompts = [tokenizer.apply_chat_template(row["prompt"], **template) for row in rows]
    requests = [Request(prompt, (i, k)) for i, prompt in enumerate(prompts) for k in range(8)]

    def ours() -> int:
        settings = Sampling(temperature=0.7, max_new_tokens=length)
        found = generate.generate(model, requests, settings, stop_ids=stops, pad_id=pad, batch_size=64, quiet=True)
        return sum(len(response.ids) for _, response in found)

    def all_rows() -> int:
        rows_can_leave, generate.rows_can_leave = generate.rows_can_leave, lambda *_: False
        try:
            return ours()
        finally:
            generate.rows_can_leave = rows_can_leave

    def plain() -> int:
        inputs = decoding.left_padded([r.prompt_ids for r in requests], max(map(len, prompts)), pad, model.device)
        drawn = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": length}
        config = GenerationConfig(**drawn, eos_token_id=sorted(stops), pad_token_id=pad)
        made = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
        return sum(next((at for at, token in enumerate(row, 1) if token in stops), len(row)) for row in made)

    found = {}
    for name, work in (("dqo", ours), ("dqo, all rows stay", all_rows), ("transformers' generate", plain)):
        tokens, seconds = timed(work)
        found[name] = {"tokens": tokens, "cpu_seconds": round(seconds, 1), "tokens_per_s": round(tokens / seconds, 1)}
    return found


def pairs_of(data: Path, count: int) -> Iterator[Episode]:
    """Two responses to each of `count` prompts, one called right; the reference's numbers are drawn."""
    rng = np.random.default_rng(0)
    by_prompt = groupby(map(json.loads, data.open()), lambda row: row["prompt_ids"])
    for i, (prompt, rows) in zip(range(count), by_prompt):
        for right, row in zip((True, False), rows):
            length = len(row["completion_ids"])
            rewards = np.zeros(length, np.float32)
            rewards[-1] = right
            ref = {"ref_logprobs": -rng.random(length).astype(np.float32), "ref_lse": np.zeros(length, np.float32)}
            yield Episode(prompt, row["completion_ids"], rewards, float(right), right, True, i, f"row {i}", **ref)


def steps(path: str, data: Path | None, count: int) -> dict[str, dict[str, float]]:
    policy = load_policy(path)
    episodes = list(pairs(16, 128, policy.config.vocab_size) if data is None else pairs_of(data, count))
    tokens, found = sum(e.length for e in episodes), {}

    def step(model: Any, objective: Any, packed: bool) -> Callable[[], float]:
        critic = ValueHead(model.config.hidden_size) if objective.needs_values else None
        learner = Learner(model, critic)
        engine = Engine(learner, learner, Batching(0, 4096, "cpu", packed), Processes())

        def work() -> float:
            total, units = accumulate(engine, objective, groups_of(episodes, objective.group_size))[0]["loss"].tolist()
            return total / units

        return work

    def note(name: str, model: Any, work: Callable[[], Any]) -> None:
        loss, seconds = timed(work)
        model.zero_grad(set_to_none=True)
        found[name] = {
            "loss": float(loss),
            "cpu_seconds": round(seconds, 2),
            "tokens_per_s": round(tokens / seconds, 1),
        }

    def both(name: str, model: Any, objective: Any) -> None:
        before = model.config._attn_implementation
        note(f"{name}, padded", model, step(model, objective, False))
        attention.enable(model)
        note(f"{name}, packed", model, step(model, objective, True))
        model.set_attn_implementation(before)

    both("dpo", policy, DPO())
    if find_spec("trl"):
        theirs = copy.deepcopy(policy)
        loss, batch = trl_steps.dpo_loss(theirs, DPO()), trl_steps.dpo_batch(episodes, theirs.device)

        def backward() -> float:
            value = loss(batch)
            value.backward()
            return value.item()

        note("dpo, trl", theirs, backward)
        del theirs
    both("dqo, value model head", policy, DQO())
    add_adapter(policy, lora_config(16, 32, None))
    both("dpo, adapters of rank 16", policy, DPO())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("what", choices=("sample", "step"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max_completion_length", type=int, default=96)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "sample":
        if given.data is None:
            parser.error("sample wants --data, prompts")
        found = sampling(given.model, given.data, given.prompts, given.max_completion_length)
    else:
        found = steps(given.model, given.data, given.prompts)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    told = {"device": environment.device_name(torch.device("cpu")), "threads": 1, "commit": environment.commit()}
    told |= {"date": str(date.today())}
    told |= {"versions": versions, "what": given.what, "data": str(given.data or "drawn"), "prompts": given.prompts}
    print(json.dumps(told | {"found": found}, indent=1))


if __name__ == "__main__":
    main()
