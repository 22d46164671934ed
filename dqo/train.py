"""Training, read top to bottom: rows -> episodes and models -> steps -> checkpoints -> held-out evaluation.

dqo-train --dataset_name rollouts.jsonl --model_name_or_path DIR_OR_HUB_NAME --output_dir out
accelerate launch --multi_gpu --num_processes 2 -m dqo.train --dataset_name ...        the same over processes
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dqo import checkpoint, metrics, optim
from dqo.batches import epoch_order
from dqo.callbacks import Callbacks
from dqo.config import Options
from dqo.episodes import Episode
from dqo.errors import UserError
from dqo.held_out import held_out_metrics
from dqo.inputs import Given, check_options, load_rows
from dqo.learner import Learner, update_target
from dqo.models import load_policy
from dqo.parallel import add_over_processes, start, wrap
from dqo.prepare import Prepared, prepare
from dqo.rows import Row
from dqo.step import accumulate
from dqo.trackers import Trackers
from dqo.value_models import load_critic
from dqo.watch import Watch


@dataclass
class Run:
    """A finished run, as evaluation and report read it."""

    output_dir: Path
    prepared: Prepared  # with the trained models
    steps: int
    seconds: float  # of the steps alone
    tokens_per_second: float
    held_out: dict[str, float]


class Trainer:
    """The loop's state: models, optimizers, counters and the open metrics file."""

    def __init__(self, options: Options, prepared: Prepared, callbacks: list | None = None):
        self.config, self.objective, self.prepared = options.train, options.objective, prepared
        self.learner, self.processes = prepared.learner, prepared.processes
        self.output_dir = Path(self.config.output_dir)
        self.max_tokens = self.config.batch_tokens(self.processes.device.type)
        self.per_epoch = math.ceil(len(prepared.groups) / prepared.per_step)  # the last step of an epoch may be short
        epochs = round(self.config.num_train_epochs * self.per_epoch)
        self.steps = self.config.max_steps if self.config.max_steps > 0 else epochs
        self.warmup = optim.as_steps(self.config.warmup_steps, self.steps)
        self.value_warmup = optim.as_steps(self.config.value_warmup_steps, self.steps)
        self.counters = {"step": 0, "num_tokens": 0, "train_seconds": 0.0, "metrics_position": 0}
        self.window: dict[str, torch.Tensor] = {}  # this process's metric sums since the last logged row

        resumed = prepared.resumed
        if resumed is not None:
            self._load(resumed)
        critic = self.learner.value_model
        self.module = wrap(self.learner, self.processes, self.config.bf16, critic is not None and self.value_warmup > 0)
        self.models = {"policy": self.learner.policy} | ({} if critic is None else {"critic": critic})
        self.rates = {"policy": self.config.learning_rate, "critic": self.config.critic_learning_rate}
        betas = (self.config.adam_beta1, self.config.adam_beta2)
        self.optimizers = {
            name: optim.make_optimizer(
                model, self.rates[name], self.config.weight_decay, betas, self.config.adam_epsilon
            )
            for name, model in self.models.items()
        }
        if resumed is not None:
            checkpoint.load_optimizers(resumed, self.optimizers)
        self.log = None
        if self.processes.main:
            self.log = metrics.MetricsFile(self.output_dir / "metrics.jsonl", self.counters["metrics_position"])
        self.watch = Watch()
        self.trackers = Trackers(options, self.processes)
        self.callbacks = Callbacks(callbacks or [], options, self.learner, prepared.tokenizer, self.processes.main)

    def _load(self, resumed: Path) -> None:
        state = checkpoint.read_state(resumed)
        self.counters = state["counters"]
        if self.processes.main:  # the sums of all processes; they need no order
            self.window = {
                name: torch.tensor(value, device=self.learner.device) for name, value in state["window"].items()
            }
        checkpoint.load_models(resumed, self.learner)
        step = self.counters["step"]
        if step < self.steps:
            self.say(f"going on from {resumed}, step {step} of {self.steps}")
        else:
            self.say(f"{self.output_dir} is finished, {step} steps: nothing is trained, its evaluation is repeated")

    def say(self, text: str) -> None:
        if self.processes.main:
            tqdm.write(text)

    def train_step(self, step: int, groups: list[list[Episode]]) -> dict[str, float]:
        """Gradients and updates; returns what is not a mean over the data."""
        train_policy = step >= self.value_warmup or "critic" not in self.models
        try:
            sums, tokens = accumulate(
                self.module,
                self.learner,
                self.objective,
                groups,
                self.max_tokens,
                self.prepared.pad_id,
                self.processes,
                train_policy,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(self._out_of_memory(step)) from error
        except UserError as error:
            raise UserError(f"step {step + 1}: {error}") from error
        self.window = metrics.add(self.window, sums)
        self.counters["num_tokens"] += tokens
        factor = optim.schedule(step, self.steps, self.warmup, self.config.lr_scheduler_type)
        logged = {"learning_rate": factor * self.rates["policy"] if train_policy else 0.0}
        for name, model in self.models.items():
            if name == "critic":
                logged["critic/learning_rate"] = factor * self.rates["critic"]
            elif not train_policy:
                continue
            norm = optim.apply(self.optimizers[name], model, factor * self.rates[name], self.config.max_grad_norm)
            if not math.isfinite(norm):
                rows = ", ".join(e.source for group in groups[:5] for e in group)
                raise UserError(f"step {step + 1}: the gradient norm of the {name} is {norm}, on rows {rows} ...")
            logged["grad_norm" if name == "policy" else "critic/grad_norm"] = norm
        if self.learner.target is not None:
            update_target(self.learner, self.objective.target_ema)
        return logged

    def _out_of_memory(self, step: int) -> str:
        tokens, peak = self.max_tokens, metrics.peak_memory_gb()
        return (
            f"step {step + 1}: out of memory on {self.learner.device} (peak {peak:.1f} GB) with micro-batches of up to "
            f"{tokens:,} tokens; the result does not depend on their size: --max_batch_tokens {max(1, tokens // 2)}. "
            "More is saved by --gradient_checkpointing, --bf16, and --use_peft"
        )

    def held_out(self) -> dict[str, float]:
        return held_out_metrics(
            self.module,
            self.learner,
            self.objective,
            self.prepared.held_out,
            self.max_tokens,
            self.prepared.pad_id,
            self.processes,
        )

    def evaluate_held_out(self, step: int) -> dict[str, float]:
        found = self.held_out()
        if found:
            self.record({"step": step, **found})
            self.callbacks.evaluate(found)
        return found

    def record(self, row: dict) -> None:
        if self.log is not None:
            self.log.write(row)
        self.trackers.log(row)
        self.callbacks.log(row)

    def save(self) -> None:
        window = self._window()
        state = {"identity": self.prepared.identity, "window": {name: pair.tolist() for name, pair in window.items()}}
        if self.log is not None:
            self.counters["metrics_position"] = self.log.position()
        checkpoint.save_checkpoint(
            self.output_dir,
            self.counters["step"],
            self.learner,
            self.prepared.tokenizer,
            self.optimizers,
            {"counters": self.counters, **state},
            self.config.save_total_limit,
            self.processes,
        )
        self.callbacks.save()

    def _window(self) -> dict[str, torch.Tensor]:
        return add_over_processes(self.window, self.processes)

    def run(self, description: str) -> dict[str, float]:
        """All steps that are left; returns the held-out metrics after the last."""
        config, counters = self.config, self.counters
        self.callbacks.train_begin(counters["step"], self.steps)
        if counters["step"] == 0:
            self.evaluate_held_out(0)
        bar = tqdm(
            total=self.steps, initial=counters["step"], desc=description, unit="step", disable=not self.processes.main
        )
        order_epoch, order = -1, []
        mark, at_mark = time.perf_counter(), dict(counters)
        for step in range(counters["step"], self.steps):
            begun = time.perf_counter()
            epoch, index = divmod(step, self.per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(len(self.prepared.groups), epoch, config.seed)
            per_step = self.prepared.per_step
            chosen = order[index * per_step : (index + 1) * per_step]
            logged = self.train_step(step, [self.prepared.groups[i] for i in chosen])
            counters["step"] = step + 1
            counters["train_seconds"] += time.perf_counter() - begun
            if (step + 1) % config.logging_steps == 0 or step + 1 == self.steps:
                row = {
                    "step": step + 1,
                    "epoch": (step + 1) / self.per_epoch,
                    **metrics.finish(self._window()),
                    **logged,
                }
                now = time.perf_counter()
                row["num_tokens"] = counters["num_tokens"]
                row["perf/tokens_per_second"] = (counters["num_tokens"] - at_mark["num_tokens"]) / (now - mark)
                row["perf/step_time"] = (now - mark) / (step + 1 - at_mark["step"])
                row["perf/peak_memory_gb"] = metrics.peak_memory_gb()
                self.record(row)
                for warning in self.watch.warnings(row):
                    self.say(f"WARNING: {warning}")
                bar.set_postfix_str(metrics.on_the_bar(row))
                self.window, mark, at_mark = {}, now, dict(counters)
            bar.update()
            if config.eval_steps and (step + 1) % config.eval_steps == 0 and step + 1 < self.steps:
                self.evaluate_held_out(step + 1)
            stop = self.callbacks.step_end(step + 1, (step + 1) / self.per_epoch)
            if (step + 1) % config.save_steps == 0 or step + 1 == self.steps or stop:
                self.save()
            if stop:
                break
        bar.close()
        return self.evaluate_held_out(counters["step"])

    def finish(self) -> None:
        """Writes the final models to output_dir, and closes the files."""
        if self.log is not None:
            self.log.close()
        prepared = self.prepared
        checkpoint.publish_models(
            self.output_dir, self.learner, prepared.tokenizer, self.processes, prepared.save_dtype
        )
        self.trackers.close()
        self.callbacks.train_end()
        self.processes.barrier()


Rows = tuple[list[Row], list[Row]]  # to train on, held out


def begin(options: Options, given: Given | None = None, rows: Rows | None = None) -> Trainer:
    """Everything up to the first step. `given` are objects in the place of options; `rows`: what `load_rows` found.

    Raises:
        UserError: for options, rows or a model that do not fit, before any work is lost.
    """
    given = given or Given()
    check_options(options, given)
    train_rows, held_rows = rows or load_rows(options, given)
    processes = start(options.train.use_cpu, options.train.fsdp)
    return Trainer(options, prepare(options, given, train_rows, held_rows, processes), given.callbacks)


def train(options: Options, description: str | None = None, rows: Rows | None = None) -> Run:
    """Trains, or goes on with a run that was killed in the same output_dir. `description` labels the progress bar."""
    trainer = begin(options, rows=rows)
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


if __name__ == "__main__":  # for launchers of processes
    from dqo.cli import train_main

    train_main()
