import math

import pytest
import torch
from torch import nn

from dqo import optim


def test_warmup_rises_linearly_and_cosine_falls_to_zero():
    factors = [optim.schedule(step, 10, 2, "cosine") for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert factors == sorted(factors[:2]) + sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.05


def test_linear_and_constant_schedules():
    assert optim.schedule(5, 10, 0, "linear") == 0.5
    assert optim.schedule(9, 10, 0, "constant") == 1.0


def test_steps_below_one_are_a_share():
    assert (optim.as_steps(0.1, 95), optim.as_steps(7, 95), optim.as_steps(0, 95)) == (10, 7, 0)


def test_weight_decay_spares_vectors():
    model = nn.Linear(2, 2)
    optimizer = optim.make_optimizer(model, 0.1, 0.5, (0.9, 0.999), 1e-8)
    model(torch.zeros(1, 2)).sum().mul(0).backward()  # zero gradients: only the decay acts
    bias, weight = model.bias.clone(), model.weight.clone()
    optim.apply(optimizer, model, 0.1, 1.0)
    assert torch.equal(model.bias, bias)
    assert torch.allclose(model.weight, weight * (1 - 0.1 * 0.5))


def test_clipping_reports_the_norm_before_it_and_a_bad_norm_leaves_the_model_alone():
    model = nn.Linear(1, 1, bias=False)
    optimizer = optim.make_optimizer(model, 0.1, 0.0, (0.9, 0.999), 1e-8)
    model(torch.full((1, 1), 30.0)).sum().backward()
    assert optim.apply(optimizer, model, 0.1, 1.0) == pytest.approx(30.0)
    before = model.weight.clone()
    model(torch.full((1, 1), math.inf)).sum().backward()
    assert not math.isfinite(optim.apply(optimizer, model, 0.1, 1.0))
    assert torch.equal(model.weight, before)
