import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo.data.batches import collate, dealt, epoch_order, groups_of, micro_batch_plan, unit_count
from tests.dqo.helpers import episodes


def test_every_row_is_the_state_before_its_action():
    batch = collate(episodes(7), pad_id=0)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.states + 1], batch.actions)


def test_no_row_reads_padding_and_none_belongs_to_the_prompt():
    members = episodes(7)
    batch = collate(members, pad_id=0)
    width = batch.input_ids.shape[1]
    for i, e in enumerate(members):
        rows = batch.states[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]] - i * width
        assert rows.tolist() == list(range(len(e.prompt_ids) - 1, e.length - 1))


def test_the_end_state_follows_the_last_action():
    members = episodes(5)
    batch = collate(members, pad_id=0)
    last_rows = batch.states[batch.cu_seqlens[1:] - 1]
    assert torch.equal(batch.end_states, last_rows + 1)


def test_a_padding_id_equal_to_eos_removes_no_action():
    members = episodes(3)
    members[0].completion_ids[-1] = 2
    assert 2 in collate(members, pad_id=2).actions.tolist()


def test_columns_are_aligned_with_their_actions():
    members = episodes(5)
    batch = collate(members, pad_id=0)
    for i, e in enumerate(members):
        rows = slice(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1]))
        assert np.array_equal(batch.columns["rewards"][rows].numpy(), e.rewards)
        assert np.array_equal(batch.columns["ref_logprobs"][rows].numpy(), e.ref_logprobs)
        assert set(batch.columns["label"][rows].tolist()) == {float(e.label)}


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    one, again, next_epoch, other_seed = (epoch_order(50, *of).tolist() for of in ((3, 7), (3, 7), (4, 7), (4, 8)))
    assert one == again
    assert one != next_epoch != other_seed
    assert sorted(one) == list(range(50))


def micro_batches(groups, max_tokens, packed=False):
    """Those of one process alone."""
    return micro_batch_plan(groups, 1, max_tokens, packed)[0]


@st.composite
def steps(draw):
    """The groups of one optimizer step: all singles, all pairs, or lists of any lengths; responses of uneven lengths."""
    size = draw(st.sampled_from([1, 2, None]))
    sizes = draw(st.lists(st.integers(1, 4) if size is None else st.just(size), min_size=1, max_size=20))
    lengths = draw(st.lists(st.integers(2, 40), min_size=sum(sizes), max_size=sum(sizes)))
    template = episodes(1)[0]
    members = iter(
        dataclasses.replace(template, prompt_ids=[4], completion_ids=[5] * (n - 1), source=f"row {i}")
        for i, n in enumerate(lengths)
    )
    return [[next(members) for _ in range(size)] for size in sizes]


def sources(groups):
    return sorted(tuple(e.source for e in group) for group in groups)


def joined(batches):
    return [group for batch in batches for group in batch]


def positions(batch, packed):
    return collate([e for group in batch for e in group], 0, packed=packed).positions


layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@layouts
@given(groups=steps(), max_tokens=st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_micro_batches_hold_every_group_once_and_whole_within_the_budget(groups, max_tokens, packed):
    batches = micro_batches(groups, max_tokens, packed)
    assert sources(joined(batches)) == sources(groups)
    assert all(positions(batch, packed) <= max_tokens or len(batch) == 1 for batch in batches)
    assert batches == micro_batches(groups, max_tokens, packed)


@given(groups=steps(), max_tokens=st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_packed_batches_are_filled_well(groups, max_tokens):
    batches = micro_batches(groups, max_tokens, packed=True)
    filled = sorted(positions(batch, packed=True) for batch in batches)
    assert len(filled) < 2 or filled[0] + filled[1] > max_tokens  # or the two emptiest would have been one


def test_a_packed_batch_goes_on_in_the_fullest_that_holds_it():
    e = episodes(1)[0]
    members = [dataclasses.replace(e, prompt_ids=[4], completion_ids=[5] * (n - 1)) for n in (4, 5, 6)]
    batches = micro_batches([[e] for e in members], max_tokens=10, packed=True)
    assert [[e.length for (e,) in batch] for batch in batches] == [[6, 4], [5]]


def test_padded_batches_hold_like_lengths():
    short, long = episodes(1)[0], episodes(1)[0]
    short = dataclasses.replace(short, prompt_ids=[4], completion_ids=[5])
    long = dataclasses.replace(long, prompt_ids=[4], completion_ids=[5] * 9)
    batches = micro_batches([[e] for e in (short, long, short, long)], max_tokens=20)
    assert [[e.length for (e,) in batch] for batch in batches] == [[10, 10], [2, 2]]
    assert [positions(batch, packed=False) for batch in batches] == [20, 4]


@given(groups=steps(), world=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_shares_are_a_partition_with_balanced_tokens(groups, world):
    shares = [dealt(groups, world)[rank] for rank in range(world)]
    assert sources(group for part in shares for group in part) == sources(groups)
    tokens = [sum(e.length for group in part for e in group) for part in shares]
    assert max(tokens) - min(tokens) <= max(sum(e.length for e in group) for group in groups)


@layouts
@given(groups=steps(), world=st.integers(1, 5), max_tokens=st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_a_plan_gives_every_process_its_share_in_as_many_micro_batches(groups, world, max_tokens, packed):
    plan = micro_batch_plan(groups, world, max_tokens, packed)
    assert len(plan) == world and len({len(part) for part in plan}) == 1
    for rank, part in enumerate(plan):
        batches = [batch for batch in part if batch is not None]
        assert part == batches + [None] * (len(part) - len(batches))
        assert sources(joined(batches)) == sources(dealt(groups, world)[rank])
        assert all(positions(batch, packed) <= max_tokens or len(batch) == 1 for batch in batches)
        if len(batches) < len(part):  # nothing was left to split
            assert all(len(batch) == 1 for batch in batches)
        computed = [positions(batch, packed) for batch in batches]
        assert computed == sorted(computed, reverse=True)
    assert max(len(part) for part in plan) == max(
        len(micro_batches(dealt(groups, world)[rank], max_tokens, packed)) for rank in range(world)
    )


def test_a_packed_batch_holds_the_tokens_without_padding():
    members = episodes(5)
    padded, packed = collate(members, pad_id=0), collate(members, pad_id=0, packed=True)
    assert packed.positions == packed.tokens == padded.tokens < padded.positions
    assert packed.input_ids[0].tolist() == [i for e in members for i in e.prompt_ids + e.completion_ids]
    for name in ("states", "end_states"):  # the same tokens, wherever they lie
        mine, theirs = getattr(packed, name), getattr(padded, name)
        assert torch.equal(packed.input_ids.flatten()[mine], padded.input_ids.flatten()[theirs])
    assert torch.equal(packed.input_ids[0][packed.states + 1], packed.actions)
    assert torch.equal(packed.states[packed.cu_seqlens[1:] - 1] + 1, packed.end_states)
    assert all(torch.equal(packed.columns[name], padded.columns[name]) for name in padded.columns)


def test_a_packed_batch_says_where_its_sequences_are():
    members = episodes(3)
    lengths = [e.length for e in members]
    inputs = collate(members, pad_id=0, packed=True).model_inputs
    assert inputs["position_ids"].tolist() == [[p for n in lengths for p in range(n)]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths)] == inputs["cu_seq_lens_k"].tolist()
    assert inputs["cu_seq_lens_q"].dtype == torch.int32  # as the kernels want it
    assert inputs["max_length_q"] == inputs["max_length_k"] == max(lengths)
    assert collate(members, pad_id=0).model_inputs == {}


def test_units_are_tokens_responses_or_groups():
    groups = groups_of(episodes(6), 2)
    assert unit_count(groups, "token") == sum(len(e.completion_ids) for e in episodes(6))
    assert unit_count(groups, "response") == 6
    assert unit_count(groups, "group") == 3


def test_a_batch_knows_its_groups_and_tells_the_objective():
    members = episodes(6)
    batch = collate(members, 0, sizes=[3, 1, 2])
    assert batch.groups == [members[:3], members[3:4], members[4:]]
    lengths = [len(e.completion_ids) for e in members]
    assert batch.columns["group"].tolist() == np.repeat([0, 0, 0, 1, 2, 2], lengths).tolist()
    assert collate(members, 0).groups == [[e] for e in members]
    assert collate(members, 0).columns["group"].tolist() == np.repeat(np.arange(6), lengths).tolist()
