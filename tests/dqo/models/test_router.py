"""The auxiliary loss of a mixture-of-experts model's router."""

import pytest
import torch

from benchmarks.trainer.small_models import small_model
from dqo.config.options import load_options
from dqo.data.batches import Batching, collate, groups_of
from dqo.errors import UserError
from dqo.models.architecture import disable_dropout, recompute_activations
from dqo.models.router import check_router, real_tokens, router_loss
from dqo.objectives import SFT
from dqo.processes import Processes
from dqo.train.engine import Engine
from dqo.train.learner import Learner, objective_sums
from dqo.train.run import train
from dqo.train.step import accumulate
from tests.dqo.helpers import arguments, episodes, gradients, policy

EXPERTS = ["mixtral", "qwen2_moe", "olmoe"]


def gradient_of(model, coefficient, members, max_tokens=10_000):
    learner = Learner(model, router_aux_loss_coef=coefficient)
    engine = Engine(learner, learner, Batching(0, max_tokens), Processes())
    sums, _ = accumulate(engine, SFT(), groups_of(members, 1))
    return gradients(model), sums


@pytest.mark.parametrize("model_type", EXPERTS)
def test_the_loss_of_an_unpadded_batch_is_transformers_own(model_type):
    model, members = disable_dropout(small_model(model_type)), episodes(1)
    batch = collate(members, 0)
    loss, sums = objective_sums(Learner(model, router_aux_loss_coef=0.5), SFT(), batch, token_share=1.0)
    plain, without = objective_sums(Learner(model), SFT(), batch, token_share=1.0)
    expected = model(input_ids=batch.input_ids, output_router_logits=True).aux_loss
    assert loss.item() - plain.item() == pytest.approx(0.5 * expected.item(), rel=1e-4)
    found, tokens = sums["router_aux_loss"]
    assert (found / tokens).item() == pytest.approx(expected.item(), rel=1e-5) and "router_aux_loss" not in without


@pytest.mark.parametrize("model_type", EXPERTS)
def test_its_gradient_reaches_the_router_and_a_coefficient_of_0_is_off(model_type):
    members = episodes(4)
    plain, _ = gradient_of(disable_dropout(small_model(model_type)), None, members)
    off, sums = gradient_of(disable_dropout(small_model(model_type)), 0.0, members)
    assert torch.equal(off, plain) and "router_aux_loss" not in sums
    model = disable_dropout(small_model(model_type))
    found, sums = gradient_of(model, 10.0, members)
    routers = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert routers and all(p.grad.abs().max() > 0 for p in routers)
    assert (found - plain).norm() > 0.1 * plain.norm()
    recomputed = disable_dropout(small_model(model_type))
    recompute_activations(recomputed)
    again, _ = gradient_of(recomputed, 10.0, members)
    assert torch.allclose(again, found, rtol=1e-5, atol=1e-8)


def test_padding_does_not_count():
    members = episodes(6)
    batch = collate(members, 0)
    assert real_tokens(batch).sum(1).tolist() == [e.length for e in members]
    assert real_tokens(collate(members, 0, packed=True)).all()
    model, found = disable_dropout(small_model("mixtral")), []
    for pad_id in (0, 7):
        padded = collate(members, pad_id)
        logits = model.base_model(input_ids=padded.input_ids, use_cache=False, output_router_logits=True).router_logits
        found.append(router_loss(model, logits, padded))
    assert torch.equal(*found)


def test_micro_batches_are_weighed_by_their_tokens():
    members = episodes(6)
    _, alone = gradient_of(disable_dropout(small_model("mixtral")), 1.0, members, max_tokens=1)
    parts = [gradient_of(disable_dropout(small_model("mixtral")), 1.0, [e])[1]["router_aux_loss"] for e in members]
    assert torch.allclose(alone["router_aux_loss"], torch.stack(parts).sum(0), rtol=1e-4)


def test_whether_it_is_applied_is_said(caplog):
    model = small_model("mixtral")
    check_router(model, None)
    assert "MixtralForCausalLM has experts, and its router is trained without its auxiliary loss" in caplog.text
    check_router(model, 0.01)
    assert "is trained with 0.01 times its router's auxiliary loss" in caplog.text
    caplog.clear()
    check_router(policy(), None)
    assert not caplog.records
    with pytest.raises(UserError, match="router_aux_loss_coef is 0.01, and LlamaForCausalLM has no experts"):
        check_router(policy(), 0.01)
    with pytest.raises(UserError, match="no auxiliary loss for the router of DeepseekV3ForCausalLM"):
        check_router(small_model("deepseek_v3"), 0.01)
    for value in ("-1", "nan", "inf"):
        with pytest.raises(UserError, match="router_aux_loss_coef must be (at least 0|a finite)"):
            load_options(["--router_aux_loss_coef", value])


def test_a_run_logs_it(files):
    small_model("mixtral", vocab_size=20).save_pretrained(files / "model")
    train(load_options(arguments(files, router_aux_loss_coef=0.01, max_steps=2, logging_steps=1)))
    assert '"router_aux_loss": ' in (files / "out" / "metrics.jsonl").read_text()
