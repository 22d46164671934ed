"""Every number and setting of the real model's part, and its pieces: docs/evidence.md says the same in words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence import pieces
from benchmarks.evidence.real_model import problems
from benchmarks.evidence.recorded import Source, Study
from benchmarks.evidence.recorded_lines import NUMBER, Fields
from benchmarks.evidence.study.settings import ROWS, Settings


@dataclass(frozen=True)
class Sizes:
    train_problems: int = 80
    samples: int = 8  # of a training problem
    test_problems: int = 500
    test_samples: int = 1
    temperature: float = 0.7  # of all sampling, of the data and of the test
    max_new_tokens: int = 48
    continuations: int = 4  # of a prefix whose value is measured
    updates: int = 40  # of the policy, the same number for all methods
    batch: int = 16  # responses an update
    warmup: int = 10  # updates of the value model alone
    generated_together: int = 256


SIZES = Sizes()
# Tokens of a response whose prefix is continued: the steps before the last one of a cut sample may have all of max_new_tokens
CONTINUED_TO = 64
SEEDS = (0, 1)
BASE = "base"
MEASURED = "measured.jsonl"
COMMON: Settings = {
    "use_peft": True, "lora_r": 16, "lora_alpha": 32.0, "learning_rate": 2e-4, "lr_scheduler_type": "constant",
    "max_length": 160, "process_reward": "none", "eval_fraction": 0.0, "save_steps": 8, "save_total_limit": 1,
}  # fmt: skip
DQO: Settings = {
    "method": "dqo", "beta": 0.03, "lam": 1.0, "is_level": "none", "value_model": "head", "critic_learning_rate": 1e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    fixed: Settings
    file: str = ROWS
    pairs: bool = False
    warm: bool = False  # the value model begins alone


METHODS: dict[str, Method] = {
    "sft": Method({"method": "sft"}),
    "rft": Method({"method": "rft"}),
    "dpo": Method({"method": "dpo", "beta": 0.1}, pairs=True),
    "kto": Method({"method": "kto", "beta": 0.1}),
    "dqo": Method(DQO, warm=True),
    "dqo-nll": Method(DQO | {"nll_coef": 0.03}, warm=True),
    "shuffled": Method(DQO | {"shuffle_rewards": True}, warm=True),
    "dqo-measured": Method(DQO | {"process_reward": "potential", "process_coef": 0.5}, file=MEASURED, warm=True),
}
CONTENDERS = ("dqo", "dqo-measured")
UNPLANNED = "dqo-nll"  # it was added when the others had their results


def options_for(method: Method) -> Settings:
    """Options of `dqo train` but for places, seed and precision; and "file", the name of the data."""
    warmup = SIZES.warmup if method.warm else 0
    options = COMMON | method.fixed | {"file": method.file, "max_steps": SIZES.updates + warmup}
    options |= {"per_device_train_batch_size": SIZES.batch // 2 if method.pairs else SIZES.batch}
    return options | ({"value_warmup_steps": warmup} if warmup else {})


@dataclass(frozen=True)
class Piece:
    """The model as a checkpoint (`kind` model), a seed's problems and graded samples (data), the values of their prefixes
    (measured), or a method's run and evaluation (run)."""

    kind: str
    seed: int = 0
    method: str = ""

    @property
    def is_run(self) -> bool:
        return self.kind == "run"

    @property
    def place(self) -> str:
        """The directory of the piece under that of the study."""
        return (
            "model" if self.kind == "model" else "/".join(filter(None, (self.kind, self.method, f"seed-{self.seed}")))
        )

    def needs(self) -> list[Piece]:
        """The pieces that must be made before."""
        if self.kind == "model":
            return []
        if self.kind == "data":
            return [Piece("model")]
        data = Piece("data", self.seed)
        if self.kind == "measured" or self.method == BASE:
            return [data]
        measured = [Piece("measured", self.seed)] if METHODS[self.method].file == MEASURED else []
        return [data, Piece("run", self.seed, BASE), *measured]


def every_piece(seeds: tuple[int, ...] = SEEDS) -> list[Piece]:
    """In their order: what is told first is told of all methods."""
    return pieces.in_order(Piece("run", seed, method) for seed in seeds for method in (BASE, *METHODS))


def result_of(piece: Piece, root: Path) -> dict[str, Any] | None:
    """What the piece's directory holds, if it was made with these sizes, problems and options, and on the data that are there."""
    return STUDY.result_of(piece, root)


def model_of(root: Path) -> dict[str, Any]:
    """{"path", "hash", "dtype"} of the model that was made."""
    found = result_of(Piece("model"), root)
    assert found is not None  # all other pieces need it
    return found


def spec_of(piece: Piece, root: Path) -> dict[str, Any] | None:
    """All that a piece depends on; None where the model is not there yet."""
    if piece.kind == "model":
        return {}
    model = result_of(Piece("model"), root)
    if model is None:
        return None
    spec: dict[str, Any] = {"sizes": dataclasses.asdict(SIZES), "seed": piece.seed, "example": problems.EXAMPLE}
    spec["kinds"] = {
        kind: [share, list(wordings), product] for kind, (share, wordings, product) in problems.KINDS.items()
    }
    spec["model"] = {name: model[name] for name in ("hash", "dtype")}
    if piece.method in METHODS:
        spec["options"] = options_for(METHODS[piece.method])
    if piece.kind == "measured" or piece.method in METHODS and METHODS[piece.method].file == MEASURED:
        spec["continued_to"] = CONTINUED_TO
    return spec


def source_of(run: Piece) -> Source[Piece]:
    return Source(Piece("data", run.seed), ROWS)


FACTS = ("rows", "tokens", "response_tokens", "right", "ended", "right_by_kind")


def facts_of(seed: int, root: Path) -> dict[str, Any] | None:
    """Counts and shares of a seed's data, from a record where only that is there."""
    if data := result_of(Piece("data", seed), root):
        return {name: data[name] for name in FACTS}
    base = result_of(Piece("run", seed, BASE), root)
    return base.get("data") if base else None


def told(run: Piece, root: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Shares of unread answers, without examples; and the facts of the data."""
    unread = {decoding: {"share": found["share"]} for decoding, found in result["unread"].items()}
    return {"unread": unread} | ({"data": facts_of(run.seed, root)} if run.method == BASE else {})


def fields_of(run: Piece) -> Fields:
    """Of a line, those that the table reads."""
    data = {"data": {"rows": int, "tokens": int, "right": NUMBER}} if run.method == BASE else {}
    return {"unread": {"sampling": {"share": NUMBER}}} | data


STUDY = Study(
    spec_of,
    source_of,
    lambda _: "real-study-pieces.jsonl",
    told,
    lambda _: (SIZES.test_problems, SIZES.test_samples),
    fields_of,
)
