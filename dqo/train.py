"""Training, read top to bottom: rows -> episodes and models -> steps -> checkpoints -> held-out evaluation.

dqo-train --dataset_name rollouts.jsonl --model_name_or_path DIR_OR_HUB_NAME --output_dir out
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
from dqo.config import Options, dump_options
from dqo.episodes import Episode
from dqo.errors import UserError
from dqo.held_out import held_out_metrics
from dqo.models import load_critic, load_policy
from dqo.prepare import Prepared, check_options, load_rows, prepare
from dqo.step import accumulate


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

    def __init__(self, options: Options, prepared: Prepared):
        self.config, self.objective, self.prepared = options.train, options.objective, prepared
        self.output_dir = Path(self.config.output_dir)
        per_step = self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps
        self.per_step = per_step
        self.per_epoch = math.ceil(len(prepared.groups) / per_step)  # the last step of an epoch may be short
        epochs = round(self.config.num_train_epochs * self.per_epoch)
        self.steps = self.config.max_steps if self.config.max_steps > 0 else epochs
        self.warmup = optim.as_steps(self.config.warmup_steps, self.steps)
        self.value_warmup = optim.as_steps(self.config.value_warmup_steps, self.steps)
        self.counters = {"step": 0, "num_tokens": 0, "train_seconds": 0.0, "metrics_position": 0}
        self.window: dict[str, torch.Tensor] = {}  # metric sums since the last logged row

        resumed = self._resumable()
        if resumed is not None:
            self._load_models(resumed)
        self.models = {"policy": prepared.policy}
        if prepared.value_model is not None:
            self.models["critic"] = prepared.value_model
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
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "config.yaml").write_text(dump_options(options))
        self.log = metrics.MetricsFile(self.output_dir / "metrics.jsonl", self.counters["metrics_position"])

    def _resumable(self) -> Path | None:
        found = checkpoint.checkpoints(self.output_dir)
        if not found:
            return None
        checkpoint.check_same_run(found[-1], self.prepared.identity)
        return found[-1]

    def _load_models(self, resumed: Path) -> None:
        state = checkpoint.read_state(resumed)
        self.counters = state["counters"]
        self.window = {name: torch.tensor(pair) for name, pair in state["window"].items()}
        self.prepared.policy = load_policy(str(resumed), self.prepared.device)
        if self.prepared.value_model is not None:
            self.prepared.value_model = load_critic(resumed / "critic", self.prepared.device)
        tqdm.write(f"going on from {resumed}, step {self.counters['step']} of {self.steps}")

    def train_step(self, step: int, groups: list[list[Episode]]) -> dict[str, float]:
        """Gradients and updates; returns what is not a mean over the data."""
        train_policy = step >= self.value_warmup or "critic" not in self.models
        sums, tokens = accumulate(
            self.prepared.policy,
            self.prepared.value_model,
            self.objective,
            groups,
            self.config.per_device_train_batch_size,
            self.prepared.pad_id,
            train_policy,
        )
        self.window = metrics.add(self.window, sums)
        self.counters["num_tokens"] += tokens
        factor = optim.schedule(step, self.steps, self.warmup, self.config.lr_scheduler_type)
        logged = {"learning_rate": factor * self.rates["policy"] if train_policy else 0.0}
        for name, model in self.models.items():
            if name == "policy" and not train_policy:
                continue
            norm = optim.apply(self.optimizers[name], model, factor * self.rates[name], self.config.max_grad_norm)
            if not math.isfinite(norm):
                rows = ", ".join(e.source for group in groups[:5] for e in group)
                raise UserError(f"step {step + 1}: the gradient norm of the {name} is {norm}, on rows {rows} ...")
            logged["grad_norm" if name == "policy" else "critic/grad_norm"] = norm
        return logged

    def evaluate_held_out(self, step: int) -> dict[str, float]:
        if not self.prepared.held_out:
            return {}
        found = held_out_metrics(
            self.prepared.policy,
            self.prepared.value_model,
            self.objective,
            self.prepared.held_out,
            4 * self.config.per_device_train_batch_size,
            self.prepared.pad_id,
        )
        self.log.write({"step": step, **found})
        return found

    def save(self) -> None:
        self.counters["metrics_position"] = self.log.position()
        window = {name: pair.tolist() for name, pair in self.window.items()}
        state = {"counters": self.counters, "window": window, "identity": self.prepared.identity}
        checkpoint.save_checkpoint(
            self.output_dir,
            self.counters["step"],
            self.prepared.policy,
            self.prepared.value_model,
            self.prepared.tokenizer,
            self.optimizers,
            state,
            self.config.save_total_limit,
        )

    def run(self, description: str) -> dict[str, float]:
        """All steps that are left; returns the held-out metrics after the last."""
        config, counters = self.config, self.counters
        if counters["step"] == 0:
            self.evaluate_held_out(0)
        bar = tqdm(total=self.steps, initial=counters["step"], desc=description, unit="step")
        order_epoch, order = -1, []
        mark, tokens_at_mark = time.perf_counter(), counters["num_tokens"]
        for step in range(counters["step"], self.steps):
            begun = time.perf_counter()
            epoch, index = divmod(step, self.per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(len(self.prepared.groups), epoch, config.seed)
            chosen = order[index * self.per_step : (index + 1) * self.per_step]
            logged = self.train_step(step, [self.prepared.groups[i] for i in chosen])
            counters["step"] = step + 1
            counters["train_seconds"] += time.perf_counter() - begun
            if (step + 1) % config.logging_steps == 0 or step + 1 == self.steps:
                row = {"step": step + 1, "epoch": (step + 1) / self.per_epoch, **metrics.finish(self.window), **logged}
                now = time.perf_counter()
                row["num_tokens"] = counters["num_tokens"]
                row["perf/tokens_per_second"] = (counters["num_tokens"] - tokens_at_mark) / (now - mark)
                row["perf/peak_memory_gb"] = metrics.peak_memory_gb()
                self.log.write(row)
                bar.set_postfix_str(f"loss {row['loss']:.4g}")
                self.window, mark, tokens_at_mark = {}, now, counters["num_tokens"]
            bar.update()
            if config.eval_steps and (step + 1) % config.eval_steps == 0 and step + 1 < self.steps:
                self.evaluate_held_out(step + 1)
            if (step + 1) % config.save_steps == 0 or step + 1 == self.steps:
                self.save()
        bar.close()
        return self.evaluate_held_out(self.steps)


def train(options: Options, description: str | None = None) -> Run:
    """Trains, or goes on with a run that was killed in the same output_dir. `description` labels the progress bar.

    Raises:
        UserError: for options, rows or a model that do not fit, before any work is lost.
    """
    check_options(options)
    rows, held_rows = load_rows(options)
    prepared = prepare(options, rows, held_rows)
    trainer = Trainer(options, prepared)
    held_out = trainer.run(description or options.train.method)
    trainer.log.close()
    checkpoint.save_models(trainer.output_dir, prepared.policy, prepared.value_model, prepared.tokenizer)
    seconds = trainer.counters["train_seconds"]
    rate = trainer.counters["num_tokens"] / seconds if seconds else 0.0
    return Run(trainer.output_dir, prepared, trainer.steps, seconds, rate, held_out)
