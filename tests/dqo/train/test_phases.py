"""Phases: which models are trained in which steps, the value warm-up among them, also when a run goes on in the middle of one."""

import re
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.objectives import DQO, DRO, OREO, SFT
from dqo.objectives.base import Phase
from dqo.train import phases
from dqo.train.loop import Trainer
from dqo.train.run import train
from tests.dqo.helpers import arguments


@dataclass(frozen=True)
class Fitted(DRO):
    """A critic fitted first, and then frozen."""

    critic_share: float = 0.5
    """Share of the steps that fit the critic."""

    def phases(self, value_warmup):
        return Phase("critic", self.critic_share, ("critic",)), Phase("policy", trains=("policy",))


def test_steps_below_one_are_a_share():
    assert (phases.as_steps(0.1, 95), phases.as_steps(7, 95), phases.as_steps(0, 95)) == (10, 7, 0)


@pytest.mark.parametrize(
    "value, total, warned", [(0, 8, False), (7, 8, False), (8, 8, True), (9, 8, True), (0.9, 5, True)]
)
def test_a_value_warmup_that_leaves_the_policy_no_step_is_said(value, total, warned, caplog):
    found = phases.stretches(DQO(), value, total)
    alone = [step for step in range(total) if "policy" not in phases.trained(found, step)]
    assert alone == list(range(min(total, phases.as_steps(value, total))))
    assert phases.last_begin(found, "policy", total) == len(alone)
    said = f"value_warmup_steps is {phases.as_steps(value, total)} of {total} steps: .* and the policy stays as it is"
    assert bool(caplog.records) is warned
    if warned:
        assert len(caplog.records) == 1
        assert re.fullmatch(said, caplog.records[0].getMessage())


def test_the_warmup_concerns_value_models_alone():
    assert [stretch.begin for stretch in phases.stretches(SFT(), 5, 8)] == [0]
    assert [stretch.begin for stretch in phases.stretches(DQO(value_model="none"), 5, 8)] == [0]
    assert [stretch.begin for stretch in phases.stretches(DQO(), 5, 8)] == [0, 5]


REFRESHING = Phase("a", refreshes=("reference",), trains=("policy",))


def made(*its_phases, base=DRO):
    class Made(base):
        def phases(self, value_warmup):
            return its_phases

    return Made()


@pytest.mark.parametrize(
    "objective, message",
    [
        (made(), "the phases of Made come to an end"),
        (made(Phase("a", 3)), "the phases of Made come to an end; the last must have no number of steps"),
        (made(Phase("a"), Phase("b")), "phase 'a' of Made has no number of steps, so that phase 'b' would never begin"),
        (made(Phase("a", -1), Phase("b")), "phase 'a' of Made has -1 steps"),
        (made(Phase("a", float("nan")), Phase("b")), "phase 'a' of Made has nan steps"),
        (made(Phase("a", 2.5), Phase("b")), "phase 'a' of Made has 2.5 steps; expected a whole number of at least 0"),
        (made(Phase("a", "3"), Phase("b")), "phase 'a' of Made has '3' steps"),
        (made(Phase("a", True), Phase("b")), "phase 'a' of Made has True steps"),
        (
            made(Phase("a", 1), Phase("b", 1), Phase("a")),
            "phase 'a' of Made: expected a string for its name, and another",
        ),
        (made(Phase(3, 1), Phase("a")), "phase 3 of Made: expected a string for its name"),
        (made(Phase("a", 1, "critic"), Phase("b")), "phase 'a' of Made: trains is 'critic'; expected a tuple, such as"),
        (made(Phase("a", refreshes="reference")), "phase 'a' of Made: refreshes is 'reference'; expected a tuple"),
        (made(("a", 1)), "the phases of Made are no tuple of Phase"),
        (made(Phase("a", 1, ()), Phase("b")), "phase 'a' of Made trains nothing; there is policy and critic"),
        (made(Phase("a", 1, ("actor",)), Phase("b")), "phase 'a' of Made trains actor; there is policy and critic"),
        (made(Phase("a", 1, ("critic",)), Phase("b"), base=SFT), "phase 'a' of Made trains critic; there is policy"),
        (
            made(Phase("a", refreshes=("values", 3))),
            "phase 'a' of Made refreshes values, 3; what can be refreshed is reference",
        ),
        (made(REFRESHING, base=SFT), "phase 'a' of Made refreshes the reference, which the method does not read"),
        (made(REFRESHING, base=OREO), "phase 'a' of Made refreshes the reference, whose logits the exact KL reads"),
        *(
            (made(Phase("a", part=part)), f"phase 'a' of Made trains on the part {part!r}; expected two shares")
            for part in (
                (0.5, 0.5),
                (0.6, 0.4),
                (-0.1, 1),
                (0, 1.1),
                (float("nan"), 1),
                (0.5,),
                0.5,
                (True, 1),
                ("0", "1"),
            )
        ),
    ],
)
def test_phases_that_cannot_be_run_are_refused_in_one_line(objective, message):
    with pytest.raises(UserError) as caught:
        phases.check_phases(objective, 0.0)
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("answer", [None, Phase("a"), (p for p in [Phase("a")])])
def test_phases_that_are_no_tuple_are_refused(answer):
    class Odd(DRO):
        def phases(self, value_warmup):
            return answer

    with pytest.raises(UserError, match="the phases of Odd are no tuple of Phase"):
        phases.check_phases(Odd(), 0.0)


@pytest.mark.parametrize(
    "now",
    [
        [Phase("c", 2, ("critic",)), Phase("p")],
        [Phase("a", 2, ("critic",)), Phase("p")],
        [Phase("c", 2, ("critic",)), Phase("b")],
        [Phase("a", 2), Phase("c", 1), Phase("b")],
        [Phase("b", 2), Phase("a")],
        [Phase("a")],
    ],
)
def test_a_run_goes_on_in_the_phases_that_it_had_or_not_at_all(now):
    then = {"a": 0, "b": 2}
    for steps in (0, 1, 2, 9):  # where they begin is known
        assert [s.begin for s in phases.stretches(made(Phase("a", steps), Phase("b")), 0, 4, then)] == [0, 2]
    names = ", ".join(phase.name for phase in now)
    with pytest.raises(
        UserError, match=f"^the phases of Made were a, b in the checkpoint and are {names} now; put them"
    ):
        phases.stretches(made(*now), 0, 4, then)


def run(files, **changes):
    return train(
        load_options(arguments(files, method=f"{__name__}:Fitted", save_steps=2, save_total_limit=9, **changes))
    )


def parts(checkpoint):
    return load_file(checkpoint / "model.safetensors"), load_file(checkpoint / "critic" / "model.safetensors")


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_critic_is_fitted_first_and_then_frozen(files):
    assert sys.modules[__name__].Fitted is Fitted
    run(files, max_steps=8)
    stages = [parts(files / "out" / f"checkpoint-{step}") for step in (2, 4, 6, 8)]
    of_policy = [equal(a[0], b[0]) for a, b in zip(stages, stages[1:])]
    of_critic = [equal(a[1], b[1]) for a, b in zip(stages, stages[1:])]
    assert of_policy == [True, False, False] and of_critic == [False, True, True]
    assert equal(stages[1][0], load_file(files / "model" / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [3, 6], ids=["while the critic is fitted", "when it is frozen"])
def test_a_run_stopped_in_any_phase_goes_on_bit_for_bit(files, monkeypatch, stopped):
    whole = run(files, max_steps=8, output_dir=files / "whole")
    original = Trainer.train_step

    def stop(self, step, groups):
        if step == stopped:
            raise KeyboardInterrupt
        return original(self, step, groups)

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(files, max_steps=8)
    monkeypatch.undo()
    resumed = run(files, max_steps=8)
    for one, two in zip(parts(whole.output_dir), parts(resumed.output_dir)):
        assert equal(one, two)
    one, two = (load_file(d.output_dir / "checkpoint-8" / "optimizer.safetensors") for d in (whole, resumed))
    assert equal(one, two)
