"""Every objective by `dqo-train` on one rollout file: the demonstration's, from the demonstration's base model.

    dqo demo --output_dir dqo-demo && python -m benchmarks.evidence.objectives dqo-demo      (about eight minutes on two cores)

The same number of updates for all, at one set of options each (OPTIONS). Those of rft, dpo and dqo are the demonstration's, tried
on another seed; those of kto, rebel, dro, oreo and of the step rewards are first guesses, so the table ranks nothing. A method
that is not there yet is trained; the table is printed and goes to benchmarks/results/objectives.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.evidence.methods import per_problem
from benchmarks.harness.environment import commit
from dqo.demo.recipe import Recipe
from dqo.demo.report import evaluate_model
from dqo.demo.rollouts import distinct_problems, rng_of
from dqo.grading.arith import ArithTask
from dqo.stats import accuracy_interval
from dqo.train.metrics import read_metrics
from dqo.train.record import machine

RESULTS = Path(__file__).parents[1] / "results"
RECIPE = Recipe()
COMMON = {
    "per_device_train_batch_size": RECIPE.batch,
    "max_steps": RECIPE.updates,
    "max_length": 256,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.99,
    "process_reward": "none",
    "learning_rate": 1e-4,
}
WITH_VALUES = {"critic_learning_rate": 1e-3, "value_warmup_steps": 64, "max_steps": 64 + RECIPE.updates}
OPTIONS = {
    "sft": {},
    "rft": {},
    "dpo": {"beta": 0.7, "learning_rate": 6e-5, "per_device_train_batch_size": RECIPE.batch // 2},
    "kto": {"beta": 0.5},
    "rebel": {"beta": 0.2, "per_device_train_batch_size": RECIPE.batch // 2},
    "dro": {"beta": 0.2, **WITH_VALUES},
    "oreo": {"beta": 0.2, **WITH_VALUES},
    "dqo": {"beta": 0.2, **WITH_VALUES},
    "dqo, step rewards": {"beta": 0.2, "process_reward": "additive", "process_coef": 0.2, **WITH_VALUES},
}
COLUMNS = ("eval_loss", "eval_kl", "eval_rewards/margins", "eval_value/explained_variance", "eval_value/auc_end")


def train(name: str, demonstration: Path, output: Path, **changes: int) -> None:
    data, base = demonstration / "data" / "rollouts.jsonl", demonstration / "base"
    options = COMMON | OPTIONS[name] | changes
    command = [sys.executable, "-m", "dqo", "train", "--method", name.partition(",")[0]]
    command += ["--dataset_name", str(data), "--model_name_or_path", str(base), "--output_dir", str(output)]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    subprocess.run(command, check=True)


def measured(name: str, model: Path, problems: list[str]) -> dict:
    found = evaluate_model(name, model, problems, RECIPE, seed=0).accuracy
    row = {"method": name}
    for decoding, scores in found.scores().items():
        interval = accuracy_interval(per_problem(scores))
        row[decoding] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    if (model / "metrics.jsonl").exists() and name != "base":
        rows = read_metrics(model / "metrics.jsonl")
        row |= {key: value for key, value in rows[-1].items() if key in COLUMNS}
        speeds = sorted(r["perf/tokens_per_second"] for r in rows if "perf/tokens_per_second" in r)
        row["tokens_per_second"] = speeds[len(speeds) // 2]
    return row


def table(rows: list[dict]) -> str:
    names = {"eval_loss": "loss", "eval_kl": "kl", "eval_rewards/margins": "margin"}
    names |= {"eval_value/explained_variance": "value explains", "eval_value/auc_end": "value AUC"}
    lines = ["| method | greedy, % | sampling, % | " + " | ".join(names[c] for c in COLUMNS) + " | tokens/s |"]
    lines.append("|---" * (4 + len(COLUMNS)) + "|")
    for row in rows:
        cells = [row["method"]]
        for decoding in ("greedy", "sampling"):
            interval = row[decoding]
            cells.append(f"{100 * interval['mean']:.1f} ({100 * interval['low']:.1f}–{100 * interval['high']:.1f})")
        cells += [f"{row[c]:.3g}" if c in row else "" for c in COLUMNS]
        cells.append(f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstration", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    arguments = parser.parse_args()
    seed = json.loads((arguments.demonstration / "demo.json").read_text())["seed"]
    task = ArithTask(RECIPE.min_steps, RECIPE.max_steps)
    problems = distinct_problems(task, rng_of(seed, "evaluation"), RECIPE.eval_problems, set())
    rows = [measured("base", arguments.demonstration / "base", problems)]
    for name in arguments.methods:
        output = arguments.demonstration / "objectives" / name.replace(", ", "-").replace(" ", "-")
        if not (output / "report.html").exists():
            train(name, arguments.demonstration, output)
        rows.append(measured(name, output, problems))
    command = f"python -m benchmarks.evidence.objectives {arguments.demonstration}"
    facts = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "seed": seed,
        **machine(),
    }
    facts |= {"options": {name: COMMON | OPTIONS[name] for name in OPTIONS}, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "objectives.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
