"""Argument checks of the public functions: each names the argument, what came and what was expected."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor


def fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def tensor(name: str, value: object, shape: tuple[int, ...], like: Tensor, meaning: str = "") -> None:
    """A floating tensor of `shape` on the device of `like`."""
    floating(name, value)
    if tuple(value.shape) != tuple(shape):
        fail(name, f"shape {tuple(shape)}{meaning and f' {meaning}'}", f"shape {tuple(value.shape)}")
    if value.device != like.device:
        fail(name, f"device {like.device}", f"device {value.device}")


def whole(name: str, value: object) -> None:
    """A tensor that is all here: a sharded one would be used as if its shard were everything."""
    if not isinstance(value, Tensor):
        fail(name, "a tensor", type(value).__name__)
    sharding = sys.modules.get("torch.distributed.tensor")  # without it nobody can have made one
    if sharding is not None and isinstance(value, sharding.DTensor):
        cure = "give dqo_kernels.gather_weight(it), gathered once a step; or its .to_local() rows of V, with group="
        fail(name, "a plain tensor", f"a DTensor placed as {value.placements}; {cure}")


def floating(name: str, value: object) -> None:
    whole(name, value)
    if not value.dtype.is_floating_point:
        fail(name, "a floating dtype", str(value.dtype))


def integers(name: str, value: object, shape: tuple[int, ...], like: Tensor) -> None:
    whole(name, value)
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        fail(name, "an integer dtype", str(value.dtype))
    if tuple(value.shape) != tuple(shape):
        fail(name, f"shape {tuple(shape)}", f"shape {tuple(value.shape)}")
    if value.device != like.device:
        fail(name, f"device {like.device}", f"device {value.device}")


def reads_values(like: Tensor) -> bool:
    """Value checks need the values on the host: always on the CPU, on other devices only when asked for. A compiled
    function has none of them: what would have been refused gives NaN there."""
    if torch.compiler.is_compiling():
        return False
    return like.device.type == "cpu" or os.environ.get("DQO_KERNELS_CHECK") == "1"


def actions(value: object, shape: tuple[int, ...], vocab: int, like: Tensor, mask: Tensor | None = None) -> None:
    """Token ids in [0, vocab); those under a False of `mask` (of the same shape) may be anything."""
    integers("actions", value, shape, like)
    if reads_values(like) and value.numel():
        counted = value if mask is None else torch.where(mask, value, 0)
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= vocab:
            fail("actions", f"token ids in [0, {vocab})", f"ids from {low} to {high}")


def cu_seqlens(value: object, n: int, like: Tensor) -> None:
    """Boundaries (B+1,) of N rows, on the device of `like`."""
    boundaries("cu_seqlens", value, "(B+1,)", n, "N", reads_values(like))
    integers("cu_seqlens", value, tuple(value.shape), like)


def boundaries(name: str, value: object, shape: str, end: int, end_name: str, read: bool = True) -> None:
    """Integers that start at 0, never decrease and stop at `end`; values are checked only with `read`."""
    if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() < 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        fail(name, f"an integer tensor of shape {shape}", got)
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        fail(name, "an integer dtype", str(value.dtype))
    if not read:
        return
    if int(value[0]) != 0 or int(value[-1]) != end:
        fail(name, f"to start at 0 and end at {end_name} = {end}", f"{int(value[0])} and {int(value[-1])}")
    if bool((value[1:] < value[:-1]).any()):
        fail(name, "values that never decrease", value.tolist())


def seqlens(value: Sequence[int], cu_seqlens: Tensor, n: int) -> None:
    """The lengths of the sequences on the host."""
    if isinstance(value, Tensor) or not all(isinstance(length, int) for length in value):
        fail("seqlens", "B host integers", type(value).__name__)
    if len(value) != cu_seqlens.numel() - 1 or sum(value) != n or min(value, default=0) < 0:
        fail("seqlens", f"{cu_seqlens.numel() - 1} lengths that add up to N = {n}", f"{len(value)}, sum {sum(value)}")
    if reads_values(cu_seqlens) and cu_seqlens.diff().tolist() != list(value):
        fail("seqlens", "the differences of cu_seqlens", list(value))


def unit_interval(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        fail(name, "a number in [0, 1]", value)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        fail(name, f"one of {', '.join(allowed)}", repr(value))


def temperature(value: float | Tensor, shape: tuple[int, ...], like: Tensor, mask: Tensor | None = None) -> None:
    """A positive number, or one a row (of `shape`); those under a False of `mask` may be anything."""
    if isinstance(value, Tensor):
        if value.dim():
            tensor("temperature", value, shape, like, "(one a row) or a number")
        if reads_values(like) and value.numel():
            counted = torch.where(mask, value, 1.0) if mask is not None and value.dim() else value
            if not bool((counted > 0).all()):
                fail("temperature", "positive values", f"a minimum of {float(counted.min())}")
    elif not value > 0:
        fail("temperature", "a positive number", value)


LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def logits(name: str, value: object) -> None:
    """A tensor of a dtype that the row kernels read."""
    floating(name, value)
    if value.dtype not in LOGITS_DTYPES:
        fail(name, "torch.float32, torch.bfloat16, torch.float16 or torch.float64", str(value.dtype))


def softcap(value: float | None) -> None:
    if value is not None and not value > 0:
        fail("softcap", "a positive number or None", value)
