"""What holds for every objective, by the contract of dqo/objectives/base.py."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from dqo.config.options import load_options
from dqo.data.selection import selected
from dqo.errors import UserError
from dqo.objectives import DQO, DRO, OBJECTIVES, OREO, RTO
from dqo.objectives.base import UNITS, Objective
from dqo.train.inputs import load_rows
from dqo_kernels import TokenStats, linear_row_loss, linear_token_stats
from tests.dqo.helpers import episodes
from tests.dqo.objectives.packed import VOCAB, random_case

CASES = [cls() for cls in OBJECTIVES.values()] + [DQO(kl_coef=0.5), DQO(value_model="none"), OREO(level="response")]
CASES += [DQO(nll_coef=0.5), RTO(algorithm="dqo"), OREO(level="step"), DRO(value_states="all")]
every_objective = pytest.mark.parametrize("objective", CASES, ids=repr)


def chosen(objective, members):
    """Its groups of episodes, each of which is a sample of the reference where it asks."""
    return selected(objective, members, lambda: {e.source for e in members})


def has_companions(objective):
    return type(objective).companion_sums is not Objective.companion_sums


def complete(count):
    """Episodes that lack nothing that a method reads."""
    found = episodes(count)
    for e in found:
        e.behavior_logprobs = np.zeros(e.action_count, np.float32)
        e.step_ends = [e.action_count // 2, e.action_count - 1]
        e.step_rewards, e.prompt_value = [0.75, 1.0], 0.5
    return found


def case(objective, lengths):
    """A random case, with the columns that the objective's prepare adds, and the means that the trainer makes of `step_sums`."""
    logits, make, rows, cu_seqlens = random_case(lengths)
    generator = torch.Generator().manual_seed(1)
    for name in chosen(objective, complete(8))[0][0].columns.keys() - rows.keys():
        rows[name] = torch.rand(len(lengths), generator=generator, dtype=torch.float64).repeat_interleave(
            cu_seqlens.diff()
        )
    if objective.needs_step_sums:
        sums = objective.step_sums(make(logits), rows, cu_seqlens)
        rows |= {name: torch.full_like(rows["values"], (pair[0] / pair[1]).item()) for name, pair in sums.items()}
    return logits, make, rows, cu_seqlens


@every_objective
def test_it_declares_what_it_needs(objective):
    assert objective.unit in UNITS
    for name in ("needs_reference", "needs_values", "needs_kl", "needs_contrast", "fits_rewards"):
        assert isinstance(getattr(objective, name), bool)
    assert objective.problems() == []
    assert objective.needs_values == (objective.value_kind != "none")
    groups = chosen(objective, complete(8))
    assert groups and {len(group) for group in groups} == {objective.group_size} or objective.group_size is None
    assert has_companions(objective) == any(e.companion is not None for group in groups for e in group)


@every_objective
def test_it_reads_no_more_than_it_declares(objective):
    logits, make, rows, cu_seqlens = case(objective, [2, 3, 1, 4])
    stats = make(logits)
    if not objective.needs_kl:
        stats = stats._replace(ref_logprobs=None, ref_lse=None, kl=None)
    absent = {"behavior_logprobs"} if getattr(objective, "behavior", "") != "stored" else set()
    absent |= set() if objective.needs_values else {"values"}
    absent |= {"values"} if objective.value_kind == "q_model" else {"q"}
    absent |= set() if objective.values_decay is not None else {"target_values"}
    absent |= set() if objective.needs_steps else {"step"}
    absent |= set() if objective.discount_at == "turns" else {"turn_end"}
    absent |= set() if objective.needs_reference else {"ref_logprobs", "ref_lse"}
    absent |= set() if objective.asks else {"known"}
    absent |= set() if has_companions(objective) else {"companion_mean"}
    loss, _ = objective(stats, {name: x for name, x in rows.items() if name not in absent}, cu_seqlens)
    assert torch.isfinite(loss)


@every_objective
def test_loss_and_metrics_are_sums_over_micro_batches(objective):
    logits, make, rows, cu_seqlens = case(objective, [2, 3, 1, 4])
    stats = make(logits)
    whole, metrics = objective(stats, rows, cu_seqlens)
    loss, added = 0.0, {}
    for first, last in ((0, 2), (2, 4)):
        own = slice(int(cu_seqlens[first]), int(cu_seqlens[last]))
        columns = {name: x[own] for name, x in rows.items()}
        boundaries = cu_seqlens[first : last + 1] - cu_seqlens[first]
        part, more = objective(TokenStats(*(x[own] for x in stats)), columns, boundaries)
        loss = loss + part
        added = {name: added.get(name, 0) + value for name, value in more.items()}
    assert torch.allclose(whole, loss)
    assert metrics.keys() == added.keys()
    for name, value in metrics.items():
        assert value.shape == (2,) and not value.requires_grad
        assert torch.allclose(value, added[name]), name


@every_objective
def test_the_held_out_loss_is_a_sum_over_micro_batches_and_has_no_weights(objective):
    logits, make, rows, cu_seqlens = case(objective, [2, 3, 1, 4])
    loss, metrics = objective.evaluation(make(logits), rows, cu_seqlens)
    plain = objective
    if objective.weight_level != "none":
        plain = dataclasses.replace(objective, is_level="none")
        assert metrics["weighted_loss"][0] != loss
    assert loss == plain(make(logits), rows, cu_seqlens)[0]
    assert all(value.shape == (2,) and not value.requires_grad for value in metrics.values())


@every_objective
def test_from_hidden_states_it_has_the_loss_and_gradients_of_the_logits(objective):
    lengths = [2, 3, 1, 4]
    _, _, rows, cu_seqlens = case(objective, lengths)
    rows = {name: x.float() if x.is_floating_point() else x for name, x in rows.items()}
    torch.manual_seed(0)
    weight, ref_weight = torch.randn(2, VOCAB, 5)
    hidden, ref_hidden = torch.randn(2, sum(lengths), 5)
    actions = torch.randint(VOCAB, (sum(lengths),))
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight} if objective.needs_kl else {}

    def gradients(loss_of):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, rows["values"])]
        loss, metrics = loss_of(*leaves)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return loss, metrics, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]

    def fused(hidden, weight, values):
        columns, groups = rows | {"values": values}, torch.arange(0, 5, objective.group_size or 2)
        return linear_row_loss(
            hidden, weight, actions, objective, cu_seqlens, rows=columns, cu_groups=groups, **reference
        )

    def plain(hidden, weight, values):
        stats = linear_token_stats(hidden, weight, actions, **reference, backend="reference")
        return objective(stats, rows | {"values": values}, cu_seqlens)

    ours, our_metrics, our_gradients = gradients(fused)
    loss, metrics, expected = gradients(plain)
    assert torch.allclose(ours, loss, rtol=1e-5)
    assert our_metrics.keys() == metrics.keys()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(our_gradients, expected))
    assert our_gradients[0].abs().max() > 0


@every_objective
def test_it_is_made_of_its_flags(objective):
    changed = dataclasses.replace(objective)  # frozen, and its fields are all there is
    assert changed == objective
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.beta = 1.0


@pytest.mark.parametrize("method", OBJECTIVES)
def test_equal_rewards_are_refused_where_they_leave_nothing_to_learn(method, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    rows = [{"prompt": p, "completion": "x", "reward": 1.0, "label": p == "a"} for p in ("a", "b")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = load_options(["--method", method, "--dataset_name", str(path), "--eval_fraction", "0"])
    if options.objective.needs_contrast:
        with pytest.raises(UserError, match="nothing to learn"):
            load_rows(options)
    else:
        assert len(load_rows(options)[0]) == 2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_option_that_keeps_responses_likely_is_one_of_the_method(name):
    option = OBJECTIVES[name].likelihood_option
    assert option is None or option in {f.name for f in dataclasses.fields(OBJECTIVES[name])}
    assert (option is not None) or name not in ("dqo", "dpo")
