"""Measures the candidates of one case side by side: time, bytes, memory, and first of all whether the result is right.

A case is an operation at one shape. Its candidates (our backends, eager torch, torch.compile, peers) are run in turn, one
round each, so that a machine that slows down slows all of them; medians are reported. Nothing waits in between, as in training:
threads of our own meet those of torch while they still spin after their last loop. A ceiling that the others are given a
share of runs along (units.py). Where bytes are counted that is a plain copy as large as the largest input (64 MiB at least,
1 GiB on a GPU) into a buffer written to before, at the bytes it reads plus those it writes; where FLOPs are, a candidate.

Modes: "forward" without autograd; "backward" the gradient alone; "both" a forward that records and its gradient. An operation
leaves out "backward" where some make the gradient in the forward.
On a GPU also "forward, graph" and "both, graph": replays of a captured CUDA graph, the device time without Python.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import gpu_clock
from benchmarks.harness.memory import extra_memory
from benchmarks.harness.units import BYTES, COPY, Unit

COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}  # at least: far more than any cache
MAX_ROUNDS = 500
FAILED = "failed"  # how the reason begins that is a defect: a wrong result, an error


class Phases(NamedTuple):
    """One candidate on one case's inputs. Both return tensors by name; names that are not expected go unchecked."""

    forward: Callable[[], dict[str, Tensor]]
    backward: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


class Candidate(NamedTuple):
    name: str
    computes: str  # which part of what we compute, for a fair reading of the table
    build: Callable[[Any], Phases]  # from the case's inputs
    unavailable: Callable[[Case, str], str | None] = lambda case, device_type: None  # the reason
    backend: str | None = None  # of dqo_kernels; None for a peer
    devices: tuple[str, ...] = ("cpu", "cuda")
    profiled: bool = True  # False: its memory is not looked at (a loop makes too many events)
    captured: bool = True  # False: it waits for the device, which no CUDA graph can
    suits: Callable[[Case], bool] = lambda case: True  # False: the case is not for it, and it is not listed


@dataclass(frozen=True)
class Case:
    shape: str
    dims: tuple
    dtype: torch.dtype = torch.float32
    variant: str = ""
    graph: bool = False  # so small that launches matter: on a GPU captured graphs are timed too

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return "-".join(filter(None, (self.shape, self.dtype_name, self.variant)))


@dataclass
class Operation:
    name: str
    cases: Callable[[str, str], list[Case]]  # of (device type, size)
    inputs: Callable[[Case, torch.device], Any]  # a namespace
    candidates: list[Candidate]  # one is "reference"
    formulas: dict[
        str, tuple[str, Callable[[Case], int]]
    ]  # "mode" or "mode variant": the work of one call, as text and as a number of `unit`
    dispatched: tuple[str, ...] = ()  # the entries of dispatch.TABLE that it uses; its own name when empty
    tolerance: Callable[[Case], float] = lambda case: 1e-4  # of the relative error (norms)
    rough: dict[str, float] = field(default_factory=dict)  # candidate: a tolerance of its own in 16 bits
    unit: Unit = BYTES
    modes: tuple[str, ...] = ("forward", "backward", "both")

    def __post_init__(self):
        self.dispatched = self.dispatched or (self.name,)

    def work(self, case: Case, mode: str) -> tuple[str, int]:
        mode = mode.removesuffix(gpu_clock.GRAPH)
        text, count = self.formulas.get(f"{mode} {case.variant}") or self.formulas[mode]
        return text, count(case)


class WrongResult(Exception):
    pass


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


class Budget(NamedTuple):
    min_rounds: int = 5
    max_time: float = 1.0  # seconds of each candidate

    def has_round(self, rounds: int, spent: float) -> bool:
        """Slow candidates get three rounds, whatever the minimum: they spread least."""
        return rounds < 3 or spent < self.max_time or (rounds < self.min_rounds and spent < 3 * self.max_time)


def modes(operation: Operation, case: Case, device_type: str) -> list[str]:
    graphs = [mode + gpu_clock.GRAPH for mode in ("forward", "both")] if case.graph and device_type == "cuda" else []
    return [*operation.modes, *graphs]


def differentiated(forward: Callable, wrt: dict[str, Tensor], cotangents: dict[str, Tensor]) -> Phases:
    """Phases of an autograd function: the gradient of the sum over fields of <field, cotangent>."""

    def backward(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        fields = [outputs[name] for name in cotangents]
        arriving = [cotangents[name].to(f.dtype) for name, f in zip(cotangents, fields)]
        grads = torch.autograd.grad(fields, list(wrt.values()), arriving)
        return {f"grad_{name}": grad for name, grad in zip(wrt, grads)}

    return Phases(forward, backward)


def measure(
    operation: Operation, case: Case, device: torch.device, wanted: Collection[str], budget: Budget
) -> dict[str, dict[str, dict] | str]:
    """{candidate: {mode: record}, or the reason why it cannot run}. A record holds "seconds", the list."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # a case is compiled afresh: the many shapes would run into the limit on recompilations
    inputs = operation.inputs(case, device)
    unit, running = operation.unit, {}
    if unit.ceiling == COPY:
        copied = max(COPY_BYTES[device.type], *(t.nbytes for t in vars(inputs).values() if isinstance(t, Tensor)))
        running[COPY] = (_copy(copied, device), {"computes": f"copies {copied / 2**20:.0f} MiB"})
    prepared, results = _prepared(operation, case, inputs, {*wanted, unit.ceiling}, device)
    running |= prepared
    seconds = _interleaved({name: phases for name, (phases, _) in running.items()}, device, budget)
    if case.graph and device.type == "cuda":
        for name, (phases, facts) in running.items():
            if facts.get("captured"):
                gpu_clock.add_graph_times(phases, seconds[name], facts)
    for name, (_, facts) in running.items():
        results[name] = {}
        for mode in modes(operation, case, device.type):
            if mode in seconds[name]:
                work = ("read and write of the copy", 2 * copied) if name == COPY else operation.work(case, mode)
                results[name][mode] = _record(unit, mode, seconds[name][mode], *work, facts)
    _add_shares(unit, results)
    return results


def _prepared(operation: Operation, case: Case, inputs, wanted: Collection[str], device: torch.device):
    """{candidate: (phases, facts)} of those that run and are right, {candidate: reason} of the others."""
    expected = _expected(operation, inputs)
    running, reasons = {}, {}
    for candidate in operation.candidates:
        if candidate.name not in wanted:
            continue
        if reason := candidate.unavailable(case, device.type):
            reasons[candidate.name] = reason
            continue
        tolerance = operation.tolerance(case)
        if case.dtype.itemsize == 2:
            tolerance = operation.rough.get(candidate.name, tolerance)
        try:
            running[candidate.name] = _prepare(candidate, inputs, expected, tolerance, device)
        except (torch.OutOfMemoryError, NotImplementedError) as error:
            reasons[candidate.name] = f"{type(error).__name__}: {_first_line(error)}"
        except Exception as error:  # a peer's break must not take the others' figures with it
            reasons[candidate.name] = f"{FAILED}: {type(error).__name__}: {_first_line(error)}"
    return running, reasons


def _copy(count: int, device: torch.device) -> Phases:
    source = torch.ones(count // 4, device=device)
    target = torch.zeros_like(source)
    return Phases(lambda: {COPY: target.copy_(source)})


def _expected(operation: Operation, inputs: Any) -> dict[str, Tensor]:
    """What the reference backend gives, once a case and not timed."""
    reference = next(c for c in operation.candidates if c.name == "reference").build(inputs)
    outputs = reference.forward()
    gradients = {} if reference.backward is None else reference.backward(outputs)
    return {name: tensor.detach() for name, tensor in (outputs | gradients).items()}


def _prepare(candidate: Candidate, inputs, expected, tolerance: float, device: torch.device) -> tuple[Phases, dict]:
    """Builds it, checks its first results (here a compiled candidate compiles), and takes its memory on a second run."""
    phases = candidate.build(inputs)
    start = time.perf_counter()
    with torch.no_grad():
        _check(phases.forward(), expected, tolerance)
    if phases.backward is not None:
        _check(phases.backward(phases.forward()), expected, tolerance)
    facts = {"computes": candidate.computes, "backend": candidate.backend}
    facts["first_runs_seconds"] = round(time.perf_counter() - start, 3)
    facts["captured"] = candidate.captured and candidate.profiled  # the graph of a loop would have a node a step
    if candidate.profiled:
        facts["memory"] = _memory(phases, device)
    return phases, facts


def _memory(phases: Phases, device: torch.device) -> dict[str, int]:
    """{mode: bytes at the peak}."""
    with torch.no_grad():
        extra, _ = extra_memory(phases.forward, device)
    if extra is None:
        return {}
    peaks = {"forward": extra.peak}
    if phases.backward is not None:
        recorded, outputs = extra_memory(phases.forward, device)
        backward, _ = extra_memory(lambda: phases.backward(outputs), device)
        peaks["backward"] = backward.peak
        peaks["both"] = max(recorded.peak, recorded.kept + backward.peak)
    return peaks


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """A benchmark of a wrong result measures nothing."""
    for name in found.keys() & expected.keys():
        theirs, ours = found[name].detach().float(), expected[name].float()
        error = float((theirs - ours).norm() / ours.norm().clamp(min=1e-30))
        if not error <= tolerance:
            raise WrongResult(f"{name} has a relative error of {error:.1e}, above {tolerance:.0e}")


def _interleaved(running: dict[str, Phases], device: torch.device, budget: Budget) -> dict[str, dict[str, list[float]]]:
    """{candidate: {mode: seconds of each round}}. Every round runs each candidate that still has time, in an order of its own."""
    timed = gpu_clock.timed_round if device.type == "cuda" else _timed_round
    names, seconds, order = list(running), {name: {} for name in running}, random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(MAX_ROUNDS):
            active = [n for n in names if budget.has_round(r, _spent(seconds[n]))]
            if not active:
                break
            order.shuffle(active)  # who runs before decides which threads still spin and what is in cache
            for name in active:
                for mode, duration in timed(running[name]).items():
                    seconds[name].setdefault(mode, []).append(duration)
    finally:
        if collecting:
            gc.enable()
    return seconds


def _spent(seconds: dict[str, list[float]]) -> float:
    return sum(sum(seconds.get(mode, ())) for mode in ("forward", "both"))


def _timed_round(phases: Phases) -> dict[str, float]:
    clock = time.perf_counter
    with torch.no_grad():
        start = clock()
        outputs = phases.forward()
        forward = clock() - start
    if phases.backward is None:
        return {"forward": forward}
    del outputs
    start = clock()
    outputs = phases.forward()
    middle = clock()
    phases.backward(outputs)
    end = clock()
    return {"forward": forward, "backward": end - middle, "both": end - start}


def _record(unit: Unit, mode: str, times: list[float], formula: str, count: int, facts: dict) -> dict:
    return {
        "mode": mode,
        "computes": facts["computes"],
        "backend": facts.get("backend"),
        "first_runs_seconds": facts.get("first_runs_seconds"),
        unit.count: count,
        f"{unit.count}_formula": formula,
        unit.rate: count / statistics.median(times) / unit.scale,
        "peak_extra_bytes": facts.get("memory", {}).get(mode),
        "note": facts.get("note"),
        "seconds": times,
    }


def _add_shares(unit: Unit, results: dict[str, dict[str, dict] | str]) -> None:
    """Each mode's share of the ceiling's rate in that mode; a copy has one mode, for all."""
    ceiling = results.get(unit.ceiling)
    if not isinstance(ceiling, dict):  # there is none, or it could not run
        return
    for found in results.values():
        for mode, record in found.items() if isinstance(found, dict) else ():
            record[unit.ceiling_rate] = ceiling.get(mode, ceiling["forward"])[unit.rate]
            record[unit.share] = record[unit.rate] / record[unit.ceiling_rate]
