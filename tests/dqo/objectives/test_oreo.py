import math

import pytest
import torch

from dqo.data.selection import selected
from dqo.errors import UserError
from dqo.objectives import DQO, OREO
from dqo_kernels import TokenStats
from tests.dqo.helpers import episodes
from tests.dqo.objectives.on_tree import alike, trained
from tests.dqo.objectives.packed import differences, random_case
from tests.tabular import random_tree

# beta 0.5: delta = [0.2, -0.4], r = [0, 1], V = [0.3, 0.6], KL = [0.1, 0.3]; R = [1, 1]
ROWS = {"ref_logprobs": [-1.2, -0.6], "rewards": [0.0, 1.0], "values": [0.3, 0.6], "label": [1.0, 1.0], "step": [0, 0]}


def call(objective, **extra):
    rows = {name: torch.tensor(column) for name, column in ROWS.items()} | extra
    rows["values"].requires_grad_()
    leaves = torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([0.1, 0.3], requires_grad=True)
    stats = TokenStats(leaves[0], torch.zeros(2), torch.zeros(2), kl=leaves[1])
    loss, metrics = objective(stats, rows, torch.tensor([0, 2]))
    loss.backward()
    return loss.item(), metrics, leaves[0].grad, rows["values"].grad, leaves[1].grad


def test_the_loss_of_two_tokens_by_hand():
    # value: V_1 - R_1 + beta*(0.2 - 0.4) = -0.8;  V_2 - R_2 + beta*(-0.4) = -0.6; the policy's errors are the same numbers
    # L_V = L_pi = 1/2 (0.64 + 0.36) = 0.5;  KL: 0.2 * 1/2 (0.1 + 0.3) = 0.04
    loss, metrics, logprobs, values, kl = call(OREO(beta=0.5, alpha=0.2))
    assert math.isclose(loss, 0.5 + 0.5 + 0.04, rel_tol=1e-6)
    assert torch.allclose(
        logprobs, torch.tensor([0.5 * -0.8, 0.5 * -0.6])
    )  # 2/T * beta * e_t, only through its own delta_t
    assert torch.allclose(values, torch.tensor([-0.8, -0.6]))
    assert torch.allclose(kl, torch.tensor([0.1, 0.1]))
    assert torch.allclose(metrics["loss/policy"], torch.tensor([0.5, 1.0]))
    assert torch.allclose(metrics["loss/value"], torch.tensor([0.5, 1.0]))
    assert torch.allclose(metrics["loss/kl"], torch.tensor([0.4, 2.0]))


def test_at_the_level_of_responses_the_first_state_counts_by_hand():
    # e = V_1 - R + beta * S = 0.3 - 1 - 0.1 = -0.8, in both losses; every token's log-probability is differentiated
    loss, metrics, logprobs, values, _ = call(OREO(beta=0.5, alpha=0.2, level="response"))
    assert math.isclose(loss, 0.64 + 0.64 + 0.04, rel_tol=1e-6)
    assert torch.allclose(logprobs, torch.tensor([2 * 0.5 * -0.8] * 2))
    assert torch.allclose(values, torch.tensor([2 * -0.8, 0.0]))
    assert metrics["value/mean"].tolist() == pytest.approx([0.3, 1.0])


def test_at_the_level_of_steps_a_step_is_one_action_by_hand():
    # delta = [0.2, -0.4, 0.5], steps [0, 0, 1], beta 0.5, R = [1.5, 1]; V = [0.3, ., 0.6]
    # e_1 = 0.3 - 1.5 + 0.5 * 0.3 = -1.05, e_2 = 0.6 - 1 + 0.25 = -0.15; a token moves the action that it is in
    rows = {name: torch.tensor(x) for name, x in STEP_ROWS.items()}
    rows["values"].requires_grad_()
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    loss, metrics = OREO(beta=0.5, alpha=0.0, level="step")(
        TokenStats(logprobs, *torch.zeros(2, 3)), rows, torch.tensor([0, 3])
    )
    loss.backward()
    assert math.isclose(loss.item(), 1.05**2 + 0.15**2, rel_tol=1e-5)  # twice the mean over two steps
    assert torch.allclose(logprobs.grad, 0.5 * torch.tensor([-1.05, -1.05, -0.15]))
    assert torch.allclose(rows["values"].grad, torch.tensor([-1.05, 0.0, -0.15]))
    assert metrics["value/mean"].tolist() == pytest.approx([0.9, 2.0])


STEP_ROWS = {"ref_logprobs": [-1.2, -0.6, -1.5], "rewards": [0.5, 0.0, 1.0], "values": [0.3, 9.0, 0.6]}
STEP_ROWS |= {"label": [1.0, 1.0, 1.0], "step": [0, 0, 1]}


@pytest.mark.parametrize("step, level", [(lambda i, length: i, "token"), (lambda i, length: 0 * i, "response")])
def test_steps_of_one_token_are_tokens_and_one_step_is_the_response(step, level):
    lengths = [3, 1, 4]
    logits, make, rows, cu_seqlens = random_case(lengths)
    rows |= {"step": torch.cat([step(torch.arange(n), n) for n in lengths])}
    rows["bootstrap"] = torch.zeros_like(rows["values"]).index_fill_(0, cu_seqlens[1:] - 1, 0.7)
    ours = gradient(OREO(beta=0.3, level="step"), logits, make, rows, cu_seqlens)
    theirs = gradient(OREO(beta=0.3, level=level), logits, make, rows, cu_seqlens)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(ours, theirs))


def test_the_tabular_optimum_is_reached_by_steps():
    tree = alike(random_tree(0, depth=3, num_actions=2))
    n = len(tree.states)
    step = (torch.arange(n) - tree.cu_seqlens[:-1][tree.sequences]) // 2  # two tokens, then one
    policy, values = trained(OREO(beta=tree.beta, alpha=0.0, level="step"), tree, scale=0.4, max_steps=150, step=step)
    assert (policy - tree.optimum().log_policy).abs().max() < 1e-4
    starts = tree.states[(step * 2 == torch.arange(n) - tree.cu_seqlens[:-1][tree.sequences])]
    assert (values - tree.optimum().v)[starts].abs().max() < 1e-4


def test_responses_without_steps_are_counted_and_refused():
    members = episodes(6)
    for e in members[1:]:
        e.step_ends = [0]
    with pytest.raises(
        UserError, match=r"and 5 of 6 responses have steps \(the first without: row 1\); `dqo score FILE --ste"
    ):
        selected(OREO(level="step"), members)
    assert len(selected(OREO(level="token"), members)) == 6


@pytest.mark.parametrize("level", ["token", "response"])
def test_a_response_that_was_cut_is_paid_the_value_of_its_last_state(level):
    _, without, *_ = call(OREO(level=level))
    _, metrics, *_ = call(OREO(level=level), bootstrap=torch.tensor([0.0, 0.7]))
    sums = metrics["returns/mean"] - without["returns/mean"]
    assert math.isclose(sums[0].item(), 0.7 * metrics["returns/mean"][1].item(), rel_tol=1e-5)


@pytest.mark.parametrize(
    "change", [{"beta": 0.1}, {"alpha": 0.5}, {"level": "response"}, {"level": "step"}, {"value_coef": 0.5}]
)
def test_every_option_changes_the_gradient(change):
    gradients = [torch.cat(call(objective)[2:]) for objective in (OREO(), OREO(**change))]
    assert not torch.allclose(*gradients)


def test_the_reference_is_kept_only_for_its_kl():
    assert OREO().needs_kl and not OREO(alpha=0.0).needs_kl
    rows = {name: torch.tensor(column) for name, column in ROWS.items()}
    stats = TokenStats(*torch.zeros(3, 2))
    loss, metrics = OREO(alpha=0.0)(stats, rows, torch.tensor([0, 2]))  # without stats.kl
    assert torch.isfinite(loss) and "loss/kl" not in metrics


def gradient(objective, logits, make, rows, cu_seqlens):
    leaves = logits.clone().requires_grad_(), rows["values"].clone().requires_grad_()
    loss, _ = objective(make(leaves[0]), rows | {"values": leaves[1]}, cu_seqlens)
    loss.backward()
    return loss.detach(), leaves[0].grad, leaves[1].grad


def test_on_responses_of_one_length_it_is_dqo():
    case = random_case([4] * 3)
    ours = gradient(OREO(beta=0.3, alpha=0.5), *case)
    theirs = gradient(DQO(nll_coef=0.0, beta=0.3, is_level="none", kl_coef=0.25), *case)
    assert all(torch.allclose(a, 2 / 4 * b, rtol=1e-12) for a, b in zip(ours, theirs))


def test_every_response_counts_alike_whatever_its_length():
    lengths = [2, 5, 1]
    logits, make, rows, cu_seqlens = random_case(lengths)
    loss, of_logits, of_values = gradient(OREO(beta=0.3, alpha=0.5), logits, make, rows, cu_seqlens)
    objective, total = DQO(nll_coef=0.0, beta=0.3, is_level="none", kl_coef=0.25), 0.0
    for i, length in enumerate(lengths):
        own = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        only = torch.tensor([0, length])

        def make_own(x, own=own):
            whole = make(torch.cat([logits[: own.start], x, logits[own.stop :]]))
            return TokenStats(*(field[own] for field in whole))

        columns = {name: column[own] for name, column in rows.items()}
        part, part_logits, part_values = gradient(objective, logits[own], make_own, columns, only)
        assert torch.allclose(of_logits[own], 2 / length * part_logits, rtol=1e-12)
        assert torch.allclose(of_values[own], 2 / length * part_values, rtol=1e-12)
        total = total + 2 / length * part
    assert torch.allclose(loss, total, rtol=1e-12)


def by_the_paper(beta, alpha, level, stats, fixed, values, fixed_values, rows, cu_seqlens):
    """L_V + L_pi in loops; what the gradient stops at is read from `fixed` and `fixed_values`."""
    total = 0.0
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        delta, still = stats.logprobs - rows["ref_logprobs"], fixed.logprobs - rows["ref_logprobs"]
        loss, states = 0.0, range(a, b) if level == "token" else [a]
        if level == "step":
            states = [t for t in range(a, b) if t == a or rows["step"][t] != rows["step"][t - 1]]
        for t in states:
            outcome = rows["rewards"][t:b].sum()
            value_error = values[t] - outcome + beta * still[t:b].sum()
            end = next((s for s in states if s > t), b)  # of the action
            later = beta * still[end:b].sum()
            policy_error = fixed_values[t] - outcome + beta * delta[t:end].sum() + later
            loss = loss + (value_error**2 + policy_error**2) / len(states)
        total = total + loss + alpha * stats.kl[a:b].mean()
    return total


@pytest.mark.parametrize("level", ["token", "step", "response"])
def test_it_is_the_paper_s_loss_and_the_gradient_agrees_with_differences(level):
    logits, make, rows, cu_seqlens = random_case([3, 1, 4])
    objective, values, fixed = OREO(beta=0.4, alpha=0.3, level=level), rows["values"], make(logits)
    loss, of_logits, of_values = gradient(objective, logits, make, rows, cu_seqlens)

    def paper(logits, values):
        return by_the_paper(0.4, 0.3, level, make(logits), fixed, values, rows["values"], rows, cu_seqlens)

    assert torch.allclose(loss, paper(logits, values), rtol=1e-12)
    assert torch.allclose(of_logits, differences(lambda x: paper(x, values), logits), atol=1e-8)
    assert torch.allclose(of_values, differences(lambda v: paper(logits, v), values), atol=1e-8)


def test_options_out_of_range_are_named():
    assert [name for name, _ in OREO(beta=0.0, alpha=-1.0).problems()] == ["beta", "alpha"]
    assert OREO().problems() == []
