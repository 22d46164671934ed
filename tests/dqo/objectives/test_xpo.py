import math

import pytest
import torch

from dqo.data.selection import selected
from dqo.errors import UserError
from dqo.objectives import DPO, XPO
from tests.dqo.helpers import episodes
from tests.dqo.objectives.packed import differences, lbfgs, random_case, stats_of
from tests.tabular import random_tree


def call(objective, marks):
    """Two pairs of responses of two, one, one and one tokens."""
    rows = {
        "ref_logprobs": torch.tensor([-1.2, -1.3, -0.9, -1.0, -1.0]),
        "label": torch.ones(5),
        "of_reference": torch.tensor([marks[0], marks[0], *marks[1:]]),
    }
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -3.0, -0.5], requires_grad=True)
    loss, metrics = objective(stats_of(logprobs), rows, torch.tensor([0, 2, 3, 4, 5]))
    loss.backward()
    return loss.item(), metrics, logprobs.grad


@pytest.mark.parametrize(
    "marks, term",
    [
        ((0.0, 1.0, 0.0, 0.0), -1.0),
        ((1.0, 0.0, 0.0, 1.0), -2.0 - 0.5),
        ((1.0, 1.0, 0.0, 0.0), (-2.0 - 1.0) / 2),
        ((0.0,) * 4, 0.0),
    ],
)
def test_the_term_of_samples_of_the_reference_by_hand(marks, term):
    plain, _, slopes = call(XPO(beta=0.5, alpha=0.0), marks)
    margins = 0.5 * (0.5 + 0.1), 0.5 * (-2.0 - 0.5)
    assert math.isclose(plain, sum(math.log(1 + math.exp(-m)) for m in margins), rel_tol=1e-6)
    loss, metrics, ours = call(XPO(beta=0.5, alpha=0.2), marks)
    assert math.isclose(loss - plain, 0.2 * term, rel_tol=1e-5, abs_tol=1e-6)
    assert metrics["loss/xpo"].tolist() == pytest.approx([0.2 * term, 2.0])
    several = marks[0] + marks[1] or 1.0, marks[2] + marks[3] or 1.0
    expected = [marks[0] / several[0]] * 2 + [marks[1] / several[0], marks[2] / several[1], marks[3] / several[1]]
    assert (ours - slopes).tolist() == pytest.approx([0.2 * x for x in expected], abs=1e-6)


def test_without_alpha_it_is_dpo_and_with_it_the_gradient_agrees_with_differences():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4, 2])
    rows["of_reference"] = torch.tensor([1.0, 0.0, 0.0, 1.0]).double().repeat_interleave(cu_seqlens.diff())
    for options in ({}, {"loss_type": "ipo"}):
        ours, theirs = (cls(make(logits), rows, cu_seqlens)[0] for cls in (XPO(alpha=0.0, **options), DPO(**options)))
        assert ours == theirs
    leaf = logits.clone().requires_grad_()
    XPO(alpha=0.3)(make(leaf), rows, cu_seqlens)[0].backward()
    exact = differences(lambda x: XPO(alpha=0.3)(make(x), rows, cu_seqlens)[0], logits)
    assert torch.allclose(leaf.grad, exact, atol=1e-8)


def test_the_optimum_of_two_actions_is_reached_and_leaves_the_reference_s_sample():
    """d is the difference of the logits: 0 = beta * (e * sigmoid(m) - (1 - e) * sigmoid(-m)) - alpha * sigmoid(d)."""
    tree = random_tree(0, depth=1, num_actions=2)
    order, beta, alpha, share = [0, 1], 0.5, 0.1, 0.2
    objective = XPO(beta=beta, alpha=alpha, label_smoothing=share)
    found = lbfgs(tree, objective, order, {"of_reference": torch.tensor([0.0, 1.0]).double()})
    better, worse = tree.actions.tolist()
    d = found[0, better] - found[0, worse]
    margin = beta * (d - (tree.ref_logits[0, better] - tree.ref_logits[0, worse]))
    slope = beta * (share * margin.sigmoid() - (1 - share) * (-margin).sigmoid()) - alpha * d.sigmoid()
    assert abs(slope) < 1e-8
    assert margin > math.log((1 - share) / share) + 0.1  # without alpha it would be this


def test_which_rows_are_samples_of_the_reference():
    members = episodes(8)
    asked = []

    def known():
        asked.append(True)
        return {members[1].source, members[2].source}

    groups = selected(XPO(), members, known)
    assert asked and [float(e.columns["of_reference"][0]) for e in members[:4]] == [0.0, 1.0, 1.0, 0.0]
    assert [[e.source for e in pair] for pair in groups] == [
        [e.source for e in p] for p in selected(DPO(), episodes(8))
    ]
    assert all(e.columns["of_reference"].all() for e in members if selected(XPO(reference_rows="all"), members))
    selected(DPO(), members, lambda: pytest.fail("asked for what is not read"))
    with pytest.raises(UserError, match="no sample of the reference in 4 pairs: 0 of 8 responses tell .* `dqo sample`"):
        selected(XPO(), members)
    assert len(selected(XPO(alpha=0.0), members)) == 4


def test_options_out_of_range_are_named():
    assert [name for name, _ in XPO(alpha=-1.0).problems()] == ["alpha"]
    assert [name for name, _ in XPO(beta=0.0).problems()] == ["beta"]
    assert XPO().problems() == []
