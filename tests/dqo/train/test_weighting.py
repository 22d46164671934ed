"""Importance weights: chosen by the data, counted over a whole step, and a run that stops when they collapse."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dqo.config.options import load_options
from dqo.data.behavior import ReferenceName
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.models.identity import model_identity
from dqo.models.named import load_config
from dqo.objectives import DQO, SFT
from dqo.objectives.sums import mean_metric, moments
from dqo.processes import Processes
from dqo.train import metrics
from dqo.train.metrics import Weights
from dqo.train.run import train
from dqo.train.weighting import (
    LEAST,
    STOPPED_AFTER,
    WARNED_AFTER,
    Collapse,
    check_behavior,
    weights_at_start,
)
from tests.dqo.helpers import arguments, episodes, tokenizer

CONFIG = load_options(["--dataset_name", "x", "--model_name_or_path", "y"]).train


def run(files, **changes):
    return train(load_options(arguments(files, **changes)))


def with_sampling(files, **sampling):
    """The rows of rollouts.jsonl, said to be sampled so from the model."""
    path = str(files / "model")
    told = {"model_hash": model_identity(path, load_config(path)), "temperature": 1.0} | sampling
    lines = [json.loads(line) for line in (files / "rollouts.jsonl").read_text().splitlines()]
    (files / "rollouts.jsonl").write_text("\n".join(json.dumps(line | {"sampling": told}) for line in lines))


def record(files, name="out"):
    return json.loads((files / name / "run.json").read_text())["importance_weights"]


def split(weights, parts):
    """The sums of a step's micro-batches, added as the trainer adds them."""
    total = {}
    for part in weights.tensor_split(parts):
        total = metrics.add(total, moments("importance_weight", part.double()) | {"loss": mean_metric(part)})
    return total


@pytest.mark.parametrize("scale", [1.0, 8e-20])
def test_the_share_is_that_of_the_whole_step_however_it_is_cut(monkeypatch, scale):
    torch.manual_seed(0)
    weights = torch.rand(12) * scale
    expected = weights.double().sum() ** 2 / (12 * weights.double().square().sum())
    for parts in (1, 5):
        sums, found = metrics.of_step(split(weights, parts), Processes())
        assert found.effective_share == pytest.approx(expected.item()) and found.mean == pytest.approx(
            weights.mean().item()
        )
        logged = metrics.finish(sums)
        assert logged["importance_weight/effective_sample_share"] == pytest.approx(expected.item())
        assert not any(name.endswith("mean_square") for name in logged)

    mine, others = split(weights[:3], 1), split(weights[3:], 2)  # another process's, very unlike
    monkeypatch.setattr(metrics, "add_over_processes", lambda sums, _: {n: sums[n] + others[n] for n in sums})
    assert metrics.of_step(mine, Processes(world=2))[1].effective_share == pytest.approx(expected.item())


def test_a_row_over_several_steps_has_the_mean_of_their_shares():
    one, two = torch.tensor([1.0, 1.0]), torch.tensor([1e-6, 0.0])  # 1 and 1/2; of all four together it is 1/2
    window = {}
    for weights in (one, two):
        window = metrics.add(window, metrics.of_step(split(weights, 1), Processes())[0])
    assert metrics.finish(window)["importance_weight/effective_sample_share"] == pytest.approx(0.75)


def test_methods_without_weights_log_none(files):
    run(files, method="oreo", max_steps=1)
    assert "effective" not in (files / "out" / "metrics.jsonl").read_text() and record(files) is None


def test_the_weights_before_the_first_step_by_hand():
    members = episodes(3)
    for e, ratio in zip(members, (0.5, 3.0, -2.0)):  # the second is cut at e
        e.behavior_logprobs = e.ref_logprobs - np.float32(ratio / len(e.ref_logprobs))
    weights = [math.exp(x) for x in (0.5, 1.0, -2.0)]
    found = weights_at_start(DQO(is_level="trajectory"), members)
    assert found.mean == pytest.approx(sum(weights) / 3, rel=1e-5)
    assert found.effective_share == pytest.approx(sum(weights) ** 2 / (3 * sum(w * w for w in weights)), rel=1e-5)
    for e in members:
        e.behavior_logprobs = None
    assert weights_at_start(DQO(is_level="trajectory"), members) == (1.0, 1.0)
    assert weights_at_start(DQO(is_level="none"), members) is None and weights_at_start(SFT(), members) is None


@pytest.mark.parametrize("bad", [Weights(0.5, LEAST / 2), Weights(LEAST / 2, 0.06), Weights(0.0, 0.0)], ids=str)
def test_weights_that_stay_low_are_warned_of_and_then_stop_the_run(bad):
    collapse = Collapse(CONFIG)
    said = [collapse.note(step, bad) for step in range(1, STOPPED_AFTER)]
    assert [i for i, warning in enumerate(said, 1) if warning] == [WARNED_AFTER]
    assert collapse.stop(STOPPED_AFTER - 1, bad) is None
    collapse.note(STOPPED_AFTER, bad)
    assert "--learning_rate (now 1e-06)" in collapse.stop(STOPPED_AFTER, bad)
    assert collapse.note(11, Weights(0.5, 0.5)) is None and collapse.stop(11, Weights(0.5, 0.5)) is None


def test_weights_that_are_large_without_a_cap_are_told_from_those_that_collapse():
    seen = Weights(0.017, 17.0)  # of a run on chains of 30 tokens, beta 0.002, is_cap None
    collapse = Collapse(CONFIG, cap=None)
    said = [collapse.note(step, weights) for step, weights in enumerate([seen, Weights(0.06, 20.0), seen, seen] * 5, 1)]
    (warning,) = filter(None, said)
    assert "at step 4 their mean is 17 and 1.7% are effective" in warning and "--is_cap 1 (now none)" in warning
    assert collapse.stop(20, seen) is None


@given(st.lists(st.floats(0, math.e), min_size=1, max_size=300))
def test_capped_weights_are_never_called_large(weights):
    found = Weights.of(float(np.mean(weights)), float(np.mean(np.square(weights))))
    collapse = Collapse(CONFIG, cap=1.0)
    said = [collapse.note(step, found) for step in range(1, STOPPED_AFTER)]
    assert not any("a few samples" in warning for warning in said if warning)
    assert any(said) == (min(found) < LEAST)


def test_a_run_whose_policy_leaves_its_data_stops_with_the_cure(files, capsys):
    with_sampling(files)
    with pytest.raises(UserError) as caught:
        run(files, learning_rate=0.3, nll_coef=0, reward_scale=100, max_steps=60, eval_steps=5)
    message = str(caught.value)
    assert "the importance weights have collapsed for 10 steps: at step " in message and "\n" not in message
    assert "--learning_rate (now 0.3)" in message and "--is_floor -1, or --is_level none" in message
    (kept,) = (files / "out").glob("checkpoint-*")
    assert message.endswith(f"{kept} is kept") and not (files / "out" / "model.safetensors").exists()
    assert "WARNING: the importance weights collapse: at step" in capsys.readouterr().out
    rows = [json.loads(line) for line in (files / "out" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "eval_loss" in row]
    assert held_out[-1]["eval_weighted_loss"] < 1e-3 * held_out[0]["eval_weighted_loss"]  # it looks learnt
    assert held_out[-1]["eval_loss"] > 0.5 * held_out[0]["eval_loss"]  # and is not
    assert [row for row in rows if "loss" in row][-1]["step"] == int(kept.name.removeprefix("checkpoint-"))
    with pytest.raises(UserError, match="have collapsed for 11 steps"):  # the same command gets no ten steps more
        run(files, learning_rate=0.3, nll_coef=0, reward_scale=100, max_steps=60, eval_steps=5)


def test_checkpoints_of_better_days_stay(files):
    with_sampling(files)
    with pytest.raises(UserError, match="checkpoint-4 is kept"):
        run(files, learning_rate=0.3, nll_coef=0, max_steps=60, save_steps=4, save_total_limit=1, value_warmup_steps=4)
    assert [path.name for path in (files / "out").glob("checkpoint-*")] == ["checkpoint-4"]


def test_auto_weighs_samples_of_the_reference_and_no_others(files, capsys):
    with_sampling(files)
    run(files, max_steps=1)
    line = (
        "importance weights: trajectory (is_level auto), because no row has logprobs, and sampling names the reference"
    )
    out = capsys.readouterr().out
    assert line in out and "; at step 0 100.0% of them are effective, mean weight 1" in out
    assert record(files)["is_level"] == "trajectory" and record(files)["option"] == "auto"
    assert yaml.safe_load((files / "out" / "config.yaml").read_text())["is_level"] == "auto"
    assert "eval_weighted_loss" in (files / "out" / "metrics.jsonl").read_text()

    with_sampling(files, temperature=0.7)
    run(files, max_steps=1, output_dir=files / "tempered")
    assert (
        "importance weights: none (is_level auto), because no row has logprobs, and sampling of"
        in capsys.readouterr().out
    )
    run(files, max_steps=1, output_dir=files / "explicit", is_level="suffix")
    assert record(files, "tempered")["is_level"] == "none" and record(files, "explicit")["is_level"] == "suffix"
    with_sampling(files)
    run(
        files, max_steps=1, output_dir=files / "other", ref_model_name_or_path=files / "tempered"
    )  # sampled by another reference
    assert record(files, "other")["is_level"] == "none" and record(files, "other")["at_start"] is None


def test_a_run_goes_on_with_the_level_that_it_began_with(files, capsys):
    with_sampling(files)
    run(files, max_steps=12, save_steps=5, save_total_limit=5)
    whole = (files / "out" / "checkpoint-12" / "model.safetensors").read_bytes()
    for name in ("checkpoint-12", "checkpoint-10"):
        (files / "out" / name).rename(files / name)
    with_sampling(files, model_hash="sha256:other")  # what training reads of the rows is the same
    run(files, max_steps=12, save_steps=5, save_total_limit=5)
    assert "trajectory (is_level auto), because the run that goes on has chosen so" in capsys.readouterr().out
    assert (files / "out" / "checkpoint-12" / "model.safetensors").read_bytes() == whole


def test_auto_leaves_out_weights_that_are_next_to_nothing_from_the_start(files):
    """Stored by a sampler that was certain of all it wrote, as at a low temperature."""
    lines = [json.loads(line) for line in (files / "rollouts.jsonl").read_text().splitlines()]
    ids = [tokenizer()(line["completion"])["input_ids"] + [tokenizer().eos_token_id] for line in lines]
    rows = [line | {"completion_ids": i, "logprobs": [-0.01] * len(i)} for line, i in zip(lines, ids)]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(files, max_steps=1)
    assert (
        record(files)["is_level"] == "none" and "because at step 0 weights of whole responses" in record(files)["said"]
    )
    run(files, max_steps=1, is_level="trajectory", output_dir=files / "given")
    assert record(files, "given")["is_level"] == "trajectory" and record(files, "given")["at_start"]["mean"] < LEAST
    assert "eval_weighted_loss" in (files / "given" / "metrics.jsonl").read_text()


SAMPLED = {"model": "m", "temperature": 1.0}


CASES = [
    (SAMPLED, "trajectory", True),
    (SAMPLED | {"temperature": 0.5}, "trajectory", False),
    ({"model": "n", "temperature": 1.0}, "trajectory", False),
    (SAMPLED, "none", False),
    (None, "trajectory", False),
]


@pytest.mark.parametrize("sampling, level, stops", CASES, ids=str)
def test_logprobs_far_from_the_references_stop_only_where_it_is_said_to_have_sampled(sampling, level, stops, caplog):
    members, reference = episodes(9), ReferenceName("m", lambda: None)
    rows = [Row("1+1=", "2", 1.0, True, sampling=sampling, source=e.source) for e in members]
    for e in members:
        e.behavior_logprobs = e.ref_logprobs + np.float32(0.01)
    check_behavior(DQO(is_level=level), members, rows, reference)
    assert not caplog.records
    members[4].behavior_logprobs = members[4].ref_logprobs - np.float32(9.0)
    if stops:
        with pytest.raises(
            UserError, match=r"differ from .* nats a token on average \(most in row 5\), and sampling names that"
        ):
            check_behavior(DQO(is_level=level), members, rows, reference)
    else:
        with caplog.at_level(logging.WARNING):
            check_behavior(DQO(is_level=level), members, rows, reference)
        assert "another sampler, or processed" in caplog.text
        use = "No weights are made of them" if level == "none" else "Importance weights are made from them"
        assert use in caplog.text
