"""DPO and KTO beside TRL's own losses: value, and gradient with respect to the logits."""

import importlib.util

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.trainer import trl_steps
from dqo.data.batches import collate
from dqo.data.selection import selected
from dqo.objectives import DPO, KTO
from dqo_kernels import token_stats
from tests.dqo.helpers import episodes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None or importlib.util.find_spec("trl.kernels") is None,
    reason="needs trl 1.16: pip install -e .[bench]",
)
VOCAB = 20


def model_of_logits():
    """A model whose head is the identity, so that hidden states are logits, and the list that its passes leave them in."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=VOCAB, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    torch.nn.init.eye_(model.lm_head.weight)
    passes = []

    def keep(module, arguments, output):
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
        passes.append(output.last_hidden_state)

    model.model.register_forward_hook(keep)
    return model, passes


def of_rows(logits, batch):
    """(N, V): the logits of the response rows."""
    return logits.flatten(0, 1)[batch.states]


def compare(objective, theirs, logits, members, units, **columns):
    """`theirs` has been differentiated into logits.grad; ours from the same logits."""
    batch = collate(members, 0)
    leaf = of_rows(logits.detach(), batch).requires_grad_()
    loss, metrics = objective(token_stats(leaf, batch.actions), batch.columns | columns, batch.cu_seqlens)
    (loss / units).backward()
    assert torch.allclose(loss / units, theirs, rtol=1e-5)
    expected = of_rows(logits.grad, batch)
    assert expected.abs().max() > 1e-4
    assert torch.allclose(leaf.grad, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)
    assert torch.allclose(expected.norm(), logits.grad.norm(), rtol=1e-5)  # nothing anywhere else
    return metrics


def near_the_model(e, offset=0.0):
    """Gives the episode a reference whose log-probabilities, about -3.5, are like those of the random model, plus `offset`."""
    e.ref_logprobs = np.linspace(-4.0, -3.0, len(e.completion_ids), dtype=np.float32) + np.float32(offset)
    e.ref_lse = np.zeros_like(e.ref_logprobs)


VARIANTS = [
    {},
    {"length_normalized": True},
    {"loss_type": "ipo"},
    {"loss_type": "robust", "label_smoothing": 0.2},
    {"rpo_alpha": 0.7},
    {"loss_type": "ipo", "rpo_alpha": 0.3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_dpo_is_trl_s(variant):
    model, passes = model_of_logits()
    objective = DPO(beta=0.4, **variant)
    found = selected(objective, episodes(24))
    if (
        objective.rpo_alpha
    ):  # theirs is a mean over tokens of the batch, ours over each response: of one length they are equal
        found = [pair for pair in found if pair[0].action_count == found[0][0].action_count]
        assert len(found) > 1
    paired = [e for pair in found for e in pair]
    for e in paired:
        near_the_model(e)
    theirs = trl_steps.dpo_loss(model, objective)(trl_steps.dpo_batch(paired, model.device))
    theirs.backward()
    # their rows are all chosen, then all rejected: back into pairs
    logits, half = passes[-1], len(paired) // 2
    in_pairs = logits.detach().unflatten(0, (2, half)).transpose(0, 1).flatten(0, 1)
    in_pairs.grad = logits.grad.unflatten(0, (2, half)).transpose(0, 1).flatten(0, 1)
    compare(objective, theirs.detach(), in_pairs, paired, half)


@pytest.mark.parametrize("offset", [1.0, -1.0], ids=["z0 is 0", "z0 is above 0"])
def test_kto_is_trl_s(offset):
    model, passes = model_of_logits()
    objective = KTO(beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)
    members = [e for (e,) in selected(objective, episodes(12))]
    for e in members:
        near_the_model(e)
        near_the_model(e.companion, offset)
    theirs = trl_steps.kto_loss(model, objective)(trl_steps.kto_batch(members, model.device))
    theirs.backward()
    of_companions, logits = passes[-2:]
    companions = collate([e.companion for e in members], 0)
    stats = token_stats(of_rows(of_companions, companions), companions.actions)
    total, count = objective.companion_sums(stats, companions.columns, companions.cu_seqlens)
    assert (total > 0) == (offset < 0)
    column = torch.full((int(collate(members, 0).cu_seqlens[-1]),), (total / count).item())
    compare(objective, theirs.detach(), logits, members, len(members), companion_mean=column)
