"""The loop over steps: gradients, updates, metrics, held-out evaluation, checkpoints, and where it is stopped."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel

from dqo import signals
from dqo.config.options import Options
from dqo.data.batches import Group, distinct
from dqo.data.episodes import totals
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.processes import Processes
from dqo.train import checkpoint, metrics, optim, phases
from dqo.train.asked import Asked
from dqo.train.callbacks import Callbacks
from dqo.train.damage import checkpoints, fault, loading
from dqo.train.engine import Engine
from dqo.train.held_out import held_out_metrics, predictions
from dqo.train.held_out_start import write_start
from dqo.train.learner import update_target
from dqo.train.masters import clear_gradients, round_to_weights
from dqo.train.not_finite import NotFinite, rows_of, stopped, wrong_gradients
from dqo.train.parallel import wrap
from dqo.train.prepare import Prepared
from dqo.train.recorder import Recorder
from dqo.train.resume import stored_options
from dqo.train.schedules import critic_rate, factors
from dqo.train.sharded import within
from dqo.train.stages import Stages
from dqo.train.step import accumulate, companions_of
from dqo.train.watch import Watch
from dqo.train.weighting import Collapse

# (policy, tokenizer, step, processes) -> metrics of the policy's answers to problems; every process calls it.
Answers = Callable[[PreTrainedModel, Any, int, Processes], dict[str, float]]


class Trainer:
    """The loop's state: models, optimizers, counters and the open metrics file. `answers` adds to every evaluation."""

    def __init__(
        self, options: Options, prepared: Prepared, callbacks: list | None = None, answers: Answers | None = None
    ):
        self.options, self.prepared, self.answers = options, prepared, answers
        self.config, self.objective = options.train, prepared.objective
        self.learner, self.processes = prepared.learner, prepared.processes
        self.output_dir = Path(self.config.output_dir)
        self.per_epoch = prepared.order.per_epoch
        epochs = self.config.num_train_epochs
        self.steps = self.config.max_steps if self.config.max_steps > 0 else optim.steps_of(epochs, self.per_epoch)
        # skipped: steps left out because a callback ended their epoch
        self.counters: dict[str, Any] = {
            "step": 0,
            "skipped": 0,
            "num_tokens": 0,
            "train_seconds": 0.0,
            "train_cpu_seconds": 0.0,
            "metrics_position": 0,
        }
        self.train_rows: Sequence[Row] = ()
        self.window: dict[str, torch.Tensor] = {}  # this process's metric sums since the last logged row
        self.weights: metrics.Weights | None = None  # of the last step
        self.collapse = Collapse(self.config, getattr(self.objective, "is_cap", None))
        self.evaluated: tuple[int, dict[str, float]] | None = None  # the last evaluation's step and metrics
        self.compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None

        resumed, state = prepared.resumed, {}
        if resumed is not None:
            with loading(resumed):
                state = checkpoint.read_state(resumed)
                self._load(resumed, state)
        self.asked = Asked(self.objective, state.get("asked"))
        then = state.get("derived", {})
        self.warmup = then.get("warmup", phases.as_steps(self.config.warmup_steps, self.steps))
        critic = self.learner.value_model if options.trains_values else None
        config = self.config
        self.stretches = phases.stretches(
            self.objective, config.value_warmup_steps, self.steps, then.get("phases"), frozen=options.frozen_values
        )
        self.stages = Stages(options, prepared, self.stretches, self.steps, self.counters["step"])
        self.models = {"policy": self.learner.policy} | ({} if critic is None else {"critic": critic})
        some_unused = any(not self.models.keys() <= set(stretch.phase.trains) for stretch in self.stretches)
        bf16 = config.bf16 or config.dtype == "bfloat16"
        module = prepared.module or wrap(self.learner, self.processes, bf16, some_unused, config.fsdp_cpu_offload)
        self.engine = Engine(module, self.learner, prepared.batching, self.processes)
        self.rates = {"policy": config.learning_rate} | ({} if critic is None else {"critic": critic_rate(options)})
        self.schedules = {
            name: factors(*config.schedule_of(name), self.rates[name], self.warmup, self.steps) for name in self.models
        }
        self.norms = {"policy": config.max_grad_norm, "critic": config.critic_max_grad_norm or config.max_grad_norm}
        betas = (self.config.adam_beta1, self.config.adam_beta2)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: optim.make_optimizer(
                model, self.rates[name], config.weight_decay, betas, config.adam_epsilon, config.optim == "adamw_8bit"
            )
            for name, model in self.models.items()
        }
        if resumed is not None:
            with loading(resumed):
                checkpoint.load_optimizers(resumed, self.optimizers, self.learner)
        models = self.learner, prepared.tokenizer
        self.callbacks = Callbacks(callbacks or [], options, *models, self.processes, self.optimizers["policy"])
        self.callbacks.state.global_step, self.callbacks.state.max_steps = self.counters["step"], self.steps
        self.recorder = Recorder(options, self.processes, self.callbacks, self.counters, self._watch())
        self.processes.barrier()  # metrics.jsonl is as the checkpoint says, for all of them
        self.stays_stopped = False
        if "callbacks" in state:
            history = metrics.rows_until(self.output_dir / "metrics.jsonl", self.counters["metrics_position"])
            self.stays_stopped = self.callbacks.restore(state["callbacks"], self.output_dir, history)
        if self.config.best_metric is not None and not prepared.held_out and answers is None:
            raise UserError(
                "no response is held out, so that no evaluation can be the best: give eval_dataset_name or a greater "
                "eval_fraction, or remove metric_for_best_model and load_best_model_at_end"
            )
        self.callbacks.call("on_init_end")

    def _load(self, resumed: Path, state: dict) -> None:
        self.counters |= state["counters"]
        self.collapse.steps = state.get("collapse", 0)
        # checkpoints that do not tell were made when epochs were rounded to the nearest step
        nearest = (
            self.config.max_steps if self.config.max_steps > 0 else round(self.config.num_train_epochs * self.per_epoch)
        )
        self.steps = state.get("steps", max(1, nearest))
        if "evaluation" in state:
            self.evaluated = self.counters["step"], state["evaluation"]
        if self.processes.main:  # the sums of all processes; they need no order
            self.window = {
                name: torch.tensor(value, device=self.learner.device) for name, value in state["window"].items()
            }
        checkpoint.load_models(resumed, self.learner)
        step = self.counters["step"]
        if self.position < self.steps:
            self.processes.say(f"going on from {resumed}, step {step} of {self.steps}")
        else:
            self.processes.say(
                f"{self.output_dir} is finished, {step} steps: nothing is trained, its evaluation is repeated"
            )

    def _watch(self) -> Watch:
        beta = getattr(self.objective, "beta", None)
        largest = max(map(abs, totals(self.prepared.episodes()))) if self.objective.fits_rewards else None
        option = self.objective.likelihood_option
        unused = option if option is not None and not getattr(self.objective, option) else None
        begin = phases.last_begin(self.stretches, "policy", self.steps)
        return Watch(3, beta, largest, self.options.trains_values, unused, policy_from=begin)

    @property
    def position(self) -> int:
        """Steps of the plan that are behind: made, or left out."""
        return self.counters["step"] + self.counters["skipped"]

    def train_step(self, step: int, groups: list[Group]) -> dict[str, float]:
        """Gradients and updates; returns what is not a mean over the data."""
        trains, name_of_step = phases.trained(self.stretches, step), f"step {step + 1}"

        def gradients() -> tuple[dict[str, torch.Tensor], int]:
            clear_gradients(self.learner)  # of a try that ran out of memory
            substep_end = lambda: self.callbacks.call("on_substep_end")  # noqa: E731
            try:
                return accumulate(self.engine, self.objective, groups, trains, substep_end, self.asked)
            except NotFinite as error:
                raise stopped(error, name_of_step, self.output_dir, self.processes) from error
            except UserError as error:
                raise UserError(f"{name_of_step}: {error}") from error

        sums, tokens = self.engine.in_memory(gradients, name_of_step, groups, companions_of(groups))
        sums, self.weights = metrics.of_step(sums, self.processes)
        warning = self.collapse.note(step + 1, self.weights) if "policy" in trains else None
        if warning is not None:
            self.processes.say(f"WARNING: {warning}")
        self.window = metrics.add(self.window, sums)
        self.counters["num_tokens"] += tokens
        self.counters |= self.asked.settle(self.processes)
        trained = {name: model for name, model in self.models.items() if name in trains}
        rates = {name: self.rates[name] * self.schedules[name](step) for name in trained}
        logged = {"learning_rate": rates.get("policy", 0.0)}
        for name, model in trained.items():
            if name == "critic":
                logged["critic/learning_rate"] = rates["critic"]
            norm = optim.clip(model, self.norms[name])
            if not math.isfinite(norm):
                episodes = distinct(groups)
                what = f"the gradient norm of the {name} is {norm}{wrong_gradients(model)}, on rows {rows_of(episodes)}"
                raise stopped(NotFinite(what, episodes), name_of_step, self.output_dir, self.processes)
            logged["grad_norm" if name == "policy" else "critic/grad_norm"] = norm
        self.callbacks.call("on_pre_optimizer_step")
        for name, model in trained.items():
            optim.update(self.optimizers[name], rates[name])
            round_to_weights(model)
        self.callbacks.call("on_optimizer_step")
        for name in trained:
            self.optimizers[name].zero_grad(set_to_none=True)
        decay = self.objective.values_decay
        if decay is not None and self.learner.target is not None and "critic" in trained:
            update_target(self.learner, decay)
        return logged

    def held_out(self, groups: list[Group] | None = None) -> dict[str, float]:
        """Metrics of the held-out rows, or of others that the objective chose, with what compute_metrics makes of them."""
        untrained = groups is None and self.counters["step"] == 0
        groups = self.prepared.held_out if groups is None else groups
        found, tokens = held_out_metrics(self.engine, self.objective, groups, self.callbacks.prediction_step)
        if untrained and groups and self.processes.main:
            write_start(self.output_dir, distinct(groups), tokens)
        if self.compute_metrics is not None and groups:
            by_name, rewards = predictions(self.engine, distinct(groups))
            prediction = EvalPrediction(by_name, rewards)  # type: ignore[arg-type]  # arrays by name, not one or a tuple
            found |= metrics.computed(self.compute_metrics(prediction))
        return found

    def evaluate_held_out(self, step: int) -> dict[str, float]:
        """Evaluates and records, once a step; a best evaluation asks for a checkpoint."""
        if self.evaluated is None or self.evaluated[0] != step:
            row = {"step": step, **self.held_out()}
            if self.answers is not None:
                asked = self.learner.policy, self.prepared.tokenizer, step, self.processes
                row |= within(self.engine.module, self.answers, *asked)
            if len(row) > 1:
                self.recorder.record(row, evaluation=True)
            found = {name: value for name, value in row.items() if name != "step"}
            self.evaluated = step, found
            if step > 0:
                self.callbacks.note_best(step, found, self.output_dir / f"checkpoint-{step}")
            elif found:
                self.callbacks.metric_name(found)  # refused now rather than at the first comparison
        self.callbacks.control.should_evaluate = False
        return self.evaluated[1]

    def load_best(self) -> dict[str, float] | None:
        """The best evaluation's weights, and their metrics; None where the last step's are the best."""
        state = self.callbacks.state
        if state.best_model_checkpoint is None or state.best_global_step in (None, self.counters["step"]):
            return None
        best = Path(state.best_model_checkpoint)
        if what := self.processes.from_main(lambda: fault(best)):
            self.processes.say(
                f"WARNING: {what}. It is the best by {self.config.best_metric}; the last step's models stay"
            )
            return None
        checkpoint.load_models(best, self.learner)
        self.processes.say(
            f"models of step {state.best_global_step}: {self.config.best_metric} {state.best_metric:.6g} is the best"
        )
        return self.held_out()

    def save(self) -> None:
        window = self._window()
        state: dict[str, Any] = {
            "identity": self.prepared.identity,
            "window": {name: pair.tolist() for name, pair in window.items()},
            "collapse": self.collapse.steps,
            **self.asked.stored(),
        }
        self.counters |= self.recorder.position()
        state |= {"counters": self.counters, "steps": self.steps, "callbacks": self.callbacks.stored()}
        state |= stored_options(
            self.options, self.warmup, self.stretches, self.prepared.save_dtype, self.objective.weight_level
        )
        if self.evaluated is not None and self.evaluated[0] == self.counters["step"]:
            state["evaluation"] = self.evaluated[1]
        best = self.callbacks.state.best_model_checkpoint
        checkpoint.save_checkpoint(
            self.output_dir,
            self.counters["step"],
            self.learner,
            self.prepared.tokenizer,
            self.optimizers,
            state,
            self.config.save_total_limit,
            self.processes,
            None if best is None else Path(best),
        )
        self.callbacks.saved()

    def _window(self) -> dict[str, torch.Tensor]:
        return metrics.over_processes(self.window, self.processes)

    def run(self, description: str) -> dict[str, float]:
        """All steps that are left; returns the held-out metrics after the last, or of the best.

        Raises:
            KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, when the step is over and a checkpoint is written.
        """
        events = self.callbacks
        events.train_begin(self.counters["step"], self.steps)
        events.control.should_training_stop |= self.stays_stopped
        if self.counters["step"] == 0:
            self.evaluate_held_out(0)
        with signals.waiting():
            self._steps(description)
        found = self.evaluate_held_out(self.counters["step"])
        return (self.load_best() if self.config.load_best_model_at_end else None) or found

    def _steps(self, description: str) -> None:
        counters, events = self.counters, self.callbacks
        bar = tqdm(
            total=self.steps, initial=self.position, desc=description, unit="step", disable=not self.processes.main
        )
        epoch_begun = -1
        self.recorder.start(counters)
        while self.position < self.steps and not events.control.should_training_stop:
            if (epoch := self.position // self.per_epoch) != epoch_begun:
                epoch_begun = epoch
                events.epoch_begin()
            events.step_begin()
            self.stages.enter(counters["step"])
            begun, cpu_begun = time.perf_counter(), time.process_time()
            chosen = self.stages.groups(counters["step"], self.position)
            logged = self.train_step(counters["step"], [self.prepared.groups[i] for i in chosen])
            counters["step"] += 1
            counters["train_seconds"] += time.perf_counter() - begun
            counters["train_cpu_seconds"] += time.process_time() - cpu_begun
            self._after_step(logged, bar)
            bar.update(self.position - bar.n)
            if (reason := self.collapse.stop(counters["step"], self.weights)) is not None:
                self._stop_dead(reason, logged, bar)
        bar.close()

    def _stop_dead(self, reason: str, logged: dict[str, float], bar: tqdm) -> None:
        """Ends a run that learns nothing any more. The checkpoints of better days stay; where there is none, one is written."""
        if self.window:
            self._log_step(logged, bar)
        bar.close()
        if self.processes.from_main(lambda: not checkpoints(self.output_dir)):
            self.save()
        kept = self.processes.from_main(lambda: checkpoints(self.output_dir)[-1])
        self.recorder.close()
        raise UserError(f"{reason}. {kept} is kept")

    def _stop_by(self, number: int, bar: tqdm) -> None:
        bar.close()
        name, step = signal.Signals(number).name, self.counters["step"]
        where = self.output_dir / f"checkpoint-{step}"
        self.processes.say(
            f"{name}: stopped after step {step} of {self.steps}; {where} is written, the same command goes on there"
        )
        self.recorder.close()
        raise signals.interruption(number)

    def _after_step(self, logged: dict[str, float], bar: tqdm) -> None:
        """Rows, evaluations and checkpoints that are due, or that callbacks ask for."""
        config, counters, events = self.config, self.counters, self.callbacks
        step, last = counters["step"], self.position >= self.steps
        due = {
            "should_log": step % config.logging_steps == 0 or last,
            "should_evaluate": config.eval_steps > 0 and step % config.eval_steps == 0 and not last,
            # a checkpoint of weights that collapse would take the place of a better one
            "should_save": (step % config.save_steps == 0 and not self.collapse.steps) or last,
        }
        events.step_end(step, self.position / self.per_epoch, counters["num_tokens"], due)
        self._log_and_evaluate(logged, bar)
        if self.position % self.per_epoch == 0 or last or events.control.should_epoch_stop:
            if events.control.should_epoch_stop:
                counters["skipped"] += -self.position % self.per_epoch
            events.call("on_epoch_end")
            self._log_and_evaluate(logged, bar)
        last = self.position >= self.steps
        if last and self.window:
            self._log_step(logged, bar)
        ending = last or events.control.should_training_stop
        if ending and config.best_metric is not None:  # the last checkpoint may be the best
            self.evaluate_held_out(step)
        number = self.processes.largest(signals.noted())  # of all processes, which stop together
        if ending or events.control.should_save or number:
            self.save()
        if number:
            self._stop_by(number, bar)

    def _log_and_evaluate(self, logged: dict[str, float], bar: tqdm) -> None:
        if self.callbacks.control.should_log and self.window:
            self._log_step(logged, bar)
        if self.callbacks.control.should_evaluate:
            self.evaluate_held_out(self.counters["step"])

    def _log_step(self, logged: dict[str, float], bar: tqdm) -> None:
        means = metrics.finish(self._window()) | logged
        self.recorder.record_steps(self.counters, self.position / self.per_epoch, means, bar)
        self.window = {}

    def finish(self) -> None:
        """Writes the final models to output_dir, and closes the files."""
        prepared = self.prepared
        checkpoint.publish_models(
            self.output_dir, self.learner, prepared.tokenizer, self.processes, prepared.save_dtype
        )
        self.callbacks.call("on_train_end")
        self.recorder.end()
        self.processes.barrier()
