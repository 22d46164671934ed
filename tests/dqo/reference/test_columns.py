"""The reference's numbers: computed once, kept, shared between ranks, gone on with after a kill, checked against the policy."""

import dataclasses
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from dqo.data.batches import Batching, collate
from dqo.errors import UserError
from dqo.models.policy import policy_stats
from dqo.reference import columns as reference
from dqo.reference.cache import ReferenceCache
from dqo.reference.columns import AGREEMENT_BOUNDS, check_agreement
from tests.dqo import forked
from tests.dqo.helpers import policy
from tests.dqo.reference.passes import IDENTITY, PER_BATCH, Counting, add, columns, fresh, same
from tests.dqo.together import launched


def test_every_episode_gets_its_own_log_probabilities_whatever_the_batch():
    members = fresh()
    assert add(members, Counting()) == 20
    for e in members:
        stats = policy_stats(policy(), collate([e], 0))
        assert np.allclose(e.ref_logprobs, stats.logprobs.detach(), atol=1e-6)
        assert np.allclose(e.ref_lse, stats.lse.detach(), atol=1e-5)
        assert e.ref_logprobs.dtype == e.ref_lse.dtype == np.float32


def test_batches_are_longest_first_and_within_the_budget():
    members, forward = fresh(), Counting()
    add(members, forward)
    length = {e.source: e.length for e in members}
    lengths = [length[source] for source in forward.responses]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) * length[batch[0]] <= PER_BATCH for batch in forward.batches)
    assert 20 > len(forward.batches) > 3
    tight = Counting()
    add(members, tight, max_tokens=1)  # a response that is over the budget has a batch of its own
    assert [len(batch) for batch in tight.batches] == [1] * 20


def test_equal_responses_and_companions_are_computed_once(cache):
    members = fresh()
    copies = fresh()  # other objects, same tokens
    forward = Counting()
    assert add(members + copies, forward, cache) == 20
    assert len(forward.responses) == 20
    assert same(columns(members), columns(copies))


def test_companions_get_their_columns_and_are_reused(cache):
    plain, others = fresh(4), fresh(4, seed=1)
    members = [dataclasses.replace(e, companion=other) for e, other in zip(plain, others)] + [plain[0]]
    forward = Counting()
    assert add(members, forward, cache) == 8
    assert all(len(e.companion.ref_lse) == len(e.companion.completion_ids) for e in members[:4])
    again = Counting()
    assert add(others, again, cache) == 0
    assert again.batches == []


def test_what_is_cached_is_not_computed_again(cache, capsys):
    members = fresh()
    add(members, Counting(), cache)
    again, forward = fresh(), Counting()
    assert add(again, forward, cache) == 0
    assert forward.batches == []
    assert same(columns(members), columns(again))
    larger, forward = fresh() + fresh(5, seed=1), Counting()
    assert add(larger, forward, cache) == 5
    assert len(forward.responses) == 5
    assert "20 of 25 cached" in capsys.readouterr().err
    assert add(fresh(30)[3:12:2], Counting(), cache) == 0
    meta = json.loads((cache.directory / "meta.json").read_text())
    assert meta["responses"] == 25


@pytest.mark.parametrize("change", [{"weights": "v"}, {"dtype": "bfloat16"}, {"architecture": "b"}], ids=str)
def test_numbers_of_another_reference_are_computed(cache, change):
    add(fresh(), Counting(), cache)
    other = ReferenceCache(cache.directory.parent, replace(IDENTITY, **change), "model")
    assert add(fresh(), Counting(), other) == 20


def test_an_interrupted_pass_goes_on_where_it_was_with_the_same_batches(cache, tmp_path, flush_every_batch):
    whole = Counting()
    unbroken = fresh()
    add(unbroken, whole)
    stopped = Counting(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        add(fresh(), stopped, cache)
    assert len(list(cache.directory.glob("segment-*"))) == 3
    rest, members = Counting(), fresh()
    add(members, rest, cache)
    assert stopped.batches + rest.batches == whole.batches
    assert same(columns(members), columns(unbroken))  # bit for bit, because the batches are the same


def test_an_exception_loses_no_finished_batch(cache):
    with pytest.raises(KeyboardInterrupt):
        add(fresh(), Counting(stop_at=3), cache)
    assert len(list(cache.directory.glob("segment-*"))) == 1
    rest = Counting()
    add(fresh(), rest, cache)
    whole = Counting()
    add(fresh(), whole)
    assert rest.batches == whole.batches[3:]


def test_a_segment_is_written_after_a_while(cache, monkeypatch):
    monkeypatch.setattr(reference, "FLUSH_SECONDS", 0.0)
    forward = Counting()
    add(fresh(), forward, cache)
    assert len(list(cache.directory.glob("segment-*"))) == len(forward.batches)


def killed_pass(root):
    """In a process of its own: a segment a batch, and SIGKILL in the place of the fourth."""
    reference.FLUSH_TOKENS = 1
    forward = Counting()

    def stats_of(batch):
        if len(forward.batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(batch)

    add(fresh(), stats_of, ReferenceCache(root, IDENTITY, "model"))


@pytest.mark.slow
def test_a_killed_pass_goes_on_where_it_was(cache):
    assert forked.ended(forked.start(killed_pass, cache.directory.parent)) == -signal.SIGKILL
    done = len(list(cache.directory.glob("segment-*")))
    whole, rest = Counting(), Counting()
    unbroken, members = fresh(), fresh()
    add(unbroken, whole)
    add(members, rest, cache)
    assert 2 <= done < len(whole.batches)
    assert rest.batches == whole.batches[done:]
    assert same(columns(members), columns(unbroken))


def test_ranks_compute_their_shares_and_read_the_others(cache, monkeypatch):
    monkeypatch.setattr("dqo.reference.exchange.gather_objects", lambda items, processes: processes.gather(items))
    members, forwards = [fresh(), fresh()], [Counting(), Counting()]
    computed = launched(2, lambda p: add(members[p.rank], forwards[p.rank], cache, p))
    assert computed == [10, 10]
    assert sorted(forwards[0].responses + forwards[1].responses) == sorted(e.source for e in members[0])
    assert same(columns(members[0]), columns(members[1]))
    alone = fresh()
    add(alone, Counting())
    assert all(np.allclose(a.ref_logprobs, b.ref_logprobs, atol=1e-6) for a, b in zip(members[0], alone))
    assert launched(2, lambda p: add(fresh(), Counting(), cache, p)) == [0, 0]


def test_machines_with_caches_of_their_own_compute_each_response_once_and_keep_all(tmp_path, monkeypatch):
    monkeypatch.setattr("dqo.reference.exchange.gather_objects", lambda items, processes: processes.gather(items))
    caches = [ReferenceCache(tmp_path / name, IDENTITY, "model") for name in ("first", "second")]
    known, forwards = fresh()[::3], [Counting() for _ in range(4)]
    add(known, Counting(), caches[1])  # of an earlier run of the second machine alone
    members = [fresh() for _ in range(4)]
    add_on = lambda p: add(members[p.rank], forwards[p.rank], caches[p.rank // 2], p)  # noqa: E731
    assert sum(launched(4, add_on, machines=2)) == 20 - len(known)
    asked = [source for forward in forwards for source in forward.responses]
    assert sorted(asked + [e.source for e in known]) == sorted(e.source for e in members[0])
    for other in members[1:]:
        assert same(columns(other), columns(members[0]))  # bit for bit: who computed a number sends it
    for cache in caches:  # each machine goes on alone
        again = fresh()
        assert add(again, Counting(), cache) == 0
        assert same(columns(again), columns(members[0]))
        assert json.loads((cache.directory / "meta.json").read_text())["responses"] >= 20


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_response_that_is_impossible_under_the_reference_is_named_and_not_cached(cache, value):
    members = fresh(3)
    victim = members[1]

    def stats_of(batch):
        stats = policy_stats(policy(), batch)
        logprobs = stats.logprobs.clone()
        starts = dict(zip((e.source for e in batch.episodes), batch.cu_seqlens.tolist()))
        logprobs[starts[victim.source] + len(victim.completion_ids) - 1] = value
        return stats._replace(logprobs=logprobs)

    with pytest.raises(
        UserError, match=f"row 2: the reference policy gives token {len(victim.completion_ids)} .*{value}"
    ):
        add(members, stats_of, cache, max_tokens=10_000)
    assert not list(cache.directory.iterdir())


def agreed(members, model, **options):
    check_agreement(members, lambda batch: policy_stats(model, batch), Batching(0, PER_BATCH), **options)


def with_reference(model, count=20):
    members = fresh(count)
    add(members, lambda batch: policy_stats(model, batch))
    return members


def test_a_policy_that_is_not_its_reference_is_stopped_at_step_0(cache):
    model = policy()
    members = with_reference(model)
    agreed(members, model)
    with torch.no_grad():
        model.lm_head.weight[5] += 0.01
    with pytest.raises(UserError) as error:
        agreed(members, model, cache=cache)
    assert "differ from the initial policy's by up to 0.0" in str(error.value)
    assert "rounding in float32 explains 3e-05" in str(error.value)
    assert " of 20 responses: row " in str(error.value)
    assert "adapter" in str(error.value) and "dropout" in str(error.value) and "not causal" in str(error.value)
    assert f"delete {cache.directory}" in str(error.value)


def test_the_row_that_disagrees_is_named_with_its_token():
    model = policy()
    members = with_reference(model)
    victim = next(e for e in members if len(e.completion_ids) > 3)
    victim.ref_logprobs = victim.ref_logprobs.copy()
    victim.ref_logprobs[2] -= 0.5
    with pytest.raises(UserError, match=rf"1 of 20 responses: {victim.source} \(0\.\d+ at token 3\)"):
        agreed(members, model)


def test_a_reference_that_is_not_a_number_is_stopped():
    model = policy()
    members = with_reference(model)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="by up to inf"):
        agreed(members, model)


def test_64_responses_are_checked_in_other_shapes_within_the_budget():
    model, shapes = policy(), []
    members = with_reference(model, 200)

    def stats_of(batch):
        shapes.append(tuple(batch.input_ids.shape))
        return policy_stats(model, batch)

    check_agreement(members, stats_of, Batching(0, 10_000))
    assert [shape[0] for shape in shapes] == [64]
    shapes.clear()
    check_agreement(members, stats_of, Batching(0, 100))
    assert sum(shape[0] for shape in shapes) == 64 and len(shapes) > 8
    # one batch, as the pass had it, would prove nothing
    few = [e for e in members if len(e.completion_ids) > 1][:3]
    shapes.clear()
    check_agreement(few, stats_of, Batching(0, 10_000))
    assert shapes == [(3, max(e.length for e in few) - 1)]


def test_a_policy_that_sees_the_future_is_stopped():
    """All rows are of one length and fit one batch: only a response cut shorter shows it."""
    model = policy()

    def looks_ahead(batch):
        stats = policy_stats(model, batch)
        ends = torch.repeat_interleave(batch.actions[batch.cu_seqlens[1:] - 1], batch.cu_seqlens.diff())
        return stats._replace(logprobs=stats.logprobs - 0.01 * ends)

    members = [e for e in fresh(60) if e.length == 9]
    assert len(members) > 1
    add(members, looks_ahead, max_tokens=10_000)
    with pytest.raises(UserError, match="attention that is not causal"):
        check_agreement(members, looks_ahead, Batching(0, 10_000))


def test_the_bound_is_that_of_the_dtype():
    model = policy(hidden_size=64, layers=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 4.0

    def in_bfloat16(batch):
        return policy_stats(model, batch, bf16=True)

    members = fresh(60)
    add(members, lambda batch: policy_stats(model, batch))
    with pytest.raises(UserError, match="rounding in float32"):
        check_agreement(members, in_bfloat16, Batching(0, PER_BATCH))
    check_agreement(members, in_bfloat16, Batching(0, PER_BATCH), dtype="bfloat16")
    for e in members:
        e.ref_logprobs = e.ref_logprobs - np.float32(2.0)
    with pytest.raises(UserError, match="rounding in bfloat16 explains 0.1"):
        check_agreement(members, in_bfloat16, Batching(0, PER_BATCH), dtype="bfloat16")
    assert AGREEMENT_BOUNDS.keys() == {"float32", "bfloat16"}
