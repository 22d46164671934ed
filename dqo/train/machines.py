"""What the processes of a launch must have in common, on one machine or several: options, the output directory, data and models.

Caches may be each machine's own, and so may files of data and models: what is in them is compared, not where they lie.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from dqo import peers
from dqo.config.options import Options
from dqo.data.named import named_sources
from dqo.errors import UserError
from dqo.files import aside, writing
from dqo.processes import Processes, gather_objects
from dqo.train.resume import OF_OBJECTIVE

SEEN_SECONDS = 90.0  # a file that one machine made is seen by the others of a network file system after up to a minute
OWN = {"output_dir", "ref_cache_dir", "row_cache_dir", "run_name"}  # options that may differ between machines
A_PATH = "(something that is there)"


def check_launch(options: Options, processes: Processes) -> None:
    """Refuses processes that do not see one output directory, or that were started with other options. All must call it."""
    if processes.world > 1:
        _check_output(Path(options.train.output_dir), processes)
        _check_options(options, processes)


def seen(path: Path, processes: Processes) -> bool:
    """Whether `path` is there; what another process has just made may be seen late."""
    end = time.monotonic() + (SEEN_SECONDS if processes.world > 1 else 0.0)
    while not path.exists():
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)
    return True


def _check_output(output_dir: Path, processes: Processes) -> None:
    def make() -> str:
        made = aside(output_dir / "seen_by_all")  # its name is one of those that a later run deletes
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            made.touch()
        return made.name

    mark = output_dir / processes.from_main(make)
    blind = gather_objects([] if seen(mark, processes) else [processes.rank], processes)
    if processes.main:
        mark.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"output_dir {output_dir} of process 0 is not seen by {peers.called(blind[0])}: give a directory that all machines "
            "share. Caches may be each machine's own (--ref_cache_dir), and so may data and models"
        )


def _check_options(options: Options, processes: Processes) -> None:
    def told(value: Any) -> Any:
        return A_PATH if isinstance(value, str) and value and Path(value).exists() else value

    mine = {name: told(value) for name, value in options.flat().items() if name not in OWN}
    for name in ("dataset_name", "eval_dataset_name"):
        named = named_sources(mine[name] or "")
        if len(named) > 1:
            mine[name] = [(told(one.name), one.weight) for one in named]
    each = gather_objects([mine], processes)
    for rank, other in enumerate(each):
        for name in sorted(each[0].keys() | other.keys()):
            if each[0].get(name) != other.get(name):
                raise UserError(
                    f"{peers.called(rank)} was started with {name} {other.get(name)!r}, process 0 with {each[0].get(name)!r}: "
                    "give all machines one command"
                )


_CURES = {
    "data": "dataset_name must be one file that all machines see, or equal copies of it, with the same tokenizer",
    "model": "model_name_or_path must be one directory that all machines see, or equal copies of it",
    "reference": "ref_model_name_or_path must be one directory that all machines see, or equal copies of it",
}
_CURES |= dict.fromkeys(OF_OBJECTIVE, "all machines need the same version of dqo, and of the objective")


def check_same(identity: dict, processes: Processes) -> None:
    """Refuses processes that train on other data or other models. `identity`: hashes and texts, by name."""
    if processes.world == 1:
        return
    each = gather_objects([{name: json.dumps(value, sort_keys=True) for name, value in identity.items()}], processes)
    for rank, other in enumerate(each):
        for name in each[0]:
            if name != "options" and other.get(name) != each[0][name]:  # those were compared before
                cure = _CURES.get(name, "all machines need equal files of it")
                raise UserError(f"{peers.called(rank)} does not have the {name} of process 0: {cure}")
