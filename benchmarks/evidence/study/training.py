"""One piece of the study: a base model, a task's files, or a run of a method with its evaluation."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.evidence.as_planned import as_planned
from benchmarks.evidence.pieces import attempted, made
from benchmarks.evidence.study.data import (
    make_base,
    make_data,
    model_of,
    problems_of,
    right,
    sampled,
)
from benchmarks.evidence.study.pieces import Piece, options_of_run, result_of, spec_of
from benchmarks.evidence.study.settings import BASE, Settings
from benchmarks.evidence.study.sizes import BASES, TASKS, Base, Task
from dqo.config.options import options_of
from dqo.data.rows import write_rows

if TYPE_CHECKING:  # it imports torch
    from dqo.train.run import Run


def make(piece: Piece, root: Path) -> dict[str, Any]:
    """Makes a piece of which everything that it needs is there, and returns its result. One that was killed goes on, unless its
    options have changed since."""
    place = root / piece.place

    def work() -> dict[str, Any]:
        if piece.kind == "base":
            return make_base(piece.name, piece.seed, root)
        return make_data(piece.name, piece.seed, root) if piece.kind == "data" else run(piece, root)

    result = made(place, spec_of(piece, root), work)
    if piece.stage == "tune":
        shutil.rmtree(place / "run", ignore_errors=True)
    return result


def run(piece: Piece, root: Path) -> dict[str, Any]:
    """Trains and evaluates: greedy (P,) and sampling (P, k) of 0/1, and the processor's seconds of training."""
    task = TASKS[piece.name]
    base, own = BASES[task.base], model_of(task.base, piece.seed, root)
    model: Path | None = own
    failed, cpu = None, time.process_time()
    if piece.method != BASE:
        options = options_of_run(piece, root)
        assert options is not None  # its settings were tried before
        rounds = trained_in_rounds if task.rounds > 1 else trained
        model, failed = attempted(lambda: rounds(piece, task, options, root))
        if failed is not None:
            model = kept(root / piece.place)
    seconds = time.process_time() - cpu
    if model is not None:
        scores = evaluated(task, base, model, piece.seed)
    else:
        of_base = result_of(Piece("run", piece.name, piece.seed, BASE), root)
        assert of_base is not None  # it was needed
        scores = {name: of_base[name] for name in ("greedy", "sampling")}
    told = failed and failed.replace(str(root), "DIRECTORY")  # whoever reads it has another
    return scores | {"cpu_seconds": seconds, "failed": told}


def kept(place: Path) -> Path | None:
    """What a run that ended itself has kept; None where it never began."""
    from dqo.train.damage import checkpoints

    found = [checkpoint for output in sorted(place.glob("**/run")) for checkpoint in checkpoints(output)]
    return found[-1] if found else None


def trained(piece: Piece, task: Task, options: Settings, root: Path) -> Path:
    data = root / Piece("data", piece.name, piece.seed).place
    output = root / piece.place / "run"
    return train_once(options, data, model_of(task.base, piece.seed, root), output, piece.seed).output_dir


def trained_in_rounds(piece: Piece, task: Task, options: Settings, root: Path) -> Path:
    """In each round the policy of the one before answers the next part of the problems."""
    base, model = BASES[task.base], model_of(task.base, piece.seed, root)
    problems = problems_of(base, piece.seed)[1][: task.prompts]
    size = len(problems) // task.rounds
    for number in range(task.rounds):
        place = root / piece.place / f"round-{number}"
        place.mkdir(exist_ok=True)
        rows = sampled(base, model, problems[number * size :][:size], task.samples, piece.seed)
        write_rows(place / options["file"], rows)
        model = train_once(options, place, model, place / "run", piece.seed + 1000 * number).output_dir
    return model


def train_once(options: Settings, data: Path, model: Path, output: Path, seed: int) -> Run:
    """Trains by the options of a method, whose "file" is the data's name; the reference's log-probabilities stay beside it."""
    from dqo.train.run import train

    own = {name: value for name, value in options.items() if name != "file"}
    places = {"dataset_name": data / options["file"], "model_name_or_path": model, "output_dir": output}
    places |= {"ref_cache_dir": data / "ref_cache"}
    given = as_planned(own) | {name: str(path) for name, path in places.items()} | {"seed": seed}
    return train(options_of(given, "the study's options"), output.parent.name)


def evaluated(task: Task, base: Base, model: Path, seed: int) -> dict[str, list]:
    """Greedy answers (P,) and samples (P, k) of the task's problems, 1 where they are right."""
    from dqo.evaluation.accuracy import Problem, evaluate
    from dqo.grading.grade import Grade
    from dqo.models.named import load_tokenizer
    from dqo.models.policy import load_policy

    tokenizer = load_tokenizer(str(model))
    problems = problems_of(base, seed)[0][: task.eval_problems]
    asked = [Problem(ids, {"prompt": p}) for p, ids in zip(problems, tokenizer(problems)["input_ids"])]

    def grade(completions: list[str], rows: list[dict]) -> list[Grade]:
        found = [right(base.arith, base.strict, row["prompt"], text) for text, row in zip(completions, rows)]
        return [Grade(float(one), True) for one in found]

    sampling = {"num_generations": task.eval_samples, "max_new_tokens": base.max_new_tokens}
    return evaluate(load_policy(str(model)), tokenizer, asked, grade, **sampling, seed=seed + 1).scores()
