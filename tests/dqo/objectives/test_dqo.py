import math

import numpy as np
import pytest
import torch

from dqo.data.selection import selected
from dqo.objectives import DQO
from dqo.train import metrics as finished
from dqo_kernels import TokenStats
from tests.dqo.helpers import episodes
from tests.dqo.objectives.packed import differences, random_case

PLAIN = DQO(is_level="none", nll_coef=0.0)


def call(objective, logprobs, ref_logprobs, rewards, values, cu_seqlens, **extra):
    zeros = torch.zeros(len(logprobs))
    logprobs = torch.tensor(logprobs, requires_grad=True)
    stats = TokenStats(logprobs, zeros, zeros, kl=(logprobs - torch.tensor(ref_logprobs)).square())
    rows = {
        "ref_logprobs": torch.tensor(ref_logprobs),
        "rewards": torch.tensor(rewards),
        "values": torch.tensor(values, requires_grad=True),
        "label": torch.ones(len(logprobs)),
        **extra,
    }
    loss, metrics = objective(stats, rows, torch.tensor(cu_seqlens))
    return loss, metrics, stats.logprobs, rows["values"]


def test_the_loss_of_two_tokens_by_hand():
    # beta 0.5, lambda 1, no weights. delta = [0.2, -0.4], r = [0, 1], V = [0.3, 0.6]
    # k = r - beta*delta = [-0.1, 1.2];  G_2 = 1.2, G_1 = -0.1 + 1.2 = 1.1
    # policy: t=1: 0.1 - (0 + 1.2 - 0.3) = -0.8;  t=2: -0.2 - (1 - 0.6) = -0.6  -> 1/2 (0.64 + 0.36) = 0.5
    # value: 1/2 ((1.1 - 0.3)^2 + (1.2 - 0.6)^2) = 1/2 (0.64 + 0.36) = 0.5
    objective = DQO(beta=0.5, is_level="none", nll_coef=0.0)
    loss, metrics, logprobs, values = call(objective, [-1.0, -1.0], [-1.2, -0.6], [0.0, 1.0], [0.3, 0.6], [0, 2])
    assert math.isclose(loss.item(), 1.0, rel_tol=1e-6)
    assert torch.allclose(metrics["loss/policy"], torch.tensor([0.5, 2.0]))
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([0.5 * -0.8, 0.5 * -0.6]))  # beta * e_t
    assert torch.allclose(values.grad, torch.tensor([0.3 - 1.1, 0.6 - 1.2]))  # V_t - G_t


def test_trajectory_weights_scale_the_loss_of_their_response():
    plain, _, _, _ = call(PLAIN, [-1.0, -1.0], [-1.2, -1.3], [0.0, 1.0], [0.0, 0.0], [0, 2])
    weighted, metrics, _, _ = call(DQO(nll_coef=0.0), [-1.0, -1.0], [-1.2, -1.3], [0.0, 1.0], [0.0, 0.0], [0, 2])
    assert math.isclose(weighted.item(), math.exp(0.5) * plain.item(), rel_tol=1e-5)
    assert metrics["importance_weight/clipped_frac"][0] == 0


@pytest.mark.parametrize(
    "level, units", [("trajectory", [math.exp(0.5), math.exp(-40.0)]), ("token", [0.2, 0.3, -40.0])]
)
def test_the_effective_share_by_hand(level, units):
    weights = units if level == "trajectory" else [math.exp(x) for x in units]  # a response, or a token, each
    _, metrics, _, _ = call(
        DQO(is_level=level), [-1.0, -1.0, -41.0], [-1.2, -1.3, -1.0], [0.0] * 3, [0.0] * 3, [0, 2, 3]
    )
    share = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    found = finished.finish(metrics)
    assert found["importance_weight/effective_sample_share"] == pytest.approx(share, rel=1e-5)
    assert found["importance_weight/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    _, without, _, _ = call(DQO(is_level="none"), [-1.0], [-1.2], [0.0], [0.0], [0, 1])
    assert not any(name.startswith("importance_weight/effective") for name in finished.finish(without))


@pytest.mark.parametrize("nats", [44.0, 60.0, 400.0])
def test_weights_that_are_hardly_there_have_a_share(nats):
    """Their squares are 0 in float32 beyond 52 nats; beyond 103 the weights themselves are."""
    _, metrics, _, _ = call(DQO(), [-nats, -nats - 1.0], [0.0, 0.0], [1.0] * 2, [0.0] * 2, [0, 1, 2])
    expected = (1 + math.exp(-1)) ** 2 / (2 * (1 + math.exp(-2))) if nats < 100 else 0.0
    assert finished.finish(metrics)["importance_weight/effective_sample_share"] == pytest.approx(expected, rel=1e-3)


def test_the_held_out_loss_does_not_fall_with_the_weights():
    far = (
        [-31.0, -1.0],
        [-1.0, -1.0],
        [0.0, 1.0],
        [0.3, 0.6],
        [0, 2],
    )  # a response that has become 30 nats less likely

    loss, metrics, _, _ = call(DQO(nll_coef=0.0), *far)
    assert loss < 1e-9
    plain, _, _, _ = call(PLAIN, *far)
    stats = TokenStats(torch.tensor(far[0]), torch.zeros(2), torch.zeros(2))
    rows = {"ref_logprobs": torch.tensor(far[1]), "rewards": torch.tensor(far[2]), "values": torch.tensor(far[3])}
    for objective in (DQO(nll_coef=0.0), DQO(is_level="suffix", nll_coef=0.0), PLAIN):
        found, told = objective.evaluation(stats, rows | {"label": torch.ones(2)}, torch.tensor(far[4]))
        assert found.item() == pytest.approx(plain.item()) and found > 1
        assert (told["loss/policy"] + told["loss/value"])[0].item() == pytest.approx(plain.item())
    weighted = DQO(nll_coef=0.0).evaluation(stats, rows | {"label": torch.ones(2)}, torch.tensor(far[4]))[1][
        "weighted_loss"
    ]
    assert weighted.tolist() == pytest.approx([loss.item(), 2.0])
    assert "weighted_loss" not in told


def test_the_weights_of_log_ratios_are_those_of_the_loss():
    torch.manual_seed(2)
    ratio, boundaries = torch.randn(6), torch.tensor([0, 2, 6])
    for level in ("trajectory", "suffix", "prefix", "token"):
        _, metrics, _, _ = call(DQO(is_level=level), ratio.tolist(), [0.0] * 6, [0.0] * 6, [0.0] * 6, [0, 2, 6])
        weights = DQO(is_level=level).weights(ratio, boundaries)
        assert weights.shape == ((2,) if level == "trajectory" else (6,))
        mean, square = (metrics[f"importance_weight/{name}"][0].item() for name in ("mean", "mean_square"))
        assert [mean, square] == pytest.approx([weights.sum().item(), weights.square().sum().item()], rel=1e-5)
    assert DQO(is_level="none").weights(ratio, boundaries) is None


def test_a_capped_weight_is_counted_as_clipped():
    _, metrics, _, _ = call(DQO(is_cap=0.3), [-1.0, -1.0], [-1.2, -1.3], [0.0, 1.0], [0.0, 0.0], [0, 2])
    assert metrics["importance_weight/clipped_frac"][0] == 2


@pytest.mark.parametrize("cap", [None, -0.2, 0.0, 0.4, 800.0])
@pytest.mark.parametrize("floor", [None, -900.0, -0.3])
@pytest.mark.parametrize("level", ["trajectory", "suffix", "prefix", "token", "none"])
def test_only_what_a_cap_or_a_floor_changed_is_counted_as_clipped(level, cap, floor):
    from dqo_kernels.core.packed import sequence_index
    from dqo_kernels.soft_bellman import importance_weights

    torch.manual_seed(0)
    logprobs, reference = -torch.rand(12) - 1.0, -torch.rand(12) - 1.0
    boundaries = torch.tensor([0, 5, 6, 12])
    objective = DQO(is_level=level, is_cap=cap, is_floor=floor)
    zeros = [0.0] * 12
    _, metrics, _, _ = call(objective, logprobs.tolist(), reference.tolist(), zeros, zeros, boundaries.tolist())
    raw = importance_weights(logprobs - reference, sequence_index(boundaries, 12), boundaries, level, None, None).log()
    outside = (raw > (math.inf if cap is None else cap)) | (raw < (-math.inf if floor is None else floor))
    expected = 0.0 if level == "none" else outside.sum().item()  # a cap of 0 does not change a weight of exactly 1
    assert metrics["importance_weight/clipped_frac"].tolist() == [expected, 12.0]


@pytest.mark.parametrize("change", [{}, {"policy_target": "td", "lam": 0.5}, {"is_cap": 0.1, "gamma": 0.9}], ids=str)
def test_both_losses_have_one_residual_where_the_metrics_say_so(change):
    torch.manual_seed(1)
    columns = [torch.randn(7).tolist() for _ in range(4)]
    _, metrics, logprobs, values = call(DQO(**change), *columns, [0, 3, 7])
    assert metrics["loss/policy"].tolist() == pytest.approx(metrics["loss/value"].tolist(), rel=1e-5)
    _, other, _, _ = call(DQO(policy_target="one_step", lam=0.5), *columns, [0, 3, 7])
    assert other["loss/policy"].tolist() != pytest.approx(other["loss/value"].tolist(), rel=1e-2)


def test_the_bootstrap_on_the_last_row_enters_the_return():
    extra = {"bootstrap": torch.tensor([0.0, 0.7])}
    _, without, _, _ = call(DQO(is_level="none"), [-1.0, -1.0], [-1.0, -1.0], [0.0, 1.0], [0.0, 0.0], [0, 2])
    _, metrics, _, _ = call(DQO(is_level="none"), [-1.0, -1.0], [-1.0, -1.0], [0.0, 1.0], [0.0, 0.0], [0, 2], **extra)
    assert math.isclose((metrics["returns/mean"] - without["returns/mean"])[0].item(), 1.4, rel_tol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.3},
        {"gamma": 0.9},
        {"lam": 0.5},
        {"policy_target": "one_step"},
        {"target": "residual"},
        {"is_level": "token"},
        {"is_cap": 0.1},
        {"is_level": "token", "is_floor": 0.15},
        {"policy_scale": 2.0},
        {"value_coef": 0.5},
        {"kl_coef": 0.1},
        {"nll_coef": 0.1},
        {"target_ema": 0.9},
    ],
)
def test_every_option_changes_the_gradient(change):
    arguments = ([-1.0, -1.1, -0.7], [-1.2, -1.3, -0.8], [0.1, 0.2, 1.0], [0.3, 0.2, 0.1], [0, 3])

    def gradient(objective):
        loss, _, logprobs, values = call(objective, *arguments, target_values=torch.tensor([0.1, 0.4, 0.2]))
        loss.backward()
        return torch.cat([logprobs.grad, values.grad])

    assert not torch.allclose(gradient(DQO()), gradient(DQO(**change)))


def test_soft_values_come_from_the_logsumexps():
    stats = TokenStats(torch.tensor([-1.0]), torch.tensor([2.0], requires_grad=True), torch.zeros(1))
    rows = {
        name: torch.tensor([x])
        for name, x in {"ref_logprobs": -1.0, "ref_lse": 1.0, "rewards": 1.0, "label": 1.0}.items()
    }
    loss, metrics = DQO(beta=0.5, value_model="none")(stats, rows, torch.tensor([0, 1]))
    assert metrics["value/mean"][0] == 0.5  # beta * (2 - 1)
    loss.backward()
    assert stats.lse.grad.item() == pytest.approx(0.5 * (0.5 - 1.0))  # beta * (V - G)


def test_what_the_step_logs():
    objective = DQO(beta=0.5, is_level="none", nll_coef=0.0)
    behavior = torch.tensor([-1.1, -0.6])
    _, metrics, _, _ = call(
        objective, [-1.0, -1.0], [-1.2, -0.6], [0.0, 1.0], [0.3, 0.6], [0, 2], behavior_logprobs=behavior
    )
    expected = {
        "advantages/mean": 0.65,  # 1.2 - 0.3 and 1 - 0.6
        "advantages/std": 0.25,
        "returns/mean": 1.15,
        "value/mean": 0.45,
        "td_error/abs_mean": 0.7,
        "value/explained_variance": 1 - 0.01 / 0.0025,  # errors 0.8 and 0.6, returns 1.1 and 1.2
        "sampling/logp_difference/mean": 0.25,
        "sampling/importance_sampling_ratio/mean": 1.0,
        "rewards/chosen": -0.1,
        "logps/chosen": -2.0,
    }
    found = finished.finish(metrics)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_the_exact_kl_is_added_without_a_weight():
    logits, make, rows, cu_seqlens = random_case([3, 2])
    plain, with_kl = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    without, _ = DQO()(make(plain), rows, cu_seqlens)
    loss, metrics = DQO(kl_coef=0.2)(make(with_kl), rows, cu_seqlens)
    assert DQO(kl_coef=0.2).needs_kl and not DQO().needs_kl
    kl = make(logits).kl
    assert torch.allclose(loss - without, 0.2 * kl.sum())
    assert torch.allclose(metrics["loss/kl"], torch.stack([kl.sum(), torch.tensor(5.0, dtype=kl.dtype)]))
    without.backward(), loss.backward()
    expected = differences(lambda x: 0.2 * make(x).kl.sum(), logits)
    assert torch.allclose(with_kl.grad - plain.grad, expected, atol=1e-8)


def test_the_likelihood_of_correct_responses_is_added_without_a_weight():
    logits, make, rows, cu_seqlens = random_case([3, 2])
    rows = rows | {"label": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=logits.dtype)}
    plain, likely = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    without, _ = DQO(is_level="trajectory", nll_coef=0.0)(make(plain), rows, cu_seqlens)
    loss, metrics = DQO(is_level="trajectory", nll_coef=0.2)(make(likely), rows, cu_seqlens)
    sum_of_logprobs = make(logits).logprobs[:3].sum()
    assert torch.allclose(loss - without, -0.2 * sum_of_logprobs)
    assert torch.allclose(metrics["loss/nll"], torch.stack([-sum_of_logprobs, torch.tensor(3.0, dtype=logits.dtype)]))
    without.backward(), loss.backward()
    expected = differences(lambda x: -0.2 * make(x).logprobs[:3].sum(), logits)
    assert torch.allclose(likely.grad - plain.grad, expected, atol=1e-8)


def test_on_steps_the_likelihood_takes_the_right_tokens_of_any_response():
    logits, make, rows, cu_seqlens = random_case([3, 2])
    lengths = {"right_length": torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0])}  # of a right response, and of a wrong one
    rows = rows | {"label": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])} | lengths
    without, _ = DQO(nll_coef=0.0)(make(logits), rows, cu_seqlens)
    loss, metrics = DQO(nll_coef=0.2, nll_on="steps")(make(logits), rows, cu_seqlens)
    logprobs = make(logits).logprobs
    assert torch.allclose(loss - without, -0.2 * logprobs[[0, 3, 4]].sum()) and metrics["loss/nll"][1] == 3


def test_how_many_tokens_are_right_is_asked_where_the_likelihood_is_on_steps():
    members = episodes(4)
    members[2].wrong_from = 1
    for other in (DQO(), DQO(nll_coef=0.0, nll_on="steps")):
        assert not any(e.columns for (e,) in selected(other, members))
    found = [e.columns["right_length"] for (e,) in selected(DQO(nll_on="steps"), members)]
    assert found[2].tolist() == [1.0] * members[2].action_count
    assert all(
        (column == e.action_count * e.label).all() for i, (column, e) in enumerate(zip(found, members)) if i != 2
    )
    assert DQO(nll_coef=0.0).idle() == ("nll_coef is 0", ("nll_on",)) and DQO().idle() == ("", ())


def test_the_likelihood_is_a_bonus_of_the_advantage_of_correct_responses():
    logits, make, rows, cu_seqlens = random_case([4])
    rows = rows | {"label": torch.ones(4, dtype=logits.dtype)}
    likely, paid = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    DQO(beta=0.5, is_level="none", nll_coef=0.1)(make(likely), rows, cu_seqlens)[0].backward()
    lowered = rows | {"values": (rows["values"] - 0.1 / 0.5).detach()}  # advantages are greater by nll_coef / beta
    DQO(beta=0.5, is_level="none", nll_coef=0.0)(make(paid), lowered, cu_seqlens)[0].backward()
    assert torch.allclose(likely.grad, paid.grad, atol=1e-8)


def test_labels_with_which_the_likelihood_makes_no_sense_are_told():
    zeros_and_ones = np.array([0.0, 1.0, 1.0])

    def said(objective, labels, rewards=zeros_and_ones):
        return objective.advice(labels, rewards)

    likely, mixed = DQO(nll_coef=0.1), [True, False, False]
    assert said(likely, mixed) == [] == said(DQO(nll_coef=0.0), [True] * 3) == said(likely, [])
    assert "every response counts as correct" in said(likely, [True] * 3)[0]
    assert "no effect" in said(likely, [False] * 3)[0]
    assert "3 values, and 1 of 3 responses count as correct" in said(likely, mixed, np.array([0.1, 2.0, 0.3]))[0]
    assert said(DQO(nll_on="steps"), [False] * 3) == []  # it goes by steps


def test_a_moving_average_of_the_values_takes_their_place_in_the_targets_alone():
    logits, make, rows, cu_seqlens = random_case([3, 4])
    averaged = rows["values"] + 0.5

    def gradients(objective, values, **more):
        leaves = logits.clone().requires_grad_(), values.clone().requires_grad_()
        loss, metrics = objective(make(leaves[0]), rows | {"values": leaves[1]} | more, cu_seqlens)
        loss.backward()
        return leaves[0].grad, leaves[1].grad, metrics

    of_policy, of_values, metrics = gradients(DQO(lam=0.5, target_ema=0.9), rows["values"], target_values=averaged)
    alone_policy, alone_values, alone_metrics = gradients(DQO(lam=0.5), averaged)
    assert torch.allclose(of_policy, alone_policy)
    assert torch.allclose(metrics["returns/mean"], alone_metrics["returns/mean"])
    weights = (alone_values - of_values) / 0.5  # w_t (V_t - G_t): the same targets, another live V_t
    assert torch.allclose(weights, weights[[0, 0, 0, 3, 3, 3, 3]]) and (weights > 0).all()


def test_options_out_of_range_are_named():
    def named(**options):
        return [name for name, _ in DQO(**options).problems()]

    assert named(beta=0.0, gamma=1.1, lam=-0.1, is_floor=2.0, kl_coef=-1.0, nll_coef=-1.0, target_ema=1.0) == [
        "beta", "gamma", "lam", "is_floor", "kl_coef", "nll_coef", "target_ema",
    ]  # fmt: skip
    assert named(target_ema=0.99) == []
    assert named(target_ema=0.99, target="residual") == ["target_ema"]
    assert named(target_ema=0.99, value_model="none") == ["target_ema"]


def test_the_value_model_decides_whether_values_are_needed():
    assert [DQO(value_model=kind).needs_values for kind in ("separate", "head", "none")] == [True, True, False]
