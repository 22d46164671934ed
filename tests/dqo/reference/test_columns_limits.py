"""A reference pass within the memory, the time and the disk that there is."""

import numpy as np
import pytest

from dqo.data.batches import Batching
from dqo.errors import UserError
from dqo.reference import columns as reference
from dqo.reference.cache import ReferenceCache
from dqo.reference.columns import check_agreement
from tests.dqo.reference.passes import Counting, add, columns, fresh


class Limited(Counting):
    """Memory runs out where a batch has more positions."""

    def __init__(self, positions):
        super().__init__()
        self.positions = positions

    def __call__(self, batch):
        if batch.positions > self.positions:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return super().__call__(batch)


def test_a_pass_that_runs_out_of_memory_goes_on_in_smaller_batches(cache, caplog):
    members, plain, forward = fresh(), fresh(), Limited(16)
    assert add(members, forward, cache) == 20 == add(plain, Counting())
    assert sorted(forward.responses) == sorted(e.source for e in plain)  # each once
    assert all(
        np.allclose(a, b, atol=1e-6) for one, other in zip(columns(members), columns(plain)) for a, b in zip(one, other)
    )
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("reference pass: out of memory on cpu") and "up to 40 tokens. It was done again" in said
    again = Counting()
    assert add(fresh(), again, cache) == 0 and not again.batches


def test_a_response_that_does_not_fit_alone_ends_the_pass_and_keeps_the_finished_ones(cache):
    members = fresh()
    shortest = sorted(e.length for e in members)[4]
    with pytest.raises(UserError, match=r"^reference pass: out of memory on cpu .*although each holds one response"):
        add(members, Limited(shortest), cache)
    forward, tight = Counting(), fresh()
    assert add(sorted(tight, key=lambda e: e.length)[:3], Limited(shortest), cache) == 3
    assert add(tight, forward, cache) == 17


def test_the_check_of_the_reference_goes_on_in_smaller_batches(caplog):
    members = fresh()
    add(members, Counting())
    forward = Limited(30)
    check_agreement(members, forward, Batching(0, 10**6))
    assert len(forward.responses) == 20 and "check of the reference: out of memory on cpu" in caplog.text
    with pytest.raises(UserError, match="although each holds one response"):
        check_agreement(members, Limited(2), Batching(0, 10**6))


def test_tokens_and_cache_are_said_before_a_pass_and_its_size_is_true(cache, capsys):
    members = fresh()
    add(members, Counting(), cache)
    tokens, responses = sum(e.length for e in members), [len(e.completion_ids) for e in members]
    size = ReferenceCache.size(responses)
    assert (
        f"reference pass: 20 responses, {tokens:,} tokens, {size / 1000:.3g} KB of cache\n" in capsys.readouterr().out
    )
    stored = [path.stat().st_size for path in cache.directory.glob("segment-*")]
    assert size <= sum(stored) <= size + 400 * len(stored)
    add(fresh(), Counting(), cache)
    assert capsys.readouterr().out == ""  # nothing is left to compute


def test_the_time_of_a_pass_is_said_once_after_its_first_batches(monkeypatch, capsys):
    now = [0.0]

    class Slow(Counting):
        def __call__(self, batch):
            now[0] += 4.0 * batch.tokens  # seconds: a quarter of a token in each
            return super().__call__(batch)

    monkeypatch.setattr(reference.time, "monotonic", lambda: now[0])
    members = fresh()
    forward = Slow()
    add(members, forward)
    first = sum(e.length for e in members if e.source in forward.batches[0])
    left = 4.0 * (sum(e.length for e in members) - first)
    said = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert said == [f"reference pass: 0 tokens/s, about {left / 60:.0f} minutes left"]


def test_a_disk_without_room_for_the_cache_is_refused_before_the_pass(cache, monkeypatch):
    import shutil

    usage = shutil.disk_usage(cache.directory)._replace(free=900)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    forward = Counting()
    with pytest.raises(UserError) as caught:
        add(fresh(), forward, cache)
    size = ReferenceCache.size([len(e.completion_ids) for e in fresh()])
    assert str(caught.value) == (
        f"{cache.directory}: the reference's log-probabilities need {size / 1000:.3g} KB, and the disk has 900 bytes left; free "
        "some, or choose another --ref_cache_dir"
    )
    assert not forward.batches
