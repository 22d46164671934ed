"""Directories as finished runs leave them, without a training."""

from __future__ import annotations

import json
from pathlib import Path

from dqo.config.options import dump_options, options_of

PROMPTS = ["1+1=", "2+2=", "3+3=", "4+4="]


def answer(prompt: str, before: int, after: int, samples: int = 2) -> dict:
    def said(right: int) -> dict:
        return {"greedy": right, "text": "right" if right else "wrong", "sampling": [right, 0][:samples]}

    return {"prompt": prompt, "before": said(before), "after": said(after)}


def held_out_row(i: int) -> dict:
    """Right responses are the shorter ones, and the value model cannot tell."""
    right = i % 2 == 0
    row = {"source": f"a.jsonl:{i}", "prompt": i // 2, "label": right, "reward": float(right)}
    row |= {"prompt_length": 5, "length": 4 if right else 9, "logps": -1.0, "ref_logps": -1.0 - 0.1 * right}
    return row | {"value_start": 0.5, "value_half": 0.5, "value_end": 0.5}


def credited_row(i):
    """The policy blames the wrong step of every wrong response but one in five, the value model none; the initial model doubts
    the steps 1 and 2 of four, and the wrong one is always step 1."""
    row = held_out_row(i)
    wrong, missed = not row["label"], i % 10 == 9
    blame = [0.1, -0.5, 0.1, 0.2] if wrong and not missed else [0.1, 0.1, -0.05 * wrong, 0.2]
    total = sum(blame)
    row |= {"steps": 4, "first_wrong_step": 1 if wrong else None, "ratio": total, "ratio_before_last": total - 0.2}
    row |= {"step_ratios": blame, "step_values": [0.0, 0.0, 0.0, -0.1], "start_logps": -4.0, "start_entropy": 2.0}
    return row | {"start_step_logprobs": [-0.1, -0.9, -1.0, -0.1], "start_step_entropies": [0.0, 0.5, 0.6, 0.0]}


def stored_run(
    directory: Path,
    *,
    seed: int = 42,
    after: tuple[int, ...] = (1, 1, 1, 0),
    finished: bool = True,
    data: str = "d" * 64,
    held_out: str = "h" * 64,
    model: str = "m" * 64,
    steps: int = 8,
    rows: int = 4,
    unread_share: float = 0.0,
    record: bool = True,
    prompts: list[str] = PROMPTS,
    **options,
) -> Path:
    """A run's directory; `rows` of metrics are logged, every second step. `after`: which problems it solves; the base solves
    the last."""
    given = {"method": "dqo", "seed": seed, "output_dir": str(directory), "max_steps": steps, **options}
    directory.mkdir(parents=True)
    text = dump_options(options_of({"dataset_name": "a.jsonl", "model_name_or_path": "M", **given}, "test"))
    (directory / "config.yaml").write_text(text)
    metrics = [{"step": 0, "eval_loss": 0.5, "eval_kl": 0.0}]
    metrics += [{"step": 2 * (i + 1), "loss": 0.5 - 0.05 * i + 0.001 * seed, "grad_norm": 1.0} for i in range(rows)]
    if finished:
        metrics.append({"step": steps, "eval_loss": 0.25 + 0.001 * seed, "eval_kl": 0.02})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    found = {
        "created": "2026-01-02T03:04:05+00:00",
        "commands": [f"dqo train --seed {seed}"],
        "steps": steps,
        "phases": [
            {"begin": 0, "name": "value_warmup_steps", "trains": ["critic"]},
            {"begin": 2, "name": "training", "trains": ["policy", "critic"]},
        ],
        "data": {
            "name": "a.jsonl",
            "sha256": data,
            "of": "file",
            "counts": {"rows": 7},
            "held_out_sha256": held_out,
        },
        "model": {"name": "M", "sha256": model},
        "parameters": {"policy": 1000},
        "penalised_steps": None,
        "versions": {"torch": "2.13.0"},
        "device": "2 cores",
        "finished": finished,
    }
    if finished:
        examples = [{"source": "t.jsonl:1", "answer": "4", "response": "four <b>"}]
        unread = {"share": unread_share, "of": 4, "cut": 0.0, "errors": {}, "examples": examples}
        lines = [answer(p, int(p == PROMPTS[-1]), right) for p, right in zip(prompts, after)]
        (directory / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        held = [held_out_row(i) for i in range(20)]
        (directory / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
        found |= {
            "seconds": 12.0,
            "cpu_seconds": 10.0,
            "tokens_per_second": 500.0,
            "made": steps,
            "held_out": {"eval_loss": 0.25 + 0.001 * seed},
        }
        found["unread"] = {when: {"greedy": unread, "sampling": unread} for when in ("before", "after")}
        found |= {"value_traces": [], "files": ["answers.jsonl", "held_out.jsonl"]}
        (directory / "report.html").write_text("a page")
    if record:
        (directory / "run.json").write_text(json.dumps(found))
    return directory
