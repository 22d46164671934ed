"""A run as a whole: everything up to the first step, the training, and what it comes to.

dqo-train --dataset_name rollouts.jsonl --model_name_or_path DIR_OR_HUB_NAME --output_dir out
accelerate launch --multi_gpu --num_processes 2 -m dqo.train --dataset_name ...        the same over processes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dqo.config.launcher import obey
from dqo.config.options import Options
from dqo.data.rows import Row
from dqo.models.critic import load_critic
from dqo.models.policy import load_policy
from dqo.objectives.base import Objective
from dqo.processes import start
from dqo.train.callbacks import check_callbacks
from dqo.train.inputs import Given, check_options, load_rows
from dqo.train.learner import Learner
from dqo.train.loop import Answers, Trainer
from dqo.train.machines import check_launch
from dqo.train.prepare import Prepared, prepare
from dqo.train.record import begin_record, data_record, machine, parameters, penalised_steps
from dqo.train.resume import as_stored
from dqo.train.reward_normaliser import with_normalised_rewards


@dataclass
class Run:
    """A finished run, as evaluation and report read it."""

    output_dir: Path
    prepared: Prepared  # with the trained models; whole in the first process
    steps: int
    seconds: float  # of the steps alone
    cpu_seconds: float  # the same of the processor, all threads of this process
    tokens_per_second: float
    held_out: dict[str, float]
    objective: Objective


Rows = tuple[Sequence[Row], Sequence[Row]]  # to train on, held out


def begin(
    options: Options,
    given: Given | None = None,
    rows: Rows | None = None,
    announce: bool = False,
    answers: Answers | None = None,
) -> Trainer:
    """Everything up to the first step. `given` are objects in the place of options; `rows`: what `load_rows` found; `announce`
    prints how many rows are trained on and held out; `answers` adds metrics to every evaluation.

    Raises:
        UserError: for options, rows or a model that do not fit, before any work is lost.
    """
    given = given or Given()
    options = as_stored(obey(options))
    check_options(options, given)
    check_callbacks(given.callbacks, options.train)
    train_rows, held_rows = rows or load_rows(options, given)
    options, normalised = with_normalised_rewards(options, train_rows)
    processes = start(options.train.use_cpu, options.train.fsdp)
    check_launch(options, processes)
    if normalised:
        processes.say(normalised)
    trainer = Trainer(options, prepare(options, given, train_rows, held_rows, processes), given.callbacks, answers)
    trainer.train_rows = train_rows
    if announce:
        split = given.eval_dataset is None and options.train.eval_dataset_name is None
        processes.say(trainer.prepared.counts(len(train_rows), options.train.eval_fraction if split else None))
        if said := trainer.prepared.weighting.said:
            processes.say(said)
    if processes.main:
        begin_record(trainer.output_dir, _begun(options, trainer, train_rows, held_rows))
    return trainer


def _begun(options: Options, trainer: Trainer, rows: Sequence[Row], held_out: Sequence[Row]) -> dict:
    """What run.json says of a run before its first step."""
    prepared, learner, config = trainer.prepared, trainer.learner, options.train
    episodes = prepared.episodes()
    return {
        "steps": trainer.steps,
        "phases": [{"begin": s.begin, "name": s.phase.name, "trains": s.phase.trains} for s in trainer.stretches],
        "data": data_record(config, episodes, rows, held_out),
        "model": {"name": config.model_name_or_path or "given model", "sha256": prepared.identity["model"]},
        "parameters": parameters(learner.policy, learner.value_model),
        "importance_weights": prepared.weighting.record(options.objective.weight_level),
        "penalised_steps": penalised_steps(prepared.tokenizer, episodes, config.process_reward),
        **machine(),
    }


def train(
    options: Options, description: str | None = None, rows: Rows | None = None, answers: Answers | None = None
) -> Run:
    """Trains, or goes on with a run that was killed in the same output_dir. `description` labels the progress bar; `answers` adds
    metrics to every evaluation."""
    trainer = begin(options, rows=rows, announce=description is None, answers=answers)
    held_out = trainer.run(description or options.train.method)
    trainer.finish()
    return run_of(trainer, held_out)


def run_of(trainer: Trainer, held_out: dict[str, float]) -> Run:
    prepared = trainer.prepared
    if trainer.processes.fsdp and trainer.processes.main:  # shards cannot be read by one process alone
        critic = trainer.output_dir / "critic"
        whole_policy = load_policy(str(trainer.output_dir), trainer.processes.device)
        value_model = load_critic(critic, trainer.processes.device) if critic.exists() else None
        prepared = replace(prepared, learner=Learner(whole_policy, value_model))  # the trainer keeps its shards
    seconds, cpu_seconds = (trainer.counters[name] for name in ("train_seconds", "train_cpu_seconds"))
    rate = trainer.counters["num_tokens"] / seconds if seconds else 0.0
    found = (trainer.steps, seconds, cpu_seconds, rate, held_out, trainer.objective)
    return Run(trainer.output_dir, prepared, *found)
