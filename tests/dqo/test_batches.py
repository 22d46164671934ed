import numpy as np
import torch

from dqo.batches import collate, epoch_order, groups_of, unit_count
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
    assert epoch_order(50, 3, 7) == epoch_order(50, 3, 7)
    assert epoch_order(50, 3, 7) != epoch_order(50, 4, 7) != epoch_order(50, 4, 8)
    assert sorted(epoch_order(50, 3, 7)) == list(range(50))


def test_units_are_tokens_responses_or_pairs():
    groups = groups_of(episodes(6), 2)
    assert unit_count(groups, "token") == sum(len(e.completion_ids) for e in episodes(6))
    assert unit_count(groups, "pair") == 3
