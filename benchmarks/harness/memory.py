"""How much memory a call takes beyond what was there before it (its results included)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Extra(NamedTuple):
    """Bytes."""

    peak: int
    kept: int  # still there at the end, while the results live; negative when the call freed what was saved for it


def extra_memory(run: Callable, device: torch.device) -> tuple[Extra | None, object]:
    """Of one call, and what the call returned.

    On a GPU the caching allocator's own peak. On the CPU the running sum of the allocations and frees that torch's allocator
    reports: exact to the byte, and blind to what C++ takes with malloc by itself (our `cpp` kernels: a few kilobytes a thread).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return Extra(peak - before, after - before), result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    return _from_events(profiler), result


def _from_events(profiler: profile) -> Extra | None:
    try:  # the public events() leaves out what happens inside operators
        events = profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    except AttributeError:  # a torch that keeps its events elsewhere
        return None
    now = top = 0
    for _, _, change in changes:
        now += change
        top = max(top, now)
    return Extra(top, now)
