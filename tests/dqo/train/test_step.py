import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.harness.memory import extra_memory
from dqo.data.batches import Batching, collate, groups_of, micro_batch_plan
from dqo.errors import UserError
from dqo.models import attention
from dqo.models.critic import make_value_model, value_model_from, value_rows
from dqo.objectives import DPO, DQO, DRO, KTO, OREO, SFT
from dqo.processes import Processes
from dqo.train.engine import Engine
from dqo.train.learner import Learner, objective_sums
from dqo.train.step import accumulate
from dqo_kernels.core import dispatch
from dqo_kernels.linear.inputs import WORKSPACE_BYTES
from tests.dqo.helpers import episodes, gradients, policy

OBJECTIVES = [DQO(), DQO(lam=0.9, is_level="suffix"), DQO(value_model="none"), DQO(target="residual"), SFT(), DPO()]
OBJECTIVES += [DRO(), OREO(), OREO(alpha=0.0, level="response"), KTO(), DQO(kl_coef=0.1), DQO(value_model="separate")]
OBJECTIVES += [DQO(nll_coef=0.1)]
LONG = 10**6  # tokens of a micro-batch that holds everything


def setup(objective, terminated=True):
    model = policy()
    critic = make_value_model(objective.value_model, model) if objective.needs_values else None
    if critic is not None:
        torch.manual_seed(1)
        for parameter in list(critic.parameters())[-2:]:
            torch.nn.init.normal_(parameter, std=0.3)
    members = episodes(12, terminated=terminated)
    for e, other in zip(members, [*members[4:], *members[:4]] if isinstance(objective, KTO) else ()):
        e.companion = dataclasses.replace(other, prompt_ids=e.prompt_ids)
    return Learner(model, critic, policy(seed=1) if objective.needs_kl else None), members


def gradient(objective, groups, max_tokens, learner, **options):
    learner.zero_grad(set_to_none=True)
    batching = Batching(0, max_tokens, packed=attention.packs(learner.policy))
    accumulate(Engine(learner, learner, batching, Processes()), objective, groups, **options)
    return gradients(learner)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("max_tokens", [1, 24, 40])
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(objective, max_tokens, packed):
    learner, members = setup(objective)
    groups = groups_of(members, objective.group_size)
    whole = gradient(objective, groups, LONG, learner)
    if packed:
        for model in learner.children():
            if isinstance(model, PreTrainedModel):
                attention.enable(model)
    assert len(micro_batch_plan(groups, 1, max_tokens, packed)[0]) > 2
    split = gradient(objective, groups, max_tokens, learner)
    assert whole.abs().max() > 0
    assert torch.allclose(whole, split, atol=1e-6 * whole.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("objective", [DQO(), DPO()], ids=lambda o: type(o).__name__)
def test_padding_does_not_change_the_loss(objective):
    learner, members = setup(objective)
    loss, _ = objective_sums(learner, objective, collate(members, 0))
    longer = dataclasses.replace(members[0], prompt_ids=[4] * 30)  # everything else gets 30 more pads
    with_other, _ = objective_sums(learner, objective, collate([*members, longer, longer], 0))
    alone, _ = objective_sums(learner, objective, collate([longer, longer], 0))
    assert torch.allclose(loss + alone, with_other, rtol=1e-5)


def test_the_loss_does_not_depend_on_what_the_pads_hold():
    learner, members = setup(DQO())
    losses = [objective_sums(learner, DQO(), collate(members, pad))[0] for pad in (0, 2, 7)]
    assert losses[0] == losses[1] == losses[2]


def test_the_value_of_a_state_does_not_depend_on_what_follows():
    learner, members = setup(DQO(value_model="separate"))
    before, _ = value_rows(learner.value_model, collate(members, 0))
    e = members[3]
    changed = [*members]
    changed[3] = dataclasses.replace(e, completion_ids=[*e.completion_ids[:-1], 3 + (e.completion_ids[-1] - 2) % 16])
    after, _ = value_rows(learner.value_model, collate(changed, 0))
    assert torch.equal(before, after)  # row t is the state before action t: the last action is in no state


def test_the_value_loss_leaves_the_policy_alone():
    learner, members = setup(DQO())
    gradient(DQO(policy_scale=0.0, nll_coef=0.0), [[e] for e in members], LONG, learner)
    assert not gradients(learner.policy).any()
    assert gradients(learner.value_model).abs().max() > 0


def test_the_policy_loss_leaves_the_value_model_alone():
    learner, members = setup(DQO())
    gradient(DQO(value_coef=0.0), [[e] for e in members], LONG, learner)
    assert not gradients(learner.value_model).any()
    assert gradients(learner.policy).abs().max() > 0


def test_value_warmup_trains_the_value_model_alone():
    learner, members = setup(DQO())
    gradient(DQO(), [[e] for e in members], LONG, learner, trains=("critic",))
    assert all(p.grad is None for p in learner.policy.parameters())
    assert gradients(learner.value_model).abs().max() > 0


def test_a_frozen_critic_is_read_and_gets_no_gradient():
    learner, members = setup(DQO())
    gradient(DQO(), [[e] for e in members], LONG, learner)
    whole = gradients(learner.policy)
    gradient(DQO(), [[e] for e in members], LONG, learner, trains=("policy",))
    assert all(p.grad is None for p in learner.value_model.parameters())
    assert torch.equal(gradients(learner.policy), whole) and whole.any()


def test_a_response_that_did_not_end_is_bootstrapped_with_the_value_of_its_last_state():
    objective = DQO(is_level="none", value_model="separate")
    learner, ended = setup(objective)
    _, cut = setup(objective, terminated=False)
    _, with_end = objective_sums(learner, objective, collate(ended, 0))
    batch = collate(cut, 0)
    _, without = objective_sums(learner, objective, batch)
    _, end_values = value_rows(learner.value_model, batch)
    lengths = batch.cu_seqlens.diff()
    expected = (end_values * lengths).sum()  # lambda = gamma = 1: every return grows by b
    assert torch.allclose(without["returns/mean"][0] - with_end["returns/mean"][0], expected, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_rows():
    learner, members = setup(DQO())
    members[2].rewards[0] = float("nan")
    with pytest.raises(UserError, match="the loss is nan .*row"):
        gradient(DQO(), [[e] for e in members], LONG, learner)


@pytest.mark.slow
@pytest.mark.skipif(
    dispatch.unavailable("cpp") is not None, reason="its reference backend recomputes; see the kernels' tests"
)
@pytest.mark.parametrize("objective", OBJECTIVES[:6], ids=lambda o: type(o).__name__)
def test_a_step_with_a_large_vocabulary_never_holds_the_logits_of_all_rows(objective):
    vocab, width, length = 151_936, 16, 200
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    learner = Learner(model, value_model_from(model) if objective.needs_values else None)
    rng = np.random.default_rng(0)
    members = [
        dataclasses.replace(
            e, completion_ids=rng.integers(vocab, size=length).tolist(), rewards=np.zeros(length, np.float32),
            ref_logprobs=np.full(length, -11.9, np.float32), ref_lse=np.full(length, 11.9, np.float32),
        )
        for e in episodes(4)
    ]  # fmt: skip
    groups = groups_of(members, objective.group_size)
    extra, _ = extra_memory(lambda: gradient(objective, groups, LONG, learner), torch.device("cpu"))
    weights = vocab * width * 4
    # The workspace, the gradients of head, embedding and the critic's embedding, and what the little model needs.
    assert extra.peak < WORKSPACE_BYTES["cpu"] + 5 * weights < 4 * length * vocab * 4
    assert model.lm_head.weight.grad.abs().max() > 0
