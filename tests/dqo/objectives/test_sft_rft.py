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


def test_sft_trains_on_wrong_responses_too():
    members = episodes(4)
    assert selected(SFT(), members) == [[e] for e in members]
