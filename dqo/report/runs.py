"""A run's directory, read for the report; whatever it lacks is left out of the page, and what is damaged is named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dqo.config.options import TrainConfig
from dqo.errors import UserError
from dqo.objectives.registry import objective_class
from dqo.train.damage import STATE_FILE, checkpoints
from dqo.train.record import ANSWERS_FILE, HELD_OUT_FILE, RUN_FILE

# Options that say where and how a run is made, and not what it learns: runs that differ in them alone are of one method.
OF_A_PLACE = {"output_dir", "seed", "run_name", "project", "report_to", "ref_cache_dir", "resume_from_checkpoint"}
OF_A_PLACE |= {"dry_run", "use_cpu", "fsdp", "max_batch_tokens", "padding_free", "attn_implementation", "save_steps"}
OF_A_PLACE |= {"save_total_limit", "logging_steps", "gradient_checkpointing"}


@dataclass(frozen=True)
class StoredRun:
    """What a directory holds of a run."""

    directory: Path
    options: dict[str, Any]  # all, as config.yaml has them
    record: dict[str, Any]  # run.json; {} for runs that kept none
    metrics: list[dict]
    answers: list[dict] = field(default_factory=list)
    held_out: list[dict] = field(default_factory=list)
    steps: int | None = None  # planned

    @property
    def method(self) -> str:
        return str(self.options.get("method", "dqo"))

    @property
    def seed(self) -> int:
        return int(self.options.get("seed", TrainConfig.seed))

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def finished(self) -> bool:
        return bool(self.record.get("finished", (self.directory / "report.json").exists()))

    @property
    def state(self) -> str:
        if self.finished:
            return "finished"
        return f"not finished: step {self.step} of {'?' if self.steps is None else self.steps}"

    @property
    def warmup(self) -> int:
        """Steps at the beginning that train the value model alone."""
        phases = self.record.get("phases", [])
        return next((p["begin"] for p in phases if "policy" in p["trains"]), 0)

    @property
    def what(self) -> str:
        """All that two runs of one method share, as a key."""
        kept = {name: value for name, value in self.options.items() if name not in OF_A_PLACE}
        return json.dumps(kept, sort_keys=True, default=str)

    def changed(self) -> dict[str, Any]:
        """The options that are not defaults."""
        usual = dataclasses.asdict(TrainConfig())
        with contextlib.suppress(UserError):  # a class of the user's own that is not here: all of its options are shown
            usual |= dataclasses.asdict(objective_class(self.method)())
        usual = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
        return {n: v for n, v in self.options.items() if n not in usual or v != usual[n]}


def read_run(directory: str | Path) -> StoredRun:
    """The run in a directory.

    Raises:
        UserError: for a directory that holds no run, and for a file of it that is damaged, with its line.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {what}; give the output_dir of a run")
    config = directory / "config.yaml"
    if not config.is_file():
        inner = sorted(path.parent.name for path in directory.glob("*/config.yaml"))
        cure = f"; runs are in it: {', '.join(inner[:5])}" if inner else "; give the output_dir of a run"
        raise UserError(f"{directory} holds no run (it has no config.yaml){cure}")
    options = _options(config)
    record = _object(directory / RUN_FILE)
    files = record.get("files", [])
    answers = read_lines(directory / ANSWERS_FILE, _is_answer) if ANSWERS_FILE in files else []
    held_out = read_lines(directory / HELD_OUT_FILE, _is_held_out) if HELD_OUT_FILE in files else []
    metrics = read_lines(directory / "metrics.jsonl", _is_metrics)
    return StoredRun(directory, options, record, metrics, answers, held_out, _planned(directory, record, options))


def _options(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a mapping of options; the file was altered")
    return found


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete it, and the page does without it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: no object; delete it, and the page does without it")
    return found


def _is_metrics(row: dict) -> bool:
    return isinstance(row.get("step"), int)


def _is_answer(row: dict) -> bool:
    said = [row.get("before"), row.get("after")]
    return isinstance(row.get("prompt"), str) and all(
        isinstance(one, dict) and {"greedy", "text", "sampling"} <= one.keys() for one in said
    )


def _is_held_out(row: dict) -> bool:
    return {"prompt", "label", "reward", "prompt_length", "length"} <= row.keys()


def read_lines(path: Path, fits) -> list[dict]:
    """The objects of a JSON Lines file; [] where it is not there. A last line that is still being written is left out.

    Raises:
        UserError: with the line that is not as it was written.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not fits(row):
            raise UserError(
                f"{path}:{number}: not a row that a run writes; the file was altered: put it back, or cut it"
            )
        rows.append(row)
    return rows


def _planned(directory: Path, record: dict, options: dict) -> int | None:
    """The number of steps of the whole run, where anything tells."""
    if isinstance(record.get("steps"), int):
        return record["steps"]
    if options.get("max_steps", -1) > 0:
        return options["max_steps"]
    for checkpoint in reversed(checkpoints(directory)):
        state = _object(checkpoint / STATE_FILE)
        if isinstance(state.get("steps"), int):
            return state["steps"]
    return None
