"""Methods that ask or sample while they train: XPO in rounds, ADPO and ZPG, from the demonstration's base model, beside DPO.

    dqo demo --output_dir dqo-demo && python -m benchmarks.evidence.asking dqo-demo      (about six minutes of one core)

One seed, and one set of options each (see the functions); none was tuned on this task. A question is "which of these two is
better?", of ADPO and DPO about two stored responses, of ZPG about two new ones; equal responses are no question. XPO grades each
response by itself. Seconds are those of a core, in training and in the sampling that belongs to it; evaluation is not among
them. What is trained already is not trained again. The table is printed and goes to benchmarks/results/asking.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.evidence.methods import per_problem
from benchmarks.evidence.objective_options import BATCH, UPDATES
from benchmarks.harness.environment import commit
from dqo.demo.recipe import Recipe
from dqo.demo.report import evaluate_model
from dqo.demo.rollouts import distinct_problems, rng_of
from dqo.grading.arith import ArithTask
from dqo.objectives.groups import pairs
from dqo.stats import accuracy_interval
from dqo.train.metrics import read_metrics
from dqo.train.record import machine

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results"
RECIPE = dataclasses.replace(Recipe(), eval_problems=500, eval_samples=2)  # fewer than in the demonstration
OF_DPO = {"learning_rate": 6e-5, "beta": 0.7, "lr_scheduler_type": "constant", "adam_beta2": 0.99, "max_length": 256}
OF_DPO |= {"per_device_train_batch_size": BATCH // 2, "process_reward": "none", "eval_fraction": 0.0}
XPO = OF_DPO | {"alpha": 1e-5, "max_steps": 16}  # a round, of two
ROUNDS = {"ROUNDS": "2", "SAMPLES": "2", "VERIFIER": "arith", "LONGEST": str(RECIPE.max_new_tokens), "SEED": "0"}
PROBLEMS = 512  # that XPO and ZPG answer
DPO = OF_DPO | {"max_steps": UPDATES}
ADPO = DPO | {"threshold": 1.3}
ZPG = {"parameters": "norm", "mu": 2.0, "learning_rate": 0.02, "num_pairs": 192, "max_steps": 40, "verifier": "arith"}
ZPG |= {"max_completion_length": RECIPE.max_new_tokens, "seed": 0}


def flags(options: dict) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def timed(command: list[str], into: Path, environment: dict[str, str] | None = None) -> None:
    """Runs a command, and keeps in `into` the seconds of a core that it and what it started took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | (environment or {}))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    into.write_text(json.dumps({"core_seconds": seconds}))


def stored_rows(demonstration: Path) -> list[dict]:
    return [json.loads(line) for line in (demonstration / "data" / "rollouts.jsonl").open()]


def questions_of_dpo(rows: list[dict]) -> int:
    """Distinct questions in the pairs of DPO."""
    number: dict[str, int] = {}
    prompt = np.array([number.setdefault(row["prompt"], len(number)) for row in rows])
    columns: Any = SimpleNamespace(prompt=prompt, reward=np.array([row["reward"] for row in rows]))
    found = pairs(columns, 4).tolist()
    return len({(int(prompt[a]), *sorted((rows[a]["completion"], rows[b]["completion"]))) for a, b in found})


def train_xpo(demonstration: Path, output: Path) -> dict:
    if not (output / "seconds.json").exists():
        model, problems = str(demonstration / "base"), str(output.parent / "problems.jsonl")
        timed(["bash", "examples/xpo.sh", model, problems, str(output), *flags(XPO)], output / "seconds.json", ROUNDS)
    last = output / f"round-{ROUNDS['ROUNDS']}"
    samples = sum(1 for _ in (last / "rows.jsonl").open())
    return {"model": last / "trained", "samples": samples, "graded": samples}


def train_on_pairs(method: str, options: dict, demonstration: Path, output: Path) -> Path:
    if not (output / "seconds.json").exists():
        data, base = str(demonstration / "data" / "rollouts.jsonl"), str(demonstration / "base")
        command = [sys.executable, "-m", "dqo", "train", "--method", method, "--dataset_name", data]
        command += ["--model_name_or_path", base, "--output_dir", str(output), *flags(options)]
        timed(command, output / "seconds.json")
    return output


def train_adpo(demonstration: Path, output: Path) -> dict:
    train_on_pairs("adpo", ADPO, demonstration, output)
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "queries" in row]
    accuracies = [row["labels/pseudo_accuracy"] for row in rows if "labels/pseudo_accuracy" in row]
    told = {"queries": rows[-1]["queries"], "pseudo_labels": rows[-1]["pseudo_labels"]}
    return {"model": output, "samples": 0, **told, "pseudo_accuracy_last": accuracies[-1] if accuracies else None}


def train_zpg(demonstration: Path, output: Path) -> dict:
    if not (output / "seconds.json").exists():
        command = [sys.executable, "-m", "dqo", "zpg", "--model_name_or_path", str(demonstration / "base")]
        command += ["--tasks", str(output.parent / "problems.jsonl"), "--output_dir", str(output), *flags(ZPG)]
        timed(command, output / "seconds.json")
    rows = read_metrics(output / "metrics.jsonl")
    rewards = [row["reward/mean"] for row in rows]
    told = {name: rows[-1][name] for name in ("queries", "samples")}
    return {
        "model": output,
        **told,
        "first_rewards": float(np.mean(rewards[:10])),
        "last_rewards": float(np.mean(rewards[-10:])),
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| method | greedy, % | sampling, % | questions | responses sampled | graded | seconds |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        cells = [row["method"]]
        for decoding in ("greedy", "sampling"):
            x = row[decoding]
            cells.append(f"{100 * x['mean']:.1f} ({100 * x['low']:.1f}–{100 * x['high']:.1f})")
        cells += [f"{row[name]:,}" if row.get(name) is not None else "" for name in ("queries", "samples", "graded")]
        cells.append(f"{row['core_seconds']:,.0f}" if "core_seconds" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstration", type=Path)
    parser.add_argument(
        "--output_dir", type=Path, help="The runs are written to this directory; DEMONSTRATION/asking by default."
    )
    arguments = parser.parse_args()
    demonstration = arguments.demonstration.resolve()
    output = (arguments.output_dir or demonstration / "asking").resolve()
    output.mkdir(parents=True, exist_ok=True)
    stored = stored_rows(demonstration)
    asked = {row["prompt"]: row["answer"] for row in stored}
    lines = [
        json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in list(asked.items())[:PROBLEMS]
    ]
    (output / "problems.jsonl").write_text("".join(lines))
    told: dict[str, dict[str, Any]] = {
        "base": {"model": demonstration / "base"},
        "dpo": {"model": train_on_pairs("dpo", DPO, demonstration, output / "dpo"), "samples": 0},
    }
    told["dpo"]["queries"] = questions_of_dpo(stored)
    told |= {"adpo": train_adpo(demonstration, output / "adpo"), "xpo": train_xpo(demonstration, output / "xpo")}
    told |= {"zpg": train_zpg(demonstration, output / "zpg")}
    seed = json.loads((demonstration / "demo.json").read_text())["seed"]
    task = ArithTask(RECIPE.min_steps, RECIPE.max_steps)
    problems = distinct_problems(task, rng_of(seed, "evaluation"), RECIPE.eval_problems, set())
    rows = []
    for name, facts in told.items():
        row: dict[str, Any] = {"method": name} | {key: value for key, value in facts.items() if key != "model"}
        seconds = output / name / "seconds.json"
        row |= json.loads(seconds.read_text()) if seconds.exists() else {}
        for decoding, scores in (
            evaluate_model(name, facts["model"], problems, RECIPE, seed=0).accuracy.scores().items()
        ):
            interval = accuracy_interval(per_problem(scores))
            row[decoding] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        rows.append(row)
    command = "python -m benchmarks.evidence.asking dqo-demo"
    result = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "seed": seed,
        **machine(),
    }
    result |= {"options": {"adpo": ADPO, "xpo": XPO | ROUNDS, "zpg": ZPG}, "problems": PROBLEMS, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "asking.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
