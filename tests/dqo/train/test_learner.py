"""What the trainer computes from models and batches, in every precision and with every memory option."""

from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.harness.memory import extra_memory
from dqo.data.batches import collate
from dqo.models.architecture import recompute_activations
from dqo.models.critic import make_value_model
from dqo.models.policy import load_policy, policy_stats
from dqo.objectives import DPO, DQO, SFT
from dqo.train.learner import Learner, objective_sums
from dqo_kernels import linear_row_loss
from tests.dqo.helpers import episodes, gradients, policy

OBJECTIVES = [DQO(), DQO(value_model="separate"), DQO(value_model="none"), DPO(), SFT()]


def learner(objective, bf16=False, checkpointing=False, **size):
    model = policy(**size)
    value_model = None
    if objective.needs_values:
        value_model = make_value_model(objective.value_model, model)
        torch.manual_seed(1)
        for parameter in list(value_model.parameters())[-2:]:
            torch.nn.init.normal_(parameter, std=0.3)
    if checkpointing:
        recompute_activations(model)
        if isinstance(value_model, PreTrainedModel):
            recompute_activations(value_model)
    return Learner(model, value_model, bf16=bf16)


def loss_and_gradient(objective, batch, **options):
    made = learner(objective, **options)
    loss, metrics = objective_sums(made, objective, batch)
    loss.backward()
    return loss.item(), gradients(made), metrics


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__} {getattr(o, 'value_model', '')}")
def test_gradient_checkpointing_changes_no_gradient(objective):
    batch = collate(episodes(6), 0)
    loss, gradient, _ = loss_and_gradient(objective, batch)
    again, recomputed, _ = loss_and_gradient(objective, batch, checkpointing=True)
    assert again == loss
    assert torch.equal(recomputed, gradient) and gradient.any()


def test_gradient_checkpointing_saves_memory():
    objective, batch = SFT(), collate(episodes(6) * 200, 0)

    def peak(checkpointing):
        made = learner(objective, checkpointing=checkpointing, layers=6)

        def step():
            loss, _ = objective_sums(made, objective, batch)
            loss.backward()

        return extra_memory(step, torch.device("cpu"))[0].peak

    assert peak(True) < 0.6 * peak(False)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__} {getattr(o, 'value_model', '')}")
def test_bf16_is_near_float32_and_leaves_float32_gradients(objective):
    batch = collate(episodes(6), 0)
    loss, gradient, _ = loss_and_gradient(objective, batch)
    near, rounded, _ = loss_and_gradient(objective, batch, bf16=True)
    assert near == pytest.approx(loss, rel=0.03)
    assert near != loss
    assert torch.nn.functional.cosine_similarity(gradient, rounded, dim=0) > 0.99
    made = learner(objective, bf16=True)
    objective_sums(made, objective, batch)[0].backward()
    assert {p.grad.dtype for p in made.parameters() if p.grad is not None} == {torch.float32}


def test_in_bf16_a_policy_that_is_its_reference_has_no_exact_kl():
    class WithKL(DQO):
        needs_kl = True

        def __call__(self, stats, rows, cu_seqlens):
            return stats.kl.sum(), {"kl/max row": torch.stack([stats.kl.detach().amax(), stats.kl.new_tensor(1.0)])}

    batch = collate(episodes(6), 0)
    loss, metrics = objective_sums(Learner(policy(), reference=policy(), bf16=True), WithKL(value_model="none"), batch)
    assert loss == 0 and metrics["kl/max row"][0] == 0


def test_the_reference_is_never_trained():
    class WithKL(DQO):
        needs_kl = True

        def __call__(self, stats, rows, cu_seqlens):
            return stats.kl.sum(), {}

    made = Learner(policy(seed=1), reference=policy())
    loss, _ = objective_sums(made, WithKL(value_model="none"), collate(episodes(6), 0))
    loss.backward()
    assert loss > 0 and gradients(made.policy).any()
    assert all(p.grad is None and not p.requires_grad for p in made.reference.parameters())


def test_weights_kept_in_bfloat16_give_statistics_near_those_in_float32(tmp_path):
    policy().save_pretrained(tmp_path)
    batch = collate(episodes(6), 0)
    kept = load_policy(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert torch.allclose(policy_stats(kept, batch).logprobs, policy_stats(policy(), batch).logprobs, atol=0.05)


def test_values_are_logged_with_their_extremes():
    _, _, metrics = loss_and_gradient(DQO(), collate(episodes(6), 0))
    assert metrics["value/min"] < metrics["value/mean"][0] / metrics["value/mean"][1] < metrics["value/max"]


@pytest.mark.parametrize("workspace", [None, 4096, 1])
def test_groups_are_numbered_from_zero_in_every_call(monkeypatch, workspace):
    """Whole groups that fit a workspace are one call."""
    sizes, calls = [2, 1, 3, 1, 2], []

    class Counting(SFT):
        def __call__(self, stats, rows, cu_seqlens):
            calls.append(rows["group"][cu_seqlens[:-1]].tolist())
            return super().__call__(stats, rows, cu_seqlens)

    monkeypatch.setattr("dqo.train.learner.linear_row_loss", partial(linear_row_loss, workspace_bytes=workspace))
    objective_sums(learner(SFT()), Counting(), collate(episodes(sum(sizes)), 0, sizes=sizes))
    found = []  # sizes again
    for call in calls:
        assert call == sorted(call) and set(call) == set(range(call[-1] + 1))
        found += [call.count(group) for group in range(call[-1] + 1)]
    assert found == sizes and len(calls) == {None: 1, 1: 5}.get(workspace, len(calls))
