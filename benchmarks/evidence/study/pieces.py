"""The pieces of the study, what each needs, where its result is, and the order in which they are made."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.pieces import in_order, scores
from benchmarks.evidence.recorded import Source, Study
from benchmarks.evidence.study import settings
from benchmarks.evidence.study.confirmation import CLAIMS, NEW_SEEDS
from benchmarks.evidence.study.settings import BASE, METHODS, ROWS, methods_of, tuned_on
from benchmarks.evidence.study.sizes import BASES, FEW_SEEDS, SEEDS, TASKS, TUNING_SEED

STAGES = ("data", "tune", "train", "ablate", "confirm")
SAMPLES = "samples.jsonl"  # of a base model


@dataclass(frozen=True)
class Piece:
    """A base model (`kind` base, `name` of BASES), a task's files (data), or a run of a method (run)."""

    kind: str
    name: str  # of the base model or the task
    seed: int
    method: str = ""
    setting: int | None = None  # that is tried on the tuning seed
    change: str = ""  # of ABLATIONS

    @property
    def is_run(self) -> bool:
        return self.kind == "run"

    @property
    def stage(self) -> str:
        if self.kind != "run":
            return "data"
        if self.change:
            return "ablate"
        return {TUNING_SEED: "tune"}.get(self.seed, "confirm" if self.seed in NEW_SEEDS else "train")

    @property
    def place(self) -> str:
        """The directory of the piece under that of the study."""
        if self.kind != "run":
            return f"{self.kind}/{self.name}/seed-{self.seed}"
        part = re.sub(r"\W+", "-", self.change) if self.change else ""
        last = f"seed-{self.seed}" if self.setting is None else f"setting-{self.setting}"
        return "/".join(filter(None, ("runs", self.name, self.method, part, last)))

    def needs(self) -> list[Piece]:
        """The pieces that must be made before."""
        if self.kind == "base":
            after = BASES[self.name].after
            return [Piece("base", after, self.seed)] if after else []
        task = TASKS[self.name]
        bases = [Piece("base", name, self.seed) for name in (task.base, task.other) if name]
        if self.kind == "data" or task.rounds > 1 and self.method == BASE:
            return bases
        needed = [] if task.rounds > 1 else [Piece("data", self.name, self.seed)]
        if self.method != BASE:
            needed += [Piece("run", self.name, self.seed, BASE), *self.tuning()]
        return needed

    def tuning(self) -> list[Piece]:
        """The runs among which the setting of this one is chosen; none where it is itself one of them."""
        if self.method in ("", BASE) or self.setting is not None:
            return []
        return tried_settings(tuned_on(self.name), METHODS[self.method].tuned_as or self.method)


def tried_settings(task: str, method: str) -> list[Piece]:
    return [Piece("run", task, TUNING_SEED, method, k) for k in range(len(METHODS[method].settings))]


def result_of(piece: Piece, root: Path) -> dict[str, Any] | None:
    """What the piece's directory holds, if it was made with these sizes and options, and on the rows that are there."""
    return STUDY.result_of(piece, root)


def spec_of(piece: Piece, root: Path) -> dict[str, Any] | None:
    """All that a piece depends on; None of a run that is not tuned yet."""
    if piece.kind == "base":
        return {"base": dataclasses.asdict(BASES[piece.name]), "seed": piece.seed}
    task = TASKS[piece.name]
    spec: dict[str, Any] = {"task": dataclasses.asdict(task), "base": dataclasses.asdict(BASES[task.base])}
    spec["seed"] = piece.seed
    if piece.kind == "run" and piece.method != BASE:
        spec["options"] = options_of_run(piece, root)
        return spec if spec["options"] is not None else None
    return spec


def setting_of(run: Piece, root: Path) -> settings.Settings | None:
    """That which is tried, or was chosen; None before all settings were tried."""
    number = run.setting if run.setting is not None else chosen(run.tuning(), root)
    return None if number is None else METHODS[METHODS[run.method].tuned_as or run.method].settings[number]


def options_of_run(run: Piece, root: Path) -> settings.Settings | None:
    """Those of the run as `settings.options_for` has them; None before all settings were tried."""
    setting = setting_of(run, root)
    change = settings.ABLATIONS[run.change] if run.change else None
    return None if setting is None else settings.options_for(run.name, METHODS[run.method], setting, change)


def chosen(tried: list[Piece], root: Path) -> int | None:
    """The setting with the greatest validation accuracy, of equal ones the first; None where one was not tried yet."""
    found = [result_of(piece, root) for piece in tried]
    if not all(found):
        return None
    means = [sum(scores(result)) / len(result["greedy"]) for result in found if result]
    return means.index(max(means))


def blocks() -> Iterator[list[Piece]]:
    """The runs that docs/evidence.md wants, block by block; what they need is made before them."""

    def runs(task: str) -> list[Piece]:
        return [Piece("run", task, seed, name) for seed in SEEDS for name in (BASE, *methods_of(task))]

    for task in ("a", "d", "f", "b14", "c", "e1", "e3", "b28"):  # each is complete, and tested, before the next begins
        yield runs(task)
    yield runs("g2") + runs("g4")
    yield [
        Piece("run", task, seed, "dqo", change=change)
        for change in settings.ABLATIONS
        for task in settings.ABLATED
        for seed in FEW_SEEDS
    ]
    yield [
        Piece("run", claim.task, seed, name)
        for seed in NEW_SEEDS
        for claim in CLAIMS
        for name in (BASE, *claim.methods)
    ]


def every_piece() -> list[Piece]:
    return in_order(piece for block in blocks() for piece in block)


def source_of(run: Piece) -> Source[Piece]:
    """A method's settings are compared among themselves; other runs with those of the task and seed: on its data, or on what its
    base model says, where policies answer in rounds."""
    task = TASKS[run.name]
    alone = tuple(tried_settings(run.name, run.method)) if run.setting is not None else ()
    if task.rounds > 1:
        return Source(Piece("base", task.base, run.seed), SAMPLES, alone)
    return Source(Piece("data", run.name, run.seed), ROWS, alone)


def told(run: Piece, root: Path, _: dict[str, Any]) -> dict[str, Any]:
    return {} if run.method == BASE else {"setting": setting_of(run, root)}


def counts_of(run: Piece) -> tuple[int, int]:
    """Test problems, and samples of each."""
    task = TASKS[run.name]
    return min(task.eval_problems, BASES[task.base].evaluation), task.eval_samples


STUDY = Study(spec_of, source_of, lambda place: f"study/{place.split('/')[1]}.jsonl", told, counts_of)
