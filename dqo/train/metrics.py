"""[sum, count] metrics of micro-batches -> numbers of a step, and metrics.jsonl."""

from __future__ import annotations

import json
import logging
import math
import os
import zlib
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dqo.data.batches import Batch
from dqo.errors import UserError
from dqo.files import write_whole, writing
from dqo.objectives.sums import mean_metric
from dqo.processes import Processes, add_over_processes, gather_objects
from dqo.train.damage import put_away
from dqo_kernels import TokenStats

logger = logging.getLogger(__name__)


def add(total: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins metrics of two parts of the data; those named .../min and .../max are extremes, all others [sum, count]."""
    joined = dict(total)
    for name, value in more.items():
        if name not in joined:
            joined[name] = value
        elif name.endswith("/min"):
            joined[name] = torch.minimum(joined[name], value)
        elif name.endswith("/max"):
            joined[name] = torch.maximum(joined[name], value)
        else:
            joined[name] = joined[name] + value
    return joined


def none_of(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names for no data at all."""
    empty = {"min": math.inf, "max": -math.inf}
    return {name: torch.full_like(value, empty.get(name.rpartition("/")[2], 0.0)) for name, value in metrics.items()}


def of_batch(batch: Batch) -> dict[str, Tensor]:
    """Lengths of the responses, the share that was cut, and the share of positions that are padding."""
    count, positions = len(batch.episodes), batch.positions
    pairs = {
        "completions/mean_length": (batch.actions.numel(), count),
        "completions/clipped_ratio": (sum(e.truncated for e in batch.episodes), count),
        "data/padding_frac": (positions - batch.tokens, positions),
    }
    return {name: torch.tensor(pair, dtype=torch.float32, device=batch.actions.device) for name, pair in pairs.items()}


def common(stats: TokenStats, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every objective logs."""
    metrics = {"entropy": mean_metric(stats.entropy)}
    if "ref_logprobs" in rows:
        # k3 on stored responses: an estimate of the distance, not of KL(pi || ref) once the policy has moved far
        back = rows["ref_logprobs"] - stats.logprobs.detach()
        metrics["kl"] = mean_metric(back.clamp(max=20.0).exp() - 1.0 - back)
    return metrics


# Of `common`, `of_batch` and the step; what an objective gave under these names would be lost.
_OWN = {"loss", "entropy", "kl", "router_aux_loss"}
_OWN |= {
    "importance_weight/effective_sample_share",
    "completions/mean_length",
    "completions/clipped_ratio",
    "data/padding_frac",
}


def checked(returned: Any, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """What the objective of this name returns: (loss_sum, metrics).

    Raises:
        UserError: when it is something else, or a metric that does not add up or has a name of ours.
    """
    what = f"{name}.__call__ gives"
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UserError(f"{what} {_shape(returned)}; expected (loss_sum, metrics), a scalar tensor and a dict")
    loss, sums = returned
    if not isinstance(loss, Tensor) or loss.dim():
        raise UserError(f"{what} a loss of {_shape(loss)}; expected a scalar tensor, the sum over the units")
    if not isinstance(sums, dict):
        raise UserError(f"{what} metrics of {_shape(sums)}; expected a dict, {{}} for none")
    for metric, value in sums.items():
        if not isinstance(value, Tensor) or value.shape != (2,):
            raise UserError(f"{what} the metric {metric} of {_shape(value)}; expected a tensor (2,), [sum, count]")
        if metric in _OWN or metric.endswith(("/min", "/max")):
            raise UserError(f"{what} the metric {metric}; this name is the trainer's: name it otherwise")
        if metric.endswith("/mean_square") and metric.removesuffix("_square") not in sums:
            raise UserError(
                f"{what} the metric {metric} without {metric.removesuffix('_square')}, which it is centred by"
            )
    return loss, sums


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"


def over_processes(sums: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Sums of all processes, also of names that only some have: an objective may leave a metric out where no response asks it."""
    kinds = {name: (value.shape, value.dtype) for name, value in sums.items()}
    everywhere = dict(sorted(gather_objects(list(kinds.items()), processes)))
    device = next((value.device for value in sums.values()), processes.device)
    missing = {
        n: torch.zeros(shape, dtype=dtype, device=device) for n, (shape, dtype) in everywhere.items() if n not in sums
    }
    return add_over_processes(sums | none_of(missing), processes)


def pair_counts(pair: float | list[float]) -> bool:
    return math.isfinite(pair) if isinstance(pair, float) else pair[1] > 0


class Weights(NamedTuple):
    """Of the importance weights w of n samples, responses or tokens. The effective share is (sum w)^2 / (n sum w^2): 1 where all
    are equal, 1/n where one is all there is, and 0 where all are 0."""

    effective_share: float
    mean: float

    @classmethod
    def of(cls, mean: float, mean_square: float) -> Weights:
        return cls(mean * mean / mean_square if mean_square > 0 else 0.0, mean)


_MEAN, _SQUARE, _SHARE = (f"importance_weight/{name}" for name in ("mean", "mean_square", "effective_sample_share"))


def of_step(sums: dict[str, Tensor], processes: Processes) -> tuple[dict[str, Tensor], Weights | None]:
    """A step's sums of this process, and what the importance weights of the whole step come to; None where the objective weighs
    nothing. Mean and effective share take the place of the moments, so that a row over several steps has the mean of their
    shares. All processes must call it."""
    moments = {name: sums[name] for name in (_MEAN, _SQUARE) if name in sums}
    if not moments:
        return sums, None
    totals = add_over_processes(moments, processes)
    mean, mean_square = ((totals[name][0] / totals[name][1]).item() for name in (_MEAN, _SQUARE))
    found = Weights.of(mean, mean_square)
    share = torch.tensor([found.effective_share, 1.0], device=sums[_MEAN].device)
    rest = {name: value for name, value in sums.items() if name not in moments}
    return rest | {_MEAN: moments[_MEAN].float(), _SHARE: share}, found


def finish(sums: dict[str, Tensor]) -> dict[str, float]:
    """Means; mean squares become standard deviations, the effective share of the importance weights, and the value model's
    explained variance 1 - Var(G - V) / Var(G)."""
    pairs = {name: value.tolist() for name, value in sums.items()}
    means = {
        name: pair if isinstance(pair, float) else pair[0] / pair[1]
        for name, pair in pairs.items()
        if pair_counts(pair)
    }
    if _SQUARE in means:
        means[_SHARE] = Weights.of(means[_MEAN], means.pop(_SQUARE)).effective_share
    variances = {}
    for square in [name for name in means if name.endswith("/mean_square")]:
        name = square.removesuffix("/mean_square")
        variances[name] = max(0.0, means.pop(square) - means[f"{name}/mean"] ** 2)  # below 0 by rounding alone
    if "advantages" in variances:
        means["advantages/std"] = variances["advantages"] ** 0.5
    means.pop("value_error/mean", None)
    if variances.get("returns", 0.0) > 0 and "value_error" in variances:
        means["value/explained_variance"] = 1.0 - variances["value_error"] / variances["returns"]
    if "rewards/chosen" in means and "rewards/rejected" in means and "rewards/margins" not in means:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


class MetricsFile:
    """metrics.jsonl: one object a line, append-only, cut back to a checkpoint's position on resume.

    Args:
        position, crc32: what the checkpoint says of the rows before it. When they are not there as they were, those that can be
            read are kept, and a warning says so: they decide nothing about the models.
    """

    def __init__(self, path: Path, position: int = 0, crc32: int | None = None):
        self.path = path
        with writing(path):
            path.touch()
        rows = path.read_bytes()[:position]
        lost = None
        if len(rows) < position:
            lost = "is shorter than the checkpoint says"
        elif (crc32 is not None and zlib.crc32(rows) != crc32) or len(_readable(rows)) < len(rows):
            lost = "was altered"
        if lost is not None:
            rows = _readable(rows)
            away = put_away(path)
            write_whole(path, rows)
            count = rows.count(b"\n")
            logger.warning("%s %s: rows of finished steps are lost, %d are left; it is now %s", path, lost, count, away)
        self.file = path.open("r+b", buffering=0)  # nothing is left in a buffer when the disk is full
        self.file.truncate(len(rows))
        self.file.seek(len(rows))
        self.crc32 = zlib.crc32(rows)  # of all rows

    def write(self, row: dict) -> None:
        line = (json.dumps(row) + "\n").encode()
        self.crc32 = zlib.crc32(line, self.crc32)
        with writing(self.path):
            while line:
                line = line[self.file.write(line) :]

    def position(self) -> int:
        """Where the next row begins; every row before it is on the disk, because a checkpoint will rely on it."""
        with writing(self.path):
            os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _readable(rows: bytes) -> bytes:
    return b"".join(line for line in rows.splitlines(keepends=True) if line.endswith(b"\n") and _row(line) is not None)


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl.

    Raises:
        UserError: for a line that is none.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = _row(line)
        if row is None:
            raise UserError(f"{path}:{number}: not a row of metrics; the file was altered")
        rows.append(row)
    return rows


def rows_until(path: Path, position: int) -> list[dict]:
    """The rows of metrics.jsonl before a checkpoint's position."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [json.loads(line) for line in file.read(position).splitlines()]


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as metrics.jsonl holds it: callbacks may have added tensors or numpy numbers.

    Raises:
        UserError: for what is neither a number nor a string.
    """
    found = {}
    for name, value in row.items():
        if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
            value = value.item()
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise UserError(f"a callback logged {name!r} as a {type(value).__name__}; expected one number or a string")
        found[name] = value
    return found


def computed(found: Any) -> dict[str, float]:
    """What a caller's compute_metrics returned, as numbers under names that begin with eval_.

    Raises:
        UserError: for anything but numbers by name.
    """
    if not isinstance(found, Mapping):
        raise UserError(f"compute_metrics returned a {type(found).__name__}; expected a dict of numbers by name")
    numbers: dict[str, Any] = {}
    for name, value in found.items():
        number = value.item() if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1 else value
        if not isinstance(name, str) or not isinstance(number, Real):
            kind = type(value).__name__
            raise UserError(f"compute_metrics returned {name!r} as a {kind}; expected numbers by name")
        numbers[name if name.startswith("eval_") else f"eval_{name}"] = number
    return numbers


def on_the_bar(row: dict[str, float]) -> str:
    """What the progress bar shows: the loss, what the weights leave of the data, and whether the value model learns anything."""
    shown = f"loss {row['loss']:.4g}"
    if _SHARE in row:
        shown += f", mean weight {row[_MEAN]:.2g}, {row[_SHARE]:.0%} effective"
    if "value/explained_variance" in row:
        shown += f", value explains {row['value/explained_variance']:.0%}"
    return shown
