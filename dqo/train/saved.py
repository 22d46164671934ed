"""What lies in a directory that a run wrote: its output_dir, a checkpoint, or an adapter or model alone. Read without torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqo.config.stored import stored_options_of
from dqo.errors import UserError
from dqo.train.damage import STATE_FILE, Damaged, check_whole, checkpoints, newest_whole, read_state

_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Saved:
    path: Path  # of the policy, or of its adapter
    run: Path  # where the run's files are
    state: dict  # of the checkpoint, or of the run's last one; {} where nothing tells it
    checkpoint: bool  # whether `path` is a checkpoint

    @property
    def options(self) -> dict[str, Any]:
        return self.state.get("options") or self.state.get("identity", {}).get("options", {})

    @property
    def steps(self) -> int | None:
        """After so many steps the models are as they are here; None where nothing tells it."""
        best = self.state.get("callbacks", {}).get("best_global_step")
        if not self.checkpoint and self.options.get("load_best_model_at_end") and best is not None:
            return best
        return self.state.get("counters", {}).get("step")


def run_options(directory: Path) -> dict[str, Any]:
    """The options of the run whose output_dir this is, or of which it is a checkpoint; {} where no config.yaml tells them.

    Raises:
        UserError: for a config.yaml that cannot be read, or has what training would refuse.
    """
    for folder in (directory, directory.parent):
        if (folder / "config.yaml").is_file():
            return stored_options_of(str(folder / "config.yaml"))
    return {}


def is_checkpoint_name(name: str) -> bool:
    """Whether a run would take a folder of this name for a checkpoint of its own."""
    return _CHECKPOINT.fullmatch(name) is not None


def find_saved(path: Path) -> Saved:
    """What is in `path`.

    Raises:
        UserError: for a path that holds no model, a run that is not finished, or a checkpoint that is damaged; with what can be
            taken in its place.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such directory"
        raise UserError(f"{path}: {what}; name a run's output_dir, a checkpoint in it, or an adapter's directory")
    if (path / STATE_FILE).exists() or (is_checkpoint_name(path.name) and (path.parent / "config.yaml").exists()):
        return _of_checkpoint(path)
    found = checkpoints(path)
    has_models = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    if found or (path / "config.yaml").exists():
        return _of_run(path, found, has_models)
    if not has_models:
        raise UserError(f"{path} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    return Saved(path, path, {}, checkpoint=False)


def _of_checkpoint(path: Path) -> Saved:
    try:
        check_whole(path)
    except Damaged as error:
        whole, _ = newest_whole([other for other in checkpoints(path.parent) if other.name != path.name])
        raise UserError(f"{error}; " + (f"{whole} is whole" if whole else "no other checkpoint is whole")) from error
    return Saved(path, path.parent, read_state(path), checkpoint=True)


def _of_run(path: Path, found: list[Path], has_models: bool) -> Saved:
    if not found:
        if has_models:  # somebody deleted the checkpoints: the models are written after the last step
            return Saved(path, path, {}, checkpoint=False)
        raise UserError(f"{path} is the output_dir of a run that has made no checkpoint yet")
    state = read_state(found[-1])
    counters, steps = state.get("counters", {}), state.get("steps")
    behind = counters.get("step", 0) + counters.get("skipped", 0)
    stopped = state.get("callbacks", {}).get("stopped", False)
    unfinished = steps is not None and behind < steps and not stopped
    if unfinished or not has_models:
        how_far = f"{behind} of {steps} steps" if unfinished else "its models are not written yet"
        raise UserError(
            f"{path} is not finished ({how_far}): the command that began it goes on there. Or take its last checkpoint: "
            f"{found[-1]}"
        )
    return Saved(path, path, state, checkpoint=False)


def metrics_of(saved: Saved) -> tuple[dict, dict]:
    """The held-out metrics before training, and those of the saved models; {} each where there are none."""
    path = saved.run / "metrics.jsonl"
    if saved.steps is None or not path.is_file():
        return {}, {}
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a row that is being written, or was cut: it tells nothing
            continue
        if isinstance(row, dict) and any(name.startswith("eval_") for name in row):
            rows.append(row)
    before, after = ([row for row in rows if row.get("step") == step] for step in (0, saved.steps))
    return (before or [{}])[-1], (after or [{}])[-1]


def command_of(saved: Saved) -> str | None:
    """The command of the run, as its report keeps it."""
    try:
        command = json.loads((saved.run / "report.json").read_text())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return command if isinstance(command, str) else None
