"""Stages: phases that train on parts of the groups, each of which may begin with a refreshed reference."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dqo.config.options import load_options
from dqo.data.batches import collate, distinct, epoch_order
from dqo.errors import UserError
from dqo.models.policy import load_policy, policy_stats
from dqo.objectives import DQO, CurryDPO
from dqo.train.loop import Trainer
from dqo.train.order import order_of
from dqo.train.phases import stretches
from dqo.train.run import train
from dqo.train.stages import Stages, pools_of
from tests.dqo.helpers import arguments


def stages_of(objective, count, steps, per_step=2, seed=5, value_warmup=0.0):
    options = SimpleNamespace(train=SimpleNamespace(value_warmup_steps=value_warmup, seed=seed, output_dir="out"))
    prepared = SimpleNamespace(objective=objective, order=order_of([None] * count, per_step, seed))
    return Stages(options, prepared, stretches(objective, value_warmup, steps), steps, 0)


@given(count=st.integers(1, 9), per_step=st.integers(1, 4), steps=st.integers(6, 20), warmup=st.integers(0, 5))
def test_phases_on_all_groups_go_on_in_the_order_of_the_epochs(count, per_step, steps, warmup):
    found = stages_of(DQO(), count, steps, per_step, value_warmup=warmup)
    per_epoch = math.ceil(count / per_step)
    for step in range(steps):
        epoch, index = divmod(step, per_epoch)
        order = epoch_order(count, epoch, 5).tolist()
        assert found.groups(step, step) == order[index * per_step : (index + 1) * per_step]


@given(st.integers(1, 5), st.integers(5, 30), st.integers(5, 30), st.integers(1, 4))
def test_each_stage_trains_on_its_part_and_the_parts_are_all_groups_once(stages, count, steps, per_step):
    objective = CurryDPO(stages=stages)
    pools = pools_of(stretches(objective, 0, 100), order_of([None] * count, per_step, 5))
    assert [i for pool in pools for own in pool.order.members for i in own] == list(range(count))
    assert max(pool.order.size for pool in pools) - min(pool.order.size for pool in pools) <= 1
    found = stages_of(objective, count, steps, per_step)
    lengths = [b - a for a, b in zip([p.begin for p in found.pools], [*(p.begin for p in found.pools[1:]), steps])]
    assert len(lengths) == stages and max(lengths) - min(lengths) <= 1
    for number, pool in enumerate(found.pools):
        end = found.pools[number + 1].begin if number + 1 < len(found.pools) else steps
        seen = [i for step in range(pool.begin, end) for i in found.groups(step, step)]
        (own,) = pool.order.members
        assert set(seen) <= set(own)
        whole = [seen.count(i) for i in own]
        assert max(whole) - min(whole) <= 1  # an epoch of the stage is a permutation


def test_more_stages_than_groups_or_steps_are_refused():
    with pytest.raises(UserError, match="phase 'stage 1' has no group to train on: there are 1 in all"):
        stages_of(CurryDPO(stages=3), 1, 9)
    with pytest.raises(
        UserError, match="2 steps leave none for 'stage 3' of the 3 phases; give more steps, or fewer phases"
    ):
        stages_of(CurryDPO(stages=3), 9, 2)


def run(files, output="out", **changes):
    settings = {"method": "curry_dpo", "stages": 3, "max_steps": 6, "save_steps": 1, "save_total_limit": 9}
    settings |= {"output_dir": files / output, "per_device_train_batch_size": 3, "logging_steps": 1} | changes
    flags = [name for name, value in settings.items() if value is True]
    settings = {name: value for name, value in settings.items() if value is not True and value is not None}
    return train(load_options([*arguments(files, **settings), *(f"--{name}" for name in flags)]))


def weights(directory):
    path = directory / "adapters.safetensors"
    return load_file(path if path.exists() else directory / "model.safetensors")


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def interrupted(files, monkeypatch, at, **changes):
    """A run that ends before the step `at`, counted from 0."""
    original = Trainer.train_step

    def stop(self, step, groups):
        if step == at:
            raise KeyboardInterrupt
        return original(self, step, groups)

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(files, **changes)
    monkeypatch.undo()


def test_one_stage_is_the_method_without_stages_bit_for_bit(files):
    one, plain = run(files, stages=1, max_steps=2), run(files, "plain", method="dpo", stages=None, max_steps=2)
    assert equal(weights(one.output_dir), weights(plain.output_dir))
    assert not list(one.output_dir.glob("reference-*"))


def test_each_stage_has_its_pairs_and_the_policy_of_the_last_as_its_reference(files, monkeypatch):
    steps = []
    original = Trainer.train_step

    def spy(self, step, groups):
        place = {tuple(e.source for e in group): i for i, group in enumerate(self.prepared.groups)}
        ids = [place[tuple(e.source for e in group)] for group in groups]
        steps.append((ids, groups[0][0].ref_logprobs.copy(), groups[0][0]))
        return original(self, step, groups)

    monkeypatch.setattr(Trainer, "train_step", spy)
    done = run(files)
    count = len(done.prepared.groups)
    gaps = [better.reward - worse.reward for better, worse in done.prepared.groups]
    assert gaps == sorted(gaps, reverse=True)
    bounds = [round(k / 3 * count) for k in range(4)]
    for step, (ids, _, _) in enumerate(steps):
        assert all(bounds[step // 2] <= i < bounds[step // 2 + 1] for i in ids)
    for step, (_, logprobs, episode) in enumerate(steps):
        begin = step // 2 * 2
        its_reference = files / "model" if begin == 0 else done.output_dir / f"checkpoint-{begin}"
        stats = policy_stats(load_policy(str(its_reference)), collate([episode], 0), False)
        assert np.allclose(stats.logprobs.detach().numpy(), logprobs, atol=1e-5)
    last = load_policy(str(done.output_dir / "reference-4"))
    for e in [*done.prepared.episodes(), *distinct(done.prepared.held_out)][::7]:
        stats = policy_stats(last, collate([e], 0), False)
        assert np.allclose(stats.logprobs.detach().numpy(), e.ref_logprobs, atol=1e-5)
    assert sorted(path.name for path in done.output_dir.glob("reference-*")) == ["reference-2", "reference-4"]


def test_a_run_stopped_in_a_stage_goes_on_bit_for_bit_without_its_cache(files, monkeypatch):
    whole = run(files, "whole")
    interrupted(files, monkeypatch, at=3)  # the second stage began with step 2
    shutil.rmtree(files / "out" / "ref_cache")
    kept = files / "out" / "reference-2"
    kept.rename(files / "elsewhere")
    with pytest.raises(
        UserError, match="reference-2 is missing: it is the reference policy of this phase, which began"
    ):
        run(files)
    (files / "elsewhere").rename(kept)
    resumed = run(files)
    assert equal(weights(whole.output_dir), weights(resumed.output_dir))
    assert whole.held_out == resumed.held_out


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"use_peft": True, "lora_r": 2}], ids=["all weights", "adapter"])
@pytest.mark.parametrize("at, save_steps", [(2, 1), (4, 3), (5, 2), (5, 1)])
def test_a_run_stopped_anywhere_in_the_stages_goes_on_bit_for_bit(files, monkeypatch, at, save_steps, changes):
    """At the begin of a stage, after it with a checkpoint of the one before, with one of its begin, and within it."""
    whole = run(files, "whole", **changes)
    interrupted(files, monkeypatch, at=at, save_steps=save_steps, **changes)
    resumed = run(files, save_steps=save_steps, **changes)
    assert equal(weights(whole.output_dir / "checkpoint-6"), weights(resumed.output_dir / "checkpoint-6"))
    assert whole.held_out == resumed.held_out
