import math

import torch

from dqo.data.selection import selected
from dqo.objectives import DPO, CurryDPO
from dqo.objectives.base import Phase
from tests.dqo.helpers import episodes
from tests.dqo.objectives.packed import random_case, stats_of


def test_the_loss_of_one_pair_by_hand():
    rows = {"ref_logprobs": torch.tensor([-1.2, -1.3, -0.9]), "label": torch.ones(3)}  # of the policy before the stage
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    loss, _ = CurryDPO(beta=0.5)(stats_of(logprobs), rows, torch.tensor([0, 2, 3]))
    assert math.isclose(loss.item(), math.log(1 + math.exp(-0.3)), rel_tol=1e-6)


def test_the_loss_of_any_variant_is_that_of_dpo():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4, 2])
    for options in ({}, {"loss_type": "ipo", "rpo_alpha": 0.4}, {"loss_type": "robust", "label_smoothing": 0.1}):
        ours, theirs = (cls(beta=0.3, **options)(make(logits), rows, cu_seqlens)[0] for cls in (CurryDPO, DPO))
        assert ours == theirs


def graded():
    """Three prompts: rewards 0 to 1 apart, and two with rewards 0 and 1 of which one is solved more often."""
    members = episodes(10)
    rewards = [0.0, 1.0, 0.25, 0.75, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    for i, (e, reward) in enumerate(zip(members, rewards)):
        e.prompt_index, e.reward = (0 if i < 4 else 1 if i < 7 else 2), reward
    return members


def test_pairs_come_from_the_greatest_gap_to_the_least_and_solved_prompts_first():
    members = graded()
    found = [[members.index(e) for e in pair] for pair in selected(CurryDPO(), members)]
    assert sorted(found) == sorted([members.index(e) for e in pair] for pair in selected(DPO(), members))
    gaps = [members[better].reward - members[worse].reward for better, worse in found]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] == 1.0 and gaps[-1] == 0.5
    prompts = [members[better].prompt_index for (better, _), gap in zip(found, gaps) if gap == 1.0]
    assert prompts == [2, 2, 0, 1, 1]  # two thirds, a half and a third of the reward
    assert [[e.source for e in pair] for pair in selected(CurryDPO(stages=1), graded())] == [
        [e.source for e in pair] for pair in selected(DPO(), graded())
    ]


def test_the_stages_are_equal_parts_of_steps_and_pairs_and_refresh_the_reference():
    assert CurryDPO(stages=2).phases(0.3) == (
        Phase("stage 1", 0.5, ("policy",), (), (0.0, 0.5)),
        Phase("stage 2", None, ("policy",), ("reference",), (0.5, 1.0)),
    )
    assert CurryDPO(stages=1).phases(0.3) == DPO().phases(0.3)


def test_options_out_of_range_are_named():
    assert [name for name, _ in CurryDPO(stages=0).problems()] == ["stages"]
    assert [name for name, _ in CurryDPO(beta=0.0).problems()] == ["beta"]
    assert CurryDPO().problems() == []
