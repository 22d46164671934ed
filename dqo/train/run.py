"""A run as a whole: everything up to the first step, the training, and what it comes to.

dqo-train --dataset_name rollouts.jsonl --model_name_or_path DIR_OR_HUB_NAME --output_dir out
accelerate launch --multi_gpu --num_processes 2 -m dqo.train --dataset_name ...        the same over processes
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dqo.config.launcher import obey
from dqo.config.options import Options
from dqo.data.overlap import trained_problems
from dqo.data.rows import Row, prompt_key
from dqo.models.critic import load_critic
from dqo.models.policy import load_policy
from dqo.processes import start
from dqo.train.callbacks import check_callbacks
from dqo.train.inputs import Given, check_options, load_rows
from dqo.train.learner import Learner
from dqo.train.loop import Trainer
from dqo.train.prepare import Prepared, prepare
from dqo.train.resume import as_stored


@dataclass
class Run:
    """A finished run, as evaluation and report read it."""

    output_dir: Path
    prepared: Prepared  # with the trained models
    steps: int
    seconds: float  # of the steps alone
    tokens_per_second: float
    held_out: dict[str, float]


Rows = tuple[list[Row], list[Row]]  # to train on, held out


def begin(options: Options, given: Given | None = None, rows: Rows | None = None, announce: bool = False) -> Trainer:
    """Everything up to the first step. `given` are objects in the place of options; `rows`: what `load_rows` found; `announce`
    prints how many rows are trained on and held out.

    Raises:
        UserError: for options, rows or a model that do not fit, before any work is lost.
    """
    given = given or Given()
    options = as_stored(obey(options))
    check_options(options, given)
    check_callbacks(given.callbacks, options.train)
    train_rows, held_rows = rows or load_rows(options, given)
    processes = start(options.train.use_cpu, options.train.fsdp)
    trainer = Trainer(options, prepare(options, given, train_rows, held_rows, processes), given.callbacks)
    trainer.train_prompts = {prompt_key(row) for row in train_rows}
    trainer.train_problems = trained_problems(train_rows)
    if announce:
        split = given.eval_dataset is None and options.train.eval_dataset_name is None
        processes.say(trainer.prepared.counts(options.train.eval_fraction if split else None))
    return trainer


def train(options: Options, description: str | None = None, rows: Rows | None = None) -> Run:
    """Trains, or goes on with a run that was killed in the same output_dir. `description` labels the progress bar."""
    trainer = begin(options, rows=rows, announce=description is None)
    held_out = trainer.run(description or options.train.method)
    trainer.finish()
    return run_of(trainer, held_out)


def run_of(trainer: Trainer, held_out: dict[str, float]) -> Run:
    if trainer.processes.fsdp and trainer.processes.main:  # shards cannot be read by one process alone
        critic = trainer.output_dir / "critic"
        whole_policy = load_policy(str(trainer.output_dir), trainer.processes.device)
        value_model = load_critic(critic, trainer.processes.device) if critic.exists() else None
        trainer.prepared.learner = Learner(whole_policy, value_model)
    seconds = trainer.counters["train_seconds"]
    rate = trainer.counters["num_tokens"] / seconds if seconds else 0.0
    return Run(trainer.output_dir, trainer.prepared, trainer.steps, seconds, rate, held_out)
