"""The harness's clock on a GPU: CUDA events, the L2 cache flushed before each run, and replays of captured graphs."""

from __future__ import annotations

import functools

import torch

GRAPH = ", graph"  # how the names of the modes end whose time is that of a captured graph
NO_GRAPH = "no graph"  # how the note of a candidate begins whose graph cannot be captured
FLUSH_BYTES = 2**28  # more than any L2
FLUSHES = 16  # an H200 is done with one in 0.07 ms, a call of Python takes half a millisecond
REPLAYS = 20


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def _flush_l2() -> None:
    """Evicts what the last run left, for as long as Python needs to enqueue what is timed."""
    for _ in range(FLUSHES):
        _flush_buffer().zero_()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def timed_round(phases) -> dict[str, float]:
    """Seconds by mode, of calls as in training: the device has other work while Python launches. What Python needs beyond that
    counts."""
    _flush_l2()
    with torch.no_grad():
        start = _event()
        outputs = phases.forward()
        end = _event()
    events = {"forward": (start, end)}
    if phases.backward is not None:
        del outputs
        _flush_l2()
        start = _event()
        outputs = phases.forward()
        middle = _event()
        phases.backward(outputs)
        end = _event()
        events |= {"backward": (middle, end), "both": (start, end)}
    torch.cuda.synchronize()
    return {mode: start.elapsed_time(end) / 1e3 for mode, (start, end) in events.items()}


def add_graph_times(phases, seconds: dict[str, list[float]], facts: dict) -> None:
    """Adds the modes "forward, graph" and "both, graph", or a note why a graph cannot be captured. After such a failure torch's
    generator of the device gives no numbers in this process ("Offset increment outside graph capture", torch 2.11).

    Replays follow each other, so small inputs come from the L2 cache: the device time of a step, not of a cold call.
    """

    def both():
        phases.backward(phases.forward())

    runs = {"forward": phases.forward} if phases.backward is None else {"forward": phases.forward, "both": both}
    for mode, run in runs.items():
        try:
            with torch.set_grad_enabled(mode == "both"):
                seconds[mode + GRAPH] = _replayed(run)
        except RuntimeError as error:  # it synchronises, or allocates in a way that capture refuses
            facts["note"] = f"{NO_GRAPH}: {str(error).splitlines()[0][:120]}"
            return


def _replayed(run, rounds: int = 15) -> list[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up where capture will happen
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(rounds):
        start = _event()
        for _ in range(REPLAYS):
            graph.replay()
        end = _event()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / REPLAYS)
    return times
