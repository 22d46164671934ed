"""The implicit value model against its equations written as loops, and as a value model of a run."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dqo.config.options import load_options
from dqo.data.batches import Batching, collate, distinct
from dqo.errors import UserError
from dqo.evaluation.options import EvalConfig
from dqo.evaluation.scoring import Models, episode_of, load_models, scores
from dqo.models.critic import load_critic, save_value_model, valued
from dqo.models.implicit_value import START_FILE, implicit_value_from
from dqo.models.policy import load_policy, policy_stats, weights_hash
from dqo.models.value_source import IMPLICIT_FILE
from dqo.objectives import DQO, DRO, OREO
from dqo.processes import Processes
from dqo.train.engine import Engine
from dqo.train.held_out import value_traces
from dqo.train.learner import Learner, objective_sums
from dqo.train.run import train
from tests.dqo.helpers import arguments, episodes, gradients, policy

OUTCOMES = [-1.0, 3.0, 3.0, 3.0]  # the mean 2 is three quarters of the way: its logit is log 3


def moved(beta=0.7, seed=1):
    """One that is no copy of its policy any more, with the policy."""
    model = policy()
    value_model = implicit_value_from(model, OUTCOMES, beta, "the reference")
    torch.manual_seed(seed)
    for parameter in [*value_model.model.parameters(), value_model.start.weight]:
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model, value_model


def batch_of(count=6, reference=None, **options):
    batch = collate(episodes(count, **options), 0)
    if reference is not None:
        with torch.no_grad():
            columns = batch.columns | {"ref_logprobs": policy_stats(reference, batch).logprobs}
        batch = replace(batch, columns=columns)
    return batch


def test_values_and_loss_are_the_equations_written_as_loops():
    model, value_model = moved()
    batch = batch_of(reference=model)
    found = valued(value_model, batch)
    row = 0
    for i, e in enumerate(batch.episodes):
        ids = torch.tensor([e.prompt_ids + e.completion_ids])
        with torch.no_grad():
            tables = [m(ids).logits[0].log_softmax(-1) for m in (value_model.model, model)]
            hidden = value_model.model.base_model(ids).last_hidden_state[0, len(e.prompt_ids) - 1]
            z = value_model.start(hidden).item()
        paid = 0.0
        for t, token in enumerate(e.completion_ids):
            expected = -1.0 + 4.0 / (1.0 + math.exp(-z)) - paid
            assert found.values[row].item() == pytest.approx(expected, abs=1e-4)
            at = len(e.prompt_ids) - 1 + t
            z += 0.7 * (tables[0][at, token] - tables[1][at, token]).item()
            paid += float(e.rewards[t])
            row += 1
        success = 1.0 / (1.0 + math.exp(-z))
        assert found.ends[i].item() == pytest.approx(-1.0 + 4.0 * success - paid, abs=1e-4)
        share = min(max((paid + 1.0) / 4.0, 0.0), 1.0)
        loss = -share * math.log(success) - (1.0 - share) * math.log(1.0 - success)
        assert found.loss[i].item() == pytest.approx(loss, abs=1e-4)
    assert row == len(found.values) and not found.values.requires_grad and not found.ends.requires_grad


def test_a_new_one_says_the_mean_outcome_in_every_state():
    model = policy()
    batch = batch_of(reference=model)
    batch = replace(batch, columns=batch.columns | {"rewards": torch.zeros_like(batch.columns["rewards"])})
    found = valued(implicit_value_from(model, OUTCOMES, 0.5, ""), batch)
    assert torch.allclose(found.values, torch.tensor(2.0), atol=1e-4)
    assert torch.allclose(found.ends, torch.tensor(2.0), atol=1e-4)


def test_a_response_that_was_cut_teaches_nothing():
    _, value_model = moved()
    assert not valued(value_model, batch_of(terminated=False)).loss.any()
    assert valued(value_model, batch_of()).loss.all()


def test_equal_outcomes_are_refused():
    with pytest.raises(UserError, match="value_model implicit: every response earns 1 in all.*another --value_model"):
        implicit_value_from(policy(), [1.0, 1.0], 0.5, "")


@pytest.mark.parametrize("make", [DQO, DRO, OREO])
def test_it_is_trained_by_its_own_loss_alone_and_the_policy_is_not(make):
    """Whatever the method's unit, the critic's gradient is that of the summed cross-entropies, times value_coef."""
    objective = make(value_model="implicit", value_coef=0.5, **({"alpha": 0.0} if make is OREO else {}))
    model, value_model = moved()
    batch = batch_of()
    valued(value_model, batch).loss.sum().backward()
    expected = 0.5 * gradients(value_model)
    value_model.zero_grad()
    learner = Learner(model, value_model)
    loss, metrics = objective_sums(learner, objective, batch, ("critic",))
    loss.backward()
    assert torch.allclose(gradients(value_model), expected, rtol=1e-4, atol=1e-6) and expected.any()
    assert not gradients(model).any()
    total, count = metrics["loss/value"].tolist()
    assert count == len(batch.episodes) and total == pytest.approx(
        valued(value_model, batch).loss.sum().item(), rel=1e-5
    )
    loss, _ = objective_sums(learner, objective, batch, ("policy",))
    value_model.zero_grad()
    loss.backward()
    assert not gradients(value_model).any() and gradients(model).any()


def test_it_comes_back_from_its_files_bit_for_bit_and_loads_in_plain_transformers(tmp_path):
    _, value_model = moved()
    save_value_model(value_model, value_model.state_dict(), tmp_path)
    again, batch = load_critic(tmp_path), batch_of()
    assert again.scale == value_model.scale
    for one, two in zip(valued(again, batch), valued(value_model, batch)):
        assert one is two or torch.equal(one, two)
    assert torch.equal(
        policy_stats(load_policy(str(tmp_path)), batch).logprobs, policy_stats(value_model.model, batch).logprobs
    )


@pytest.mark.parametrize(
    "file, text", [(IMPLICIT_FILE, "{}"), (IMPLICIT_FILE, "["), (IMPLICIT_FILE, '{"beta": "a"}'), (START_FILE, "x")]
)
def test_damaged_files_are_named(tmp_path, file, text):
    _, value_model = moved()
    save_value_model(value_model, value_model.state_dict(), tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path} has a damaged {IMPLICIT_FILE} or {START_FILE}"):
        load_critic(tmp_path)


def test_the_scorer_value_reads_it_beside_its_reference(tmp_path):
    model, value_model = moved()
    ids = [5, 6, 7, 2]
    ended, cut = episode_of([1, 3], ids, True), episode_of([1, 3], ids, False)
    found = scores(Models(policy(2), 0, value_model, model), ["value"], [ended, cut])["value"]
    batch = collate([ended], 0)
    columns = batch.columns | {"ref_logprobs": policy_stats(model, batch).logprobs}
    expected = valued(value_model, replace(batch, columns=columns))
    assert found == pytest.approx([expected.values[-1].item(), expected.ends[0].item()], abs=1e-5)


# -------------------------------------------------------------------------------------------------------- in a run


def run(files, *flags, **changes):
    settings = {
        "value_model": "implicit",
        "value_warmup_steps": 2,
        "save_steps": 2,
        "save_total_limit": 9,
        "max_steps": 6,
    }
    return train(load_options([*arguments(files, **settings | changes), *flags]))


def test_a_run_trains_it_saves_it_and_goes_on_bit_for_bit(files, caplog):
    found = run(files, eval_steps=3)
    out = files / "out"
    assert json.loads((out / "critic" / IMPLICIT_FILE).read_text())["low"] == 0.0
    critic, live = load_critic(out / "critic"), found.prepared.learner.value_model
    assert all(torch.equal(a, b) for a, b in zip(critic.state_dict().values(), live.state_dict().values()))
    base, first = (load_file(files / name / "model.safetensors") for name in ("model", "out/checkpoint-2"))
    fitted = load_file(out / "checkpoint-2" / "critic" / "model.safetensors")
    assert all(torch.equal(first[name], base[name]) for name in base)  # the warm-up is the critic's alone
    assert not all(torch.equal(fitted[name], base[name]) for name in base)
    again = run(files, output_dir=files / "again", resume_from_checkpoint=out / "checkpoint-4", eval_steps=3)
    for one, two in ((critic, load_critic(files / "again" / "critic")), (found, again)):
        one, two = (x.state_dict() if hasattr(x, "state_dict") else x.prepared.learner.state_dict() for x in (one, two))
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert value_traces_differ(found)
    config = EvalConfig(model_name_or_path=str(out), scorers=("value",))
    models = load_models(config, load_policy(str(out)), 0)
    assert weights_hash(models.reference) == weights_hash(load_policy(str(files / "model")))
    with pytest.raises(UserError, match="scorer value: the value model in .*critic read another reference than"):
        load_models(replace(config, ref_model_name_or_path=str(out)), load_policy(str(out)), 0)


def value_traces_differ(found):
    """The values of held-out responses, as the report reads them, are no constant."""
    learner = found.prepared.learner
    engine = Engine(learner, learner, Batching(0, 4096), Processes(device=learner.device))
    traces = value_traces(engine, distinct(found.prepared.held_out))
    return len({round(v, 6) for trace in traces for v in trace}) > 3


def test_with_adapters_it_trains_its_own(files):
    found = run(files, "--use_peft", lora_r=2)
    value_model = found.prepared.learner.value_model
    trained = {name for name, p in value_model.named_parameters() if p.requires_grad}
    assert {"start.weight", "start.bias"} < trained and all("lora_" in name for name in trained if "start" not in name)
    saved, batch = load_critic(files / "out" / "critic"), batch_of()
    assert torch.allclose(valued(saved, batch).values, valued(value_model, batch).values, atol=1e-5)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--gamma", "0.9"], "gamma must be 1 with value_model implicit, which is fitted to outcomes, got 0.9"),
        (["--target", "residual"], "target must be detach with value_model implicit, whose values have no gradient"),
        (["--implicit_beta", "0"], "implicit_beta must be positive, got 0"),
    ],
)
def test_options_that_it_has_no_meaning_for_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        load_options(["--value_model", "implicit", *given])
