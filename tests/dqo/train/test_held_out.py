"""Evaluation on held-out responses: one forward pass says all, and what log(pi/ref) knows is measured as it is defined."""

import dataclasses

import numpy as np
import pytest
import torch

from dqo.credit.quality import Judged, quality_of
from dqo.data.batches import Batching, collate, distinct, groups_of
from dqo.models.critic import make_value_model
from dqo.models.policy import policy_stats
from dqo.objectives import DPO, DQO, DRO, KTO, OREO, SFT
from dqo.processes import Processes
from dqo.train.engine import Engine
from dqo.train.held_out import held_out_metrics, tokens_of
from dqo.train.learner import Learner, values_of
from tests.dqo.helpers import episodes, policy

CREDIT = {f"eval_credit/{name}" for name in ("auc", "auc_within_prompt", "first_wrong_step", "first_wrong_step_chance")}


def members(count=12, **changes):
    """Two steps each where there is room, the first wrong one on responses that are wrong."""
    found = episodes(count, **changes)
    for e in found:
        e.step_ends = [0, e.action_count - 1] if e.action_count > 1 else [0]
        e.first_wrong_step = None if e.label else len(e.step_ends) - 1
    return found


def engine(objective, tokens, reference=None):
    model = policy()
    critic = make_value_model(objective.value_model, model) if objective.needs_values else None
    learner = Learner(model, critic, reference)
    return Engine(learner, learner, Batching(0, tokens), Processes())


@pytest.mark.parametrize(
    "objective",
    [DQO(), DQO(value_model="separate"), DPO(), KTO(), DRO(), OREO(), SFT()],
    ids=lambda o: type(o).__name__,
)
def test_one_forward_pass_says_what_each_token_has(objective):
    given = members()
    if isinstance(objective, KTO):
        for e, other in zip(given, [*given[4:], *given[:4]]):
            e.companion = dataclasses.replace(other, prompt_ids=e.prompt_ids)
    groups = groups_of(given, objective.group_size)
    groups += [[given[0], given[1]], [given[3], given[1]]] if objective.group_size == 2 else []  # pairs share responses
    ours = engine(objective, 40, policy(seed=1) if objective.needs_kl else None)
    passes = {"policy": 0, "critic": 0}
    trunks = {"policy": ours.learner.policy.base_model}
    if objective.needs_values and objective.value_model != "head":
        trunks["critic"] = ours.learner.value_model.base_model
    for name, trunk in trunks.items():
        trunk.register_forward_hook(lambda *_, name=name: passes.__setitem__(name, passes[name] + 1))
    batches = []
    found, tokens = held_out_metrics(ours, objective, groups, lambda planned: batches.append(planned))
    companions = len(batches) if isinstance(objective, KTO) else 0
    assert len(batches) <= passes["policy"] <= len(batches) + 2 * companions and len(batches) > 2
    if not companions:
        assert passes["policy"] == len(batches) and passes["critic"] in (0, len(batches))
    once = distinct(groups)
    assert len(tokens) == len(once) == 12
    for e, said in zip(once, tokens):
        batch = collate([e], 0)
        stats = policy_stats(ours.learner.policy, batch)
        np.testing.assert_allclose(said["logprobs"], stats.logprobs.detach(), atol=1e-5)
        np.testing.assert_allclose(said["entropy"], stats.entropy.detach(), atol=1e-5)
        assert ("values" in said) == objective.needs_values
        if objective.needs_values:
            np.testing.assert_allclose(said["values"], values_of(ours.learner, batch), atol=1e-5)
    again = tokens_of(ours.learner, collate(once, 0))
    assert all(said.keys() == other.keys() for said, other in zip(tokens, again))
    assert found.keys() >= CREDIT


def test_credit_is_that_of_log_pi_over_ref():
    given, objective = members(40), DQO(value_model="none", beta=0.3)
    ours = engine(objective, 10**6)
    found, tokens = held_out_metrics(ours, objective, [[e] for e in given])
    scores = [said["logprobs"] - e.ref_logprobs for e, said in zip(given, tokens)]
    expected = quality_of(
        [Judged(e.prompt_index, e.label, s, e.step_ends, e.first_wrong_step) for e, s in zip(given, scores)]
    )
    assert {name for name in found if "credit" in name} == CREDIT
    for name, measure in expected._asdict().items():
        assert found[f"eval_credit/{name}"] == pytest.approx(measure.mean)
    assert found["eval_credit/first_wrong_step"] != found["eval_credit/first_wrong_step_chance"] == 0.5


def test_an_untrained_policy_ranks_nothing_though_batches_of_other_shapes_round_otherwise():
    given, objective = members(40), DQO(value_model="none")
    ours = engine(objective, 10**6)
    rng = np.random.default_rng(0)
    for e in (
        given
    ):  # whether a batch of another shape rounds otherwise is the processor's affair: here each token does or not
        alone = tokens_of(ours.learner, collate([e], 0))[0]["logprobs"]
        e.ref_logprobs = np.nextafter(alone, rng.choice(np.float32([-99, 0]), alone.shape))
    found, tokens = held_out_metrics(ours, objective, [[e] for e in given])
    assert any((said["logprobs"] != e.ref_logprobs).any() for e, said in zip(given, tokens))
    assert found["eval_credit/auc"] == found["eval_credit/auc_within_prompt"] == 0.5
    assert found["eval_credit/first_wrong_step"] == found["eval_credit/first_wrong_step_chance"] == 0.5


def test_what_the_responses_do_not_tell_is_left_out():
    def names(objective, given):
        found, _ = held_out_metrics(engine(objective, 10**6), objective, [[e] for e in given])
        return {name.removeprefix("eval_credit/") for name in found if "credit" in name}

    assert names(SFT(), members(reference=False)) == set()
    without_steps = [dataclasses.replace(e, step_ends=[], first_wrong_step=None) for e in members()]
    assert names(DQO(), without_steps) == {"auc", "auc_within_prompt"}
    all_right = [e for e in members() if e.label]
    assert names(DQO(), all_right) == set()
    broken = engine(DQO(value_model="none"), 10**6)
    with torch.no_grad():
        broken.learner.policy.base_model.embed_tokens.weight.fill_(float("nan"))
    found, _ = held_out_metrics(broken, DQO(value_model="none"), [[e] for e in members()])
    assert not {name for name in found if "credit" in name} and "eval_entropy" in found
