"""The two cross-entropies: against their equations, against differences, and in every objective with a value model."""

import dataclasses
import math

import pytest
import torch

from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.objectives import DQO, DRO, OREO
from dqo.objectives.value_outputs import (
    BINS,
    MARGIN,
    cross_entropy,
    output_count,
    outputs_for,
    target_masses,
    value_losses,
    values_of,
)
from tests.dqo.objectives.packed import differences, random_case

LOW, HIGH = -0.5, 2.0
KINDS = ["bce", "hl_gauss"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def ends(n):
    return torch.full((n,), LOW, dtype=torch.float64), torch.full((n,), HIGH, dtype=torch.float64)


def rows_with(rows, kind, seed=1):
    n = len(rows["values"])
    torch.manual_seed(seed)
    outputs = torch.randn(n, output_count(kind), dtype=torch.float64)
    bounds = torch.tensor([LOW, HIGH], dtype=torch.float64).expand(n, 2)
    return rows | {"values": values_of(outputs, LOW, HIGH), "value_outputs": outputs, "value_range": bounds}


def test_bce_is_the_cross_entropy_of_the_chance_of_the_greatest_return():
    z, g = torch.tensor([[0.3], [-2.0]], dtype=torch.float64), torch.tensor([1.5, -0.5], dtype=torch.float64)
    found = cross_entropy(z, g, *ends(2))
    chance, share = 1 / (1 + math.exp(-0.3)), 2.0 / 2.5
    assert found[0] == pytest.approx(-share * math.log(chance) - (1 - share) * math.log(1 - chance))
    assert found[1] == pytest.approx(math.log(1 + math.exp(-2.0)))  # the least return: -log(1 - p)
    assert values_of(z, LOW, HIGH)[0] == pytest.approx(LOW + 2.5 * chance)


def test_hl_gauss_has_the_masses_of_a_normal_distribution_and_their_mean_is_the_return():
    returns = torch.linspace(LOW, HIGH, 41, dtype=torch.float64)
    width = (HIGH - LOW) / (BINS - 2 * MARGIN)
    masses = target_masses(returns, *ends(41))
    middles = LOW + width * (torch.arange(BINS, dtype=torch.float64) - MARGIN + 0.5)
    normal = torch.distributions.Normal(returns[:, None], 0.75 * width)
    expected = normal.cdf(middles + width / 2) - normal.cdf(middles - width / 2)
    assert torch.allclose(masses, expected / expected.sum(-1, keepdim=True), atol=1e-12)
    assert (masses @ middles - returns).abs().max() < 0.05 * width  # at both ends too
    assert torch.allclose(values_of(masses.clamp_min(1e-300).log(), LOW, HIGH), masses @ middles)


@every_kind
@pytest.mark.parametrize("value", [LOW, -0.49, 0.1, 1.9, HIGH])
def test_a_value_model_can_start_at_any_value_but_the_very_ends(kind, value):
    found = values_of(outputs_for(kind, value, LOW, HIGH), LOW, HIGH).item()
    assert found == pytest.approx(min(max(value, LOW + 0.0025), HIGH - 0.0025), abs=1e-4)
    assert outputs_for("squared", value, 0.0, 0.0).tolist() == pytest.approx([value])


@every_kind
def test_what_minimises_it_is_the_mean_of_the_returns(kind):
    """Outputs of one state that is seen with several returns."""
    returns = torch.tensor([LOW, LOW, 0.2, HIGH], dtype=torch.float64)
    outputs = torch.zeros(output_count(kind), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([outputs], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        found = cross_entropy(outputs.expand(4, -1), returns, *ends(4)).mean()
        found.backward()
        return found

    optimizer.step(loss)
    width = (HIGH - LOW) / (BINS - 2 * MARGIN)
    assert values_of(outputs.detach(), LOW, HIGH).item() == pytest.approx(returns.mean().item(), abs=0.05 * width)


@every_kind
@pytest.mark.parametrize(
    "objective, states", [(DQO(), 6), (DRO(), 3), (OREO(), 6), (OREO(level="response"), 3)], ids=repr
)
def test_in_every_objective_its_gradient_is_that_of_differences(kind, objective, states):
    logits, make, rows, cu_seqlens = random_case([2, 3, 1])
    stats, rows = make(logits), rows_with(rows | {"rewards": 3 * rows["rewards"]}, kind)  # some are beyond both ends
    made = dataclasses.replace(objective, value_loss=kind, value_coef=0.7)
    assert made.problems() == []

    def value_part(outputs):
        """With V held: it is a constant of the policy's loss."""
        return made(stats, rows | {"value_outputs": outputs}, cu_seqlens)

    outputs = rows["value_outputs"].clone().requires_grad_()
    loss, metrics = value_part(outputs)
    (gradient,) = torch.autograd.grad(loss, outputs)
    direction = torch.randn(*outputs.shape, 3, dtype=torch.float64)  # along three directions of all outputs
    moved = lambda x: value_part(rows["value_outputs"] + direction @ x)[0]  # noqa: E731
    expected = differences(moved, torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(gradient.flatten() @ direction.flatten(0, 1), expected, atol=1e-6)
    assert gradient.any(-1).sum() == states  # every state, or the first of each response
    plain = dataclasses.replace(made, value_coef=0.0)(stats, rows, cu_seqlens)[0]
    assert torch.allclose(loss - 0.7 * metrics["loss/value"][0], plain)  # the policy's part is as ever
    assert metrics["returns/clipped_frac"].shape == (2,) and metrics["returns/clipped_frac"][0] > 0


def test_the_weights_and_the_clipped_returns_are_those_of_the_loss():
    rows = rows_with({"values": torch.zeros(3, dtype=torch.float64)}, "bce")
    returns, weights = torch.tensor([9.0, 0.5, -3.0], dtype=torch.float64), torch.tensor([2.0, 0.5, 1.0]).double()
    found, metrics = value_losses(rows, torch.zeros(3), returns, weights)
    expected = cross_entropy(rows["value_outputs"], torch.tensor([HIGH, 0.5, LOW]).double(), *ends(3)) * weights
    assert torch.equal(found, expected)
    assert metrics["returns/clipped_frac"].tolist() == [2, 3]
    at = torch.tensor([2, 0])
    assert torch.allclose(value_losses(rows, torch.zeros(2), returns[at], weights[at], at)[0], expected[at])


@every_kind
def test_a_residual_that_trains_both_of_its_ends_fits_values_alone(kind):
    with pytest.raises(UserError, match=f"value_loss must be squared with target residual.*got {kind} "):
        load_options(["--target", "residual", "--value_loss", kind])
