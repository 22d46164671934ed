"""Argument checks of the public functions: each names the argument, what came and what was expected."""

from __future__ import annotations

import os

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


def floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        fail(name, "a tensor", type(value).__name__)
    if not value.dtype.is_floating_point:
        fail(name, "a floating dtype", str(value.dtype))


def integers(name: str, value: object, shape: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(value, Tensor):
        fail(name, "a tensor", type(value).__name__)
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        fail(name, "an integer dtype", str(value.dtype))
    if tuple(value.shape) != tuple(shape):
        fail(name, f"shape {tuple(shape)}", f"shape {tuple(value.shape)}")
    if value.device != like.device:
        fail(name, f"device {like.device}", f"device {value.device}")


def reads_values(like: Tensor) -> bool:
    """Value checks need the values on the host: always on the CPU, on other devices only when asked for."""
    return like.device.type == "cpu" or os.environ.get("DQO_KERNELS_CHECK") == "1"


def actions(value: object, shape: tuple[int, ...], vocab: int, like: Tensor) -> None:
    integers("actions", value, shape, like)
    if reads_values(like) and value.numel():
        low, high = int(value.min()), int(value.max())
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


def unit_interval(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        fail(name, "a number in [0, 1]", value)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        fail(name, f"one of {', '.join(allowed)}", repr(value))


def temperature(value: float | Tensor, n: int, like: Tensor) -> None:
    """A positive number, or one a row."""
    if isinstance(value, Tensor):
        if value.dim():
            tensor("temperature", value, (n,), like, "(one a row) or a number")
        if reads_values(like) and value.numel() and not bool((value > 0).all()):
            fail("temperature", "positive values", f"a minimum of {float(value.min())}")
    elif not value > 0:
        fail("temperature", "a positive number", value)


def softcap(value: float | None) -> None:
    if value is not None and not value > 0:
        fail("softcap", "a positive number or None", value)
