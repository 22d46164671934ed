"""Measured prefix values of a trained model: how far K = 8 continuations are from 1,024, and these from what is exact.

    dqo demo --output_dir dqo-demo && python -m benchmarks.evidence.prefix_values dqo-demo     (some minutes on two cores)

The prefixes are prompts and line ends of demonstrations of new problems, continued by the base model and graded by `arith`. The
model imitates a demonstrator whose pass rates are known exactly: their distance shows what the model learned, and is no
error of the estimate. The table is printed and goes to benchmarks/results/prefix_values.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from benchmarks.harness.environment import commit
from dqo.data.appending import appending
from dqo.data.ends import ends_of
from dqo.data.tokens import tokenize_rows
from dqo.demo.recipe import Recipe
from dqo.demo.rollouts import distinct_problems, rng_of
from dqo.grading.arith import ArithTask
from dqo.grading.pool import VerifierPool
from dqo.models.named import load_tokenizer
from dqo.sampling.backends import load_backend
from dqo.scoring.options import ScoreConfig
from dqo.scoring.prefixes import Measurement, prefixes_of
from dqo.scoring.rows import Scored, read_scored
from dqo.scoring.steps import line_steps
from dqo.train.record import machine

RESULTS = Path(__file__).parents[1] / "results"
RECIPE = Recipe()
FEW, MANY = 8, 1024
ROWS = 4  # of different prompts; each has six to ten steps


def rows_of(task: ArithTask, count: int) -> list[Scored]:
    """A demonstration of each of some problems, cut into its lines."""
    rng = rng_of(0, "prefix values")
    problems = distinct_problems(task, rng, count, set())
    _, rows = read_scored([{"prompt": problem, "completion": task.demonstration(problem, rng)} for problem in problems])
    for scored in rows:
        scored.cut(line_steps(scored.text))
    return rows


def estimates(rows: list[Scored], base: str, count: int, seed: int) -> tuple[list[dict], float]:
    """The value of each distinct prefix of the rows by `count` continuations, and the seconds that they took."""
    config = ScoreConfig(
        data="", verifier="arith", output_file="s.jsonl", prefix_values=count, model_name_or_path=base, batch_size=256,
        max_completion_length=RECIPE.max_new_tokens, seed=seed,
    )  # fmt: skip
    tokenizer = load_tokenizer(base)
    tokens = tokenize_rows([s.row for s in rows], tokenizer, ends_of(tokenizer), len(tokenizer), 10**6)
    begun = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        VerifierPool("arith") as pool,
        appending(f"{folder}/values.jsonl", {}, lambda row: row) as file,
    ):
        measured = Measurement(config, pool, file).values(
            rows, tokens, lambda: load_backend("transformers", base, batch_size=256), print
        )
    seconds = time.perf_counter() - begun
    found = {}
    for scored, row_tokens, value in zip(rows, tokens, measured):
        for prefix, rate in zip(prefixes_of(scored, row_tokens), [value.prompt, *value.steps]):
            begun_with = tokenizer.decode(prefix.completion_ids)
            found[prefix.key] = {"prompt": scored.row.prompt, "begun": begun_with, "value": rate}
    return list(found.values()), seconds


def compared(few: list[dict], many: list[dict], task: ArithTask) -> list[dict]:
    rows = []
    for short, long in zip(few, many):
        interval = binomtest(round(long["value"] * MANY), MANY).proportion_ci(0.95, method="wilson")
        exact = task.pass_rate(long["prompt"], long["begun"])
        rows.append({**long, "few": short["value"], "low": interval.low, "high": interval.high, "demonstrator": exact})
    return rows


def summary(rows: list[dict]) -> dict:
    few, many, exact = (np.array([row[name] for row in rows]) for name in ("few", "value", "demonstrator"))
    expected = np.sqrt((many * (1 - many)).mean() * (1 / FEW + 1 / MANY))
    inside = [
        abs(row["few"] - row["value"]) <= 1.96 * np.sqrt(max(row["value"] * (1 - row["value"]), 1 / MANY) / FEW)
        for row in rows
    ]
    return {
        "prefixes": len(rows),
        "rms_few_minus_many": float(np.sqrt(((few - many) ** 2).mean())),
        "rms_expected_of_chance": float(expected),
        "mean_few_minus_many": float((few - many).mean()),
        "share_within_1.96_standard_errors": float(np.mean(inside)),
        "correlation_few_many": float(np.corrcoef(few, many)[0, 1]),
        "rms_many_minus_demonstrator": float(np.sqrt(((many - exact) ** 2).mean())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstration", type=Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[RECIPE.min_steps, RECIPE.max_steps], help="of the problems"
    )
    arguments = parser.parse_args()
    base = str(arguments.demonstration / "base")
    task = ArithTask(*arguments.steps)
    rows = rows_of(task, arguments.rows)
    few, few_seconds = estimates(rows, base, FEW, seed=1)
    many, many_seconds = estimates(rows, base, MANY, seed=2)
    found = compared(few, many, task)
    facts = {
        "command": " ".join(["python -m benchmarks.evidence.prefix_values", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        **machine(),
        "seconds": {str(FEW): few_seconds, str(MANY): many_seconds},
        "summary": summary(found),
        "rows": found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prefix_values.json").write_text(json.dumps(facts, indent=1) + "\n")
    for row in found:
        print(f"{row['prompt']:<22}{row['begun'].count(chr(10)):>3} steps  K=8 {row['few']:.3f}   K=1,024 {row['value']:.3f} "
              f"({row['low']:.3f}-{row['high']:.3f})   demonstrator {row['demonstrator']:.3f}")  # fmt: skip
    print(json.dumps(facts["summary"], indent=1))


if __name__ == "__main__":
    main()
