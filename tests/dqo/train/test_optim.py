import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dqo.train import optim


def test_weight_decay_spares_vectors():
    model = nn.Linear(2, 2)
    optimizer = optim.make_optimizer(model, 0.1, 0.5, (0.9, 0.999), 1e-8)
    model(torch.zeros(1, 2)).sum().mul(0).backward()  # zero gradients: only the decay acts
    bias, weight = model.bias.clone(), model.weight.clone()
    optim.update(optimizer, 0.1)
    assert torch.equal(model.bias, bias)
    assert torch.allclose(model.weight, weight * (1 - 0.1 * 0.5))


def test_clipping_reports_the_norm_before_it_and_the_update_takes_the_clipped_gradient():
    model = nn.Linear(1, 1, bias=False)
    optimizer = optim.make_optimizer(model, 0.1, 0.0, (0.9, 0.999), 1e-8)
    model(torch.full((1, 1), 30.0)).sum().backward()
    assert optim.clip(model, 1.0) == pytest.approx(30.0)
    assert model.weight.grad.item() == pytest.approx(1.0)
    before = model.weight.clone()
    optim.update(optimizer, 0.25)  # AdamW's first step is the learning rate long
    assert (before - model.weight).item() == pytest.approx(0.25)
    assert model.weight.grad is not None
    model(torch.full((1, 1), math.inf)).sum().backward()
    assert not math.isfinite(optim.clip(model, 1.0))


@given(st.integers(1, 10_000), st.integers(0, 10_000_000))
def test_epochs_of_whole_steps_are_those_steps(per_epoch, steps):
    """Whatever the floats: epochs = steps / per_epoch, also a rounding error away from it."""
    for epochs in (steps / per_epoch, math.nextafter(steps / per_epoch, math.inf), steps * (1 / per_epoch)):
        assert optim.steps_of(epochs, per_epoch) == max(1, steps)


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.floats(1e-6, 1.0))
def test_a_part_of_a_step_is_a_step(per_epoch, steps, part):
    assert optim.steps_of((steps + part) / per_epoch, per_epoch) == steps + 1


def test_epochs_known_by_hand():
    known = {(0.625, 4): 3, (0.3, 10): 3, (0.1 + 0.2, 10): 3, (1e-9, 4): 1, (1 / 3, 3): 1, (2 / 3, 3): 2, (1.0, 7): 7}
    assert {case: optim.steps_of(*case) for case in known} == known
