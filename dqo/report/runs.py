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
from dqo.data.forms import shown
from dqo.errors import UserError
from dqo.objectives.registry import objective_class
from dqo.train.damage import STATE_FILE, checkpoints
from dqo.train.record import ANSWERS_FILE, HELD_OUT_FILE, RUN_FILE

# Options that say where and how a run is made, and not what it learns: runs that differ in them alone are of one method.
OF_A_PLACE = {"output_dir", "seed", "run_name", "project", "report_to", "ref_cache_dir", "resume_from_checkpoint"}
OF_A_PLACE |= {
    "row_cache_dir",
    "dry_run",
    "use_cpu",
    "fsdp",
    "fsdp_cpu_offload",
    "max_batch_tokens",
    "padding_free",
    "attn_implementation",
    "save_steps",
}
OF_A_PLACE |= {"save_total_limit", "logging_steps", "gradient_checkpointing"}


_NUMBER = (int, float)
# What run.json has, where it has it; and what is in its objects.
_RECORD: dict[str, Any] = {"created": str, "commands": list, "steps": int, "phases": list, "data": dict, "model": dict}
_RECORD |= {"parameters": dict, "versions": dict, "device": str, "finished": bool, "seconds": _NUMBER}
_RECORD |= {
    "cpu_seconds": _NUMBER,
    "tokens_per_second": _NUMBER,
    "made": int,
    "held_out": dict,
    "value_traces": list,
    "files": list,
    "unread": dict,
}
_INSIDE = {"data": ("name", "sha256", "of", "counts", "held_out_sha256"), "model": ("name", "sha256")}
_STEP_SCORES = ("step_ratios", "step_values", "start_step_logprobs", "start_step_entropies")  # a number for each step
_TOGETHER: tuple[set[str], ...] = (  # all are there, or none
    {"steps", "first_wrong_step"},
    {"ratio", "ratio_before_last", "step_ratios"},
    {"start_logps", "start_entropy", "start_step_logprobs", "start_step_entropies"},
)
_OPTIONS: dict[str, Any] = {"method": str, "seed": int, "max_steps": int}  # of config.yaml


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
    def compared(self) -> dict[str, str]:
        """{name: value} of the options of the method. A run that went on has 0.0 where one that did not has 0: they are equal."""
        kept = {name: value for name, value in self.options.items() if name not in OF_A_PLACE}
        return {name: str(float(value)) if type(value) is int else str(value) for name, value in kept.items()}

    @property
    def what(self) -> str:
        """All that two runs of one method share, as a key."""
        return json.dumps(self.compared, sort_keys=True)

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
    record = _record(directory / RUN_FILE)
    files = record.get("files", [])
    answers = read_lines(directory / ANSWERS_FILE, _is_answer) if ANSWERS_FILE in files else []
    held_out = read_lines(directory / HELD_OUT_FILE, _is_held_out) if HELD_OUT_FILE in files else []
    for path, rows in ((directory / ANSWERS_FILE, answers), (directory / HELD_OUT_FILE, held_out)):
        if odd := next((i for i, row in enumerate(rows) if _shape(row) != _shape(rows[0])), None):
            raise UserError(f"{path}:{odd + 1}: not as its first row: the file was altered: put it back, or cut it")
    metrics = read_lines(directory / "metrics.jsonl", _is_metrics)
    return StoredRun(directory, options, record, metrics, answers, held_out, _planned(directory, record, options))


def _options(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a mapping of options; the file was altered")
    if wrong := _of_other_type(found, _OPTIONS):
        raise UserError(f"{path}: {wrong}; the file was altered")
    return found


def _of_other_type(found: dict[str, Any], types: dict[str, Any]) -> str | None:
    """What is there and of another type."""
    for name, its_type in types.items():
        if name in found and (
            not isinstance(found[name], its_type) or its_type is int and isinstance(found[name], bool)
        ):
            return f"{name} is {shown(found[name])}"
    return None


def _record(path: Path) -> dict[str, Any]:
    """run.json, whose parts are what a run writes."""
    found = _object(path)
    wrong = _of_other_type(found, _RECORD)
    for name, inside in _INSIDE.items():
        if wrong is None and name in found and (missing := [key for key in inside if key not in found[name]]):
            wrong = f"{name} has no {missing[0]}"
    if wrong is None and "seconds" in found and not {"tokens_per_second", "made"} <= found.keys():
        wrong = "seconds are there, and tokens_per_second or made are not"
    if wrong is not None:
        raise UserError(f"{path}: {wrong}, not as a run writes it; delete it, and the page does without it")
    return found


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete it, and the page does without it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: no object; delete it, and the page does without it")
    return found


def _is_metrics(row: dict) -> bool:
    return isinstance(row.get("step"), int) and not any(isinstance(value, (list, dict)) for value in row.values())


def _is_answer(row: dict) -> bool:
    return isinstance(row.get("prompt"), str) and all(
        isinstance(one, dict)
        and isinstance(one.get("greedy"), _NUMBER)
        and isinstance(one.get("text"), str)
        and isinstance(one.get("sampling"), list)
        and all(isinstance(right, _NUMBER) for right in one["sampling"])
        for one in (row.get("before"), row.get("after"))
    )


def _is_held_out(row: dict) -> bool:
    needed = {"prompt", "label", "reward", "prompt_length", "length"}
    told = {name: value for name, value in row.items() if name != "source"}
    wrong = told.pop("first_wrong_step", None)
    lists = [told.pop(name) for name in _STEP_SCORES if name in told]
    of_steps = all(isinstance(found, list) and len(found) == row.get("steps") for found in lists)
    numbers = [*told.values(), *(x for found in lists if isinstance(found, list) for x in found)]
    return (
        needed <= told.keys()
        and all(group <= row.keys() or not group & row.keys() for group in _TOGETHER)
        and of_steps
        and all(isinstance(x, _NUMBER) for x in numbers)
        and (wrong is None or isinstance(wrong, int) and 0 <= wrong < told.get("steps", 0))
        and row["length"] > 0
    )


def _shape(row: dict) -> list:
    """What all rows of a file have alike: their keys, and how often a problem was answered."""
    samples = [len(row[when]["sampling"]) for when in ("before", "after") if "sampling" in (row.get(when) or ())]
    return [sorted(row), samples]


def read_lines(path: Path, fits) -> list[dict]:
    """The objects of a JSON Lines file; [] where it is not there. A last line that is still being written is left out.

    Raises:
        UserError: with the line that is not as it was written.
    """
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
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
