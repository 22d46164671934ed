"""Argument checks of the public functions: each names the argument, what came and what was expected."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

# Positive options outside of these have no use, and float32 and float64 part there: beta*beta or 1/temperature would be 0 or inf.
SMALLEST, LARGEST = 1e-6, 1e6
POSITIVE = f"a positive number in [{SMALLEST:g}, {LARGEST:g}]"  # compilers do not format floats
FACTOR = f"a number in [{-LARGEST:g}, {LARGEST:g}]"
INDEX_DTYPES = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
IGNORED_LABEL = -100  # of torch's cross_entropy and of transformers' labels


def fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str = "") -> None:
    """`expected`, or an error; with the cure where the same entries have other dimensions."""
    got, expected = tuple(value.shape), tuple(expected)
    if got == expected:
        return
    cure = f"; reshape it to {expected}" if math.prod(got) == math.prod(expected) and len(got) != len(expected) else ""
    fail(name, f"shape {expected}{meaning and f' {meaning}'}", f"shape {got}{cure}")


def rows_only(name: str, value: Tensor, expected: str, dimensions: int) -> None:
    """A tensor of packed rows; padded ones are told how they become packed."""
    if value.dim() == dimensions:
        return
    cure = ""
    if value.dim() == dimensions + 1:
        cure = "; flatten its first two dimensions and those of every other argument, with a boundary every T rows"
        cure += " (cu_seqlens = torch.arange(B + 1) * T), or take the rows of your mask: x[mask]"
    fail(name, f"shape {expected}", f"shape {tuple(value.shape)}{cure}")


def tensor(name: str, value: object, expected: tuple[int, ...], like: Tensor, meaning: str = "") -> None:
    """A floating tensor of a shape on the device of `like`."""
    found = floating(name, value)
    shape(name, found, expected, meaning)
    same_device(name, found, like)


def same_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        fail(name, f"device {like.device}", f"device {value.device}")


def whole(name: str, value: object) -> Tensor:
    """`value`, if it is a tensor whose numbers are all here, one after another in memory. Kernels would read another layout as
    numbers that it does not have, and would end the process at memory that was given back."""
    if not isinstance(value, Tensor):
        fail(name, "a tensor", type(value).__name__)
    sharding = sys.modules.get("torch.distributed.tensor")  # without it nobody can have made one
    if sharding is not None and isinstance(value, sharding.DTensor):
        cure = "give dqo_kernels.gather_weight(it), gathered once a step; or its .to_local() rows of V, with group="
        fail(name, "a plain tensor", f"a DTensor placed as {value.placements}; {cure}")
    if torch.compiler.is_compiling():
        return value
    if value.is_nested:
        fail(name, "a dense tensor", "a nested one; pack it (its .values(), with cu_seqlens) or pad it (with mask)")
    if value.is_quantized:
        fail(name, "a dense tensor", "a quantized one; give its .dequantize()")
    if value.layout != torch.strided:
        fail(name, "a dense tensor", f"one of layout {value.layout}; give its .to_dense()")
    stored(name, value)
    return value


def stored(name: str, value: Tensor) -> None:
    """Refuses a tensor whose storage no longer holds its numbers: torch's own operations would end the process."""
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__ or torch._C._are_functorch_transforms_active():
        return  # what stands for a tensor keeps its numbers elsewhere
    try:
        held = value.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # it has none
        return
    span = value.numel()
    if span and not value.is_contiguous():
        span = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride()))
    if span and held < (value.storage_offset() + span) * value.element_size():
        got = f"one whose storage has {held} bytes for shape {tuple(value.shape)} of {value.dtype}"
        fail(name, "a tensor with its numbers in memory", f"{got}: it was freed or resized")


def floating(name: str, value: object) -> Tensor:
    """`value`, if it is a tensor of a floating dtype."""
    found = whole(name, value)
    if not found.dtype.is_floating_point:
        fail(name, "a floating dtype", str(found.dtype))
    return found


def index(name: str, value: object) -> Tensor:
    """`value`, if it is a tensor of integers of any width, signed or not."""
    found = whole(name, value)
    if found.dtype not in INDEX_DTYPES:
        fail(name, "an integer dtype", str(found.dtype))
    return found


def owned(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a dtype, in a row; on the CPU a copy, because numpy may write into the caller's memory before the backward reads it."""
    copy = value.device.type == "cpu" and not torch.compiler.is_compiling()
    return value.to(dtype, copy=copy).contiguous()


def owned_index(value: Tensor) -> Tensor:
    return owned(value, torch.int64)


def reads_values(like: Tensor) -> bool:
    """Value checks need the values on the host: always on the CPU, on other devices only when asked for. A compiled
    function has none of them: what would have been refused gives NaN there."""
    if torch.compiler.is_compiling() or isinstance(like, torch._subclasses.FakeTensor):
        return False
    return like.device.type == "cpu" or os.environ.get("DQO_KERNELS_CHECK") == "1"


def actions(value: object, expected: tuple[int, ...], vocab: int, like: Tensor, mask: Tensor | None = None) -> None:
    """Token ids in [0, vocab); those under a False of `mask` (of the same shape) may be anything."""
    ids = index("actions", value)
    shape("actions", ids, expected)
    same_device("actions", ids, like)
    if reads_values(like) and ids.numel():
        ids = ids.long()
        counted = ids if mask is None else torch.where(mask, ids, 0)
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= vocab:
            cure = ""
            if bool((counted == IGNORED_LABEL).any()):
                cure = f"; {IGNORED_LABEL} marks rows to ignore elsewhere: here mask= does in a padded call,"
                cure += " and a packed call leaves such rows out"
            fail("actions", f"token ids in [0, {vocab})", f"ids from {low} to {high}{cure}")


def cu_seqlens(value: object, n: int, like: Tensor) -> None:
    """Boundaries (B+1,) of N rows, on the device of `like`."""
    boundaries("cu_seqlens", value, "(B+1,)", n, "N", like)


def boundaries(name: str, value: object, expected: str, end: int, end_name: str, like: Tensor | None = None) -> None:
    """Integers that start at 0, never decrease and stop at `end`, on the device of `like` if it is given."""
    if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() < 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        fail(name, f"an integer tensor of shape {expected}", got)
    index(name, value)
    if like is not None:
        same_device(name, value, like)
    if not reads_values(value if like is None else like):
        return
    value = value.long()
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


def in_range(name: str, value: Any, low: float, high: float, expected: str) -> None:
    """A number in [low, high]. A tensor is none: its gradient would be lost."""
    if not torch.compiler.is_compiling() and (not isinstance(value, Real) or isinstance(value, bool)):
        fail(name, expected, f"{value!r} of type {type(value).__name__}"[:200])
    if not low <= value <= high:
        fail(name, expected, value)


def unit_interval(name: str, value: float) -> None:
    in_range(name, value, 0.0, 1.0, "a number in [0, 1]")


def positive(name: str, value: float, alternative: str = "") -> None:
    in_range(name, value, SMALLEST, LARGEST, POSITIVE + alternative)


def factor(name: str, value: float) -> None:
    in_range(name, value, -LARGEST, LARGEST, FACTOR)


def log_bound(name: str, value: Any, none: float) -> None:
    """A bound of a log-weight, or no bound: None, or the infinity that `none` is."""
    if value is not None and not (isinstance(value, Real) and value == none):
        in_range(name, value, -1e4, 1e4, "None or a number in [-10000, 10000], the logarithm of a weight")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        fail(name, f"one of {', '.join(allowed)}", repr(value))


def temperature(value: float | Tensor, expected: tuple[int, ...], like: Tensor, mask: Tensor | None = None) -> None:
    """A positive number, or one a row (of a shape); those under a False of `mask` may be anything."""
    if not isinstance(value, Tensor):
        return positive("temperature", value)
    floating("temperature", value)
    if value.dim():
        shape("temperature", value, expected, "(one a row) or a number")
        same_device("temperature", value, like)
    if reads_values(like) and value.numel():
        counted = torch.where(mask, value, 1.0) if mask is not None and value.dim() else value
        wrong = ~((counted >= SMALLEST) & (counted <= LARGEST))
        if bool(wrong.any()):
            positive("temperature", float(counted[wrong][0]))


LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def logits(name: str, value: object) -> Tensor:
    """`value`, if it is a tensor of a dtype that the row kernels read."""
    found = floating(name, value)
    if found.dtype not in LOGITS_DTYPES:
        fail(name, "torch.float32, torch.bfloat16, torch.float16 or torch.float64", str(found.dtype))
    return found


def softcap(value: float | None) -> None:
    if value is not None:
        positive("softcap", value, " or None")
