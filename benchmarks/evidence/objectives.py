"""Every objective on one rollout file, the demonstration's, from the demonstration's base model, by `dqo compare`.

    dqo demo --output_dir dqo-demo && python -m benchmarks.evidence.objectives dqo-demo     (about half an hour on one core)

All make the same number of updates from as many responses each, at one set of options (objective_options.py). The
command line of `dqo compare` is printed. It keeps what is finished and goes on with the rest, and so does this command: --methods
trains some of them now, and the table has all that are finished. Then the policies are asked what they know of held-out
responses; the table is printed, and goes with a plot to benchmarks/results/objectives.json and objectives.svg.

Nothing is tuned here. xpo, which samples anew in every round, is not among them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.objective_options import BUDGET, COMMON, OPTIONS, PROBLEMS, RECIPE, SAMPLES, own_options
from benchmarks.evidence.objectives_table import write_results
from dqo.comparison.plan import flags_of, plan
from dqo.comparison.run import is_finished
from dqo.data.rows import Row, read_rows, write_rows
from dqo.demo.rollouts import distinct_problems, rng_of
from dqo.grading.arith import ArithTask

FIRST = "dpo"  # which rto reads


def train(name: str, demonstration: Path, output: Path, **changes: Any) -> None:
    """One run by `dqo train`. A value warm-up comes on top of max_steps, and a method of pairs takes half as many pairs."""
    words = _words(COMMON | _data(demonstration) | changes) + _words(OPTIONS[name], f"{name}.")
    (run,), _ = plan([name], 1, output.parent, flags_of(words))
    *arguments, _ = run.arguments  # the last word is a directory of the plan's
    subprocess.run([sys.executable, "-m", "dqo", "train", *arguments, str(output)], check=True)


def _data(demonstration: Path) -> dict[str, Any]:
    return {
        "dataset_name": demonstration / "data" / "rollouts.jsonl",
        "model_name_or_path": demonstration / "base",
    }


def _words(options: dict[str, Any], prefix: str = "", output: Path | None = None) -> list[str]:
    """The command line of options."""
    told = {name: str(value).replace("{OUT}", str(output)) for name, value in options.items()}
    return [word for name, value in told.items() for word in (f"--{prefix}{name}", value)]


def comparison(methods: Sequence[str], demonstration: Path, output: Path, **changes: Any) -> list[str]:
    """The arguments of `dqo compare`."""
    asked = {
        "eval_tasks": _extra(output) / "problems.jsonl",
        "verifier": "arith",
        "max_completion_length": RECIPE.max_new_tokens,
    }
    common = COMMON | BUDGET | _data(demonstration) | asked | {"num_generations": SAMPLES} | changes
    words = ["--methods", ",".join(methods), "--seeds", "1", "--output_dir", str(output), *_words(common)]
    for method in methods:
        words += _words(own_options(method), f"{method}.", output)
    return words


def _extra(output: Path) -> Path:
    """Files that the comparison reads beside the demonstration's."""
    return output.with_name(f"{output.name}-data")


def write_data(demonstration: Path, output: Path) -> None:
    """New problems, and the rollouts with the values of their prefixes, beside `output`."""
    directory = _extra(output)
    directory.mkdir(parents=True, exist_ok=True)
    seed = json.loads((demonstration / "demo.json").read_text())["seed"]
    task = ArithTask(RECIPE.min_steps, RECIPE.max_steps)
    asked = distinct_problems(task, rng_of(seed, "evaluation"), RECIPE.eval_problems, set())[:PROBLEMS]
    lines = [json.dumps({"prompt": problem, "answer": task.answer(problem)}) + "\n" for problem in asked]
    (directory / "problems.jsonl").write_text("".join(lines))
    rows = read_rows(str(demonstration / "data" / "rollouts.jsonl"))
    write_rows(directory / "prefix_values.jsonl", with_prefix_values(rows))


def with_prefix_values(rows: Sequence[Row]) -> list[Row]:
    """The rows, each step's reward the mean outcome of the stored responses to the prompt that begin like this one up to its end:
    what outcomes alone tell of a prefix."""
    outcomes = defaultdict(list)
    for row in rows:
        for _, end in row.steps or ():
            outcomes[row.prompt, row.completion[:end]].append(row.reward)
    means = {prefix: sum(rewards) / len(rewards) for prefix, rewards in outcomes.items()}
    return [
        dataclasses.replace(row, step_rewards=[means[row.prompt, row.completion[:end]] for _, end in row.steps or ()])
        for row in rows
    ]


def compare(arguments: list[str]) -> None:
    """`dqo compare` in a process of its own, as from a shell."""
    print(shlex.join(["dqo", "compare", *arguments]), flush=True)
    subprocess.run([sys.executable, "-m", "dqo", "compare", *arguments], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstration", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--output_dir", type=Path, help="of `dqo compare`; by default DEMONSTRATION/objectives")
    parser.add_argument("--updates", type=int, default=BUDGET["max_steps"], help="of every method's policy")
    given = parser.parse_args(arguments)
    output = given.output_dir or given.demonstration / "objectives"
    if not (_extra(output) / "prefix_values.jsonl").exists():
        write_data(given.demonstration, output)
    if "rto" in given.methods and not is_finished(output / f"{FIRST}-seed0"):
        compare(comparison([FIRST], given.demonstration, output, max_steps=given.updates))
    if not all(is_finished(output / f"{method}-seed0") for method in given.methods):
        compare(comparison(given.methods, given.demonstration, output, max_steps=given.updates))
    words = ["python -m benchmarks.evidence.objectives", *(sys.argv[1:] if arguments is None else arguments)]
    finished = [method for method in OPTIONS if is_finished(output / f"{method}-seed0")]
    write_results(finished, given.demonstration, output, " ".join(words))


if __name__ == "__main__":
    main()
