"""What the trained policy, its value model and the initial model know of right and wrong responses, and of the first wrong step.

    dqo demo --output_dir dqo-demo && python -m benchmarks.evidence.credit dqo-demo        (about half an hour on two cores)

Every method trains on the demonstration's rollouts from its base model, with the options of objective_options.py and several
training seeds; what is there already is not trained again. All score the same held-out samples of the base model on new problems
(data/held_out.jsonl of the demonstration): AUC for right against wrong responses, the same within a prompt, and how often the
lowest step is the first wrong one. The table goes to benchmarks/results/credit.json.

--unseen_mistakes adds a second table over responses whose mistakes training never saw: they are written by ArithTask with
another table of mistakes, without the entries that are hard in the training data.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.evidence.objective_options import COMMON, OPTIONS, RECIPE, UPDATES
from benchmarks.evidence.objectives import train
from benchmarks.harness.environment import commit
from dqo.data.episode import Episode
from dqo.data.episodes import make_episodes
from dqo.data.rows import Row, read_rows
from dqo.demo.rollouts import distinct_problems, graded_rows, rng_of
from dqo.grading.arith import ArithTask, Entry
from dqo.report.predictors import (
    CERTAINTY,
    IMPLICIT,
    IMPLICIT_BEFORE,
    INITIAL,
    LIKELIHOOD,
    VALUE,
    chance_of,
    predictors_of,
)
from dqo.report.schema import Chance, Predictor
from dqo.report.store import held_out_row
from dqo.train.held_out_start import start_row
from dqo.train.record import machine
from dqo.train.token_scores import load_run, token_scores

RESULTS = Path(__file__).parents[1] / "results"
METHODS = ("sft", "rft", "dpo", "kto", "rebel", "dro", "oreo", "dqo")
SHOWN = (IMPLICIT, IMPLICIT_BEFORE, VALUE)
UNTRAINED = (LIKELIHOOD, CERTAINTY)
MEASURES = {"auc": "AUC", "within": "AUC within a prompt", "found": "first wrong step, %",
            "found_in_half": "among uncertain steps, %"}  # fmt: skip


@dataclass(frozen=True)
class Unseen(ArithTask):
    """An author whose mistakes are at entries that `known` has right."""

    known: ArithTask = ArithTask(1, 1)

    @cached_property
    def mistakes(self) -> dict[Entry, int]:
        own = ArithTask(1, 1, self.hard_share, self.right_share, self.seed).mistakes
        return {entry: wrong for entry, wrong in own.items() if entry not in self.known.mistakes}


def unseen_rows(problems: int, samples: int, seed: int = 0) -> list[Row]:
    task = Unseen(RECIPE.min_steps, RECIPE.max_steps, seed=1, known=ArithTask(RECIPE.min_steps, RECIPE.max_steps))
    rng = rng_of(seed, "unseen mistakes")
    rows = []
    for problem in distinct_problems(task, rng, problems, set()):
        rows += graded_rows(task, problem, [(task.demonstration(problem, rng), True) for _ in range(samples)])
    return rows


def scored(run: Path, rows: Sequence[Row], with_baselines: bool) -> tuple[list[Predictor], Chance | None]:
    """What the models of a run know of these responses."""
    models = load_run(run)
    size = models.policy.get_input_embeddings().weight.shape[0]
    episodes: list[Episode] = make_episodes(list(rows), models.tokenizer, vocab_size=size, max_length=256)
    names = ["logprobs", "entropy", "ref_logprobs", "ref_entropy"] + ["values"] * (models.value_model is not None)
    told = []
    for e, said in zip(episodes, token_scores(models, episodes, names, run.name)):
        e.ref_logprobs = said["ref_logprobs"]
        start = start_row(e, {"logprobs": said["ref_logprobs"], "entropy": said["ref_entropy"]})
        told.append(held_out_row(e, said, start))
    return predictors_of(run.name, told, with_baselines), chance_of(told)


def summary(found: dict[str, list[Predictor]]) -> list[dict]:
    """A row for each method and score: means over seeds of each measure and its interval over prompts, and the range of seeds."""
    rows = []
    for method, predictors in found.items():
        for name in dict.fromkeys(p["name"] for p in predictors):
            of_seeds = [p for p in predictors if p["name"] == name]
            row: dict = {"method": method, "score": name, "seeds": len(of_seeds)}
            for measure in MEASURES:
                values = [[p["auc"], *(p["interval"] or ())] if measure == "auc" else p.get(measure) for p in of_seeds]
                told = [value for value in values if value is not None]
                if told:
                    mean, low, high = np.mean(told, axis=0).tolist()
                    means = [value[0] for value in told]
                    row[measure] = {"mean": mean, "low": low, "high": high, "least": min(means), "most": max(means)}
            rows.append(row)
    return rows


def table(rows: list[dict], chance: Chance | None) -> str:
    """Markdown: means over seeds, and in brackets their 95 % intervals over prompts."""
    lines = ["| method | score | " + " | ".join(MEASURES.values()) + " |", "|---" * (2 + len(MEASURES)) + "|"]
    for row in rows:
        cells = [row["method"], row["score"], *(_cell(row.get(measure), measure) for measure in MEASURES)]
        lines.append("| " + " | ".join(cells) + " |")
    if chance is not None:
        drawn = [chance["found"], chance["found_in_half"]]
        cells = ["0.500", "0.500", *("" if share is None else f"{100 * share[0]:.1f}" for share in drawn)]
        lines.append("| | a step drawn by chance | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: dict | None, measure: str) -> str:
    if found is None:
        return ""
    factor, digits = (1, 3) if measure in ("auc", "within") else (100, 1)
    mean, low, high = (f"{factor * found[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low}–{high})"


def measured(runs: dict[str, list[Path]], rows: Sequence[Row]) -> dict:
    """The table's rows: what needs no training, and each method's scores over its seeds."""
    found: dict[str, list[Predictor]] = {}
    chance = None
    for method, directories in runs.items():
        for directory in directories:
            predictors, chance = scored(directory, rows, with_baselines=INITIAL not in found)
            if INITIAL not in found:
                found[INITIAL] = [p for p in predictors if p["method"] == INITIAL and p["name"] in UNTRAINED]
            own = [p for p in predictors if p["method"] == directory.name and p["name"] in SHOWN]
            found.setdefault(method, []).extend(own)
    return {"responses": len(rows), "chance": chance, "rows": summary(found)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstration", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3, help="how many training seeds, 0, 1, ...")
    parser.add_argument("--updates", type=int, default=UPDATES, help="of the policy, by every method")
    parser.add_argument("--output_dir", type=Path, help="where the runs are; by default DEMONSTRATION/credit")
    parser.add_argument("--unseen_mistakes", action="store_true")
    given = parser.parse_args(arguments)
    output = given.output_dir or given.demonstration / "credit"
    runs = {m: [output / f"{m}-{given.updates}-seed-{seed}" for seed in range(given.seeds)] for m in given.methods}
    for method, directories in runs.items():
        for seed, directory in enumerate(directories):
            if not (directory / "report.html").exists():
                train(method, given.demonstration, directory, seed=seed, max_steps=given.updates)
    told = {"held_out": measured(runs, read_rows(given.demonstration / "data" / "held_out.jsonl"))}
    if given.unseen_mistakes:
        told["unseen_mistakes"] = measured(runs, unseen_rows(RECIPE.held_out_problems, RECIPE.eval_samples))
    facts = {
        "command": " ".join(
            ["python -m benchmarks.evidence.credit", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        **machine(),
        "options": {m: COMMON | OPTIONS[m] for m in given.methods},
        **told,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "credit.json").write_text(json.dumps(facts, indent=1) + "\n")
    for name, found in told.items():
        print(f"\n{name.replace('_', ' ')}, {found['responses']:,} responses\n")
        print(table(found["rows"], found["chance"]))


if __name__ == "__main__":
    main()
