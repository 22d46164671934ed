import pytest
import torch

from dqo.data.selection import selected
from dqo.objectives import RFT, SFT
from dqo_kernels import TokenStats
from tests.dqo.helpers import episodes


@pytest.mark.parametrize("objective", [SFT(), RFT()])
def test_the_loss_is_the_negative_log_likelihood_of_every_response_token(objective):
    logprobs = torch.tensor([-0.5, -1.0, -0.25])
    rows = {"label": torch.tensor([1.0, 1.0, 0.0])}
    loss, metrics = objective(TokenStats(logprobs, logprobs, logprobs), rows, torch.tensor([0, 2, 3]))
    assert loss.item() == 1.75
    assert {name: sums.tolist() for name, sums in metrics.items()} == {
        "logps/chosen": [-1.5, 1.0],
        "logps/rejected": [-0.25, 1.0],
    }


def test_rft_keeps_distinct_correct_responses():
    members = episodes(4)
    members[3].completion_ids, members[3].prompt_index = members[1].completion_ids, members[1].prompt_index
    assert [e.source for (e,) in selected(RFT(), members)] == ["row 2"]  # rows 1 and 3 are wrong, row 4 repeats row 2


def test_rft_keeps_at_most_max_per_prompt_responses():
    members = episodes(8)
    for e in members:
        e.prompt_index, e.label = 0, True
    assert [e.source for (e,) in selected(RFT(max_per_prompt=3), members)] == ["row 1", "row 2", "row 3"]


def test_rft_on_steps_imitates_what_stands_before_the_first_wrong_one():
    members = episodes(6)
    for e, wrong_from in zip(members, (2, 0, None, None, 1, None)):  # rows 2, 4 and 6 are correct
        e.wrong_from = wrong_from
    kept = [e for (e,) in selected(RFT(imitate="steps"), members)]
    assert [e.source for e in kept] == ["row 1", "row 4", "row 5", "row 6"]
    assert [e.columns["right_length"][0] for e in kept] == [2, members[3].action_count, 1, members[5].action_count]
    logprobs = torch.tensor([-0.5, -1.0, -0.25])
    rows = {"label": torch.zeros(3), "right_length": torch.tensor([1.0, 1.0, 1.0])}
    loss, _ = RFT(imitate="steps")(TokenStats(logprobs, logprobs, logprobs), rows, torch.tensor([0, 2, 3]))
    assert loss.item() == 0.75  # the first token of each


def test_sft_trains_on_wrong_responses_too():
    members = episodes(4)
    assert selected(SFT(), members) == [[e] for e in members]
