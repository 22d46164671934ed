"""transformers' TrainerCallbacks around our loop, and the best checkpoint by a held-out metric.

Called, in this order: on_init_end, on_train_begin, on_epoch_begin, on_step_begin, on_substep_end (after each micro-batch but a
step's last), on_pre_optimizer_step, on_optimizer_step, on_step_end, on_log, on_prediction_step, on_evaluate, on_epoch_end,
on_save, on_train_end; and on_predict and on_push_begin by DQOTrainer. lr_scheduler and train_dataloader are None: the schedule is
a function of the step, and a step's responses come from an index. What on_log adds to `logs`, and on_evaluate to `metrics`, is in
metrics.jsonl and goes to the tracker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from dqo.config.options import Options, TrainConfig
from dqo.errors import UserError, did_you_mean
from dqo.processes import Processes
from dqo.train.callback_args import CallbackArguments
from dqo.train.learner import Learner

BEST = ("best_metric", "best_global_step", "best_model_checkpoint")
BEST_BY = ("metric_for_best_model", "greater_is_better")


def made(callback: Any) -> TrainerCallback:
    """A callback given as an object or as its class, as transformers takes both.

    Raises:
        UserError: for anything else.
    """
    found = callback() if isinstance(callback, type) else callback
    if not isinstance(found, TrainerCallback):
        raise UserError(f"callbacks: {found!r} is a {type(found).__name__}; expected a transformers.TrainerCallback")
    return found


def check_callbacks(callbacks: list[TrainerCallback], config: TrainConfig) -> None:
    """Refuses early stopping without what it looks at, before any work."""
    if any(isinstance(made(callback), EarlyStoppingCallback) for callback in callbacks):
        missing = [name for name in ("eval_steps", "metric_for_best_model") if not getattr(config, name)]
        if config.load_best_model_at_end:
            missing = [name for name in missing if name != "metric_for_best_model"]
        if missing:
            raise UserError(f"EarlyStoppingCallback needs {' and '.join(missing)}: set them in DQOConfig")


class Callbacks:
    """The callbacks in their order, with one `args`, `state` and `control` for all.

    Of `control` all five switches are obeyed; they are set for what is due anyway before on_step_end, so that a callback may also
    take them back.
    """

    def __init__(
        self,
        callbacks: list[Any],
        options: Options,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        processes: Processes,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        config = options.train
        self.config = config
        self.callbacks = [made(callback) for callback in callbacks]
        self.args = CallbackArguments(options, processes)
        self.state = TrainerState(
            is_world_process_zero=processes.main,
            is_local_process_zero=processes.local_rank == 0,
            logging_steps=config.logging_steps,
            eval_steps=config.eval_steps,
            save_steps=config.save_steps,
            train_batch_size=config.per_device_train_batch_size,
            num_train_epochs=config.num_train_epochs,  # type: ignore[arg-type]  # may be a share of an epoch here
        )
        self.control = TrainerControl()
        self.fixed = {"model": learner.policy, "processing_class": tokenizer, "optimizer": optimizer}
        self.fixed |= {"lr_scheduler": None, "train_dataloader": None, "eval_dataloader": None}

    def call(self, event: str, **options: Any) -> TrainerControl:
        for callback in self.callbacks:
            found = getattr(callback, event)(self.args, self.state, self.control, **self.fixed | options)
            self.control = found or self.control
        return self.control

    def train_begin(self, step: int, steps: int) -> None:
        self.state.global_step, self.state.max_steps = step, steps
        self.control.should_training_stop = False
        self.call("on_train_begin")

    def epoch_begin(self) -> None:
        self.control.should_epoch_stop = False
        self.call("on_epoch_begin")

    def step_begin(self) -> None:
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.call("on_step_begin")

    def step_end(self, step: int, epoch: float, tokens: int, due: dict[str, bool]) -> TrainerControl:
        """`due`: the switches that are set without any callback."""
        self.state.global_step, self.state.epoch, self.state.num_input_tokens_seen = step, epoch, tokens
        for name, value in due.items():
            setattr(self.control, name, value)
        return self.call("on_step_end")

    def log(self, row: dict[str, float]) -> None:
        self.control.should_log = False
        self.state.global_step = int(row["step"])
        self.state.log_history.append(row)
        self.call("on_log", logs=row)

    def evaluated(self, row: dict[str, float]) -> None:
        self.control.should_evaluate = False
        self.call("on_evaluate", metrics=row)

    def prediction_step(self, batches: Any) -> None:
        """`batches`: has the number of micro-batches as its length."""
        if self.callbacks:
            self.call("on_prediction_step", eval_dataloader=batches)

    def saved(self) -> None:
        self.control.should_save = False
        self.call("on_save")

    # The best checkpoint

    def metric_name(self, metrics: dict[str, float]) -> str | None:
        """The name of metric_for_best_model among `metrics`, which are the held-out rows'.

        Raises:
            UserError: when it is not there.
        """
        name = self.config.best_metric
        if name is None:
            return None
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise UserError(
                f"metric_for_best_model {self.config.best_metric!r} is not among the held-out metrics: "
                f"{', '.join(metrics)}.{did_you_mean(name, metrics)}"
            )
        if isinstance(found := metrics[name], str) or found is None:
            raise UserError(f"metric_for_best_model {self.config.best_metric!r} is {found!r}; expected a number")
        return name

    def note_best(self, step: int, metrics: dict[str, float], checkpoint: Path) -> None:
        """Remembers the best evaluation, which is then followed by a checkpoint."""
        name, state = self.metric_name(metrics), self.state
        if name is None:
            return
        found, best = metrics[name], state.best_metric
        better = found == found if best is None else (found > best if self.config.best_is_greatest else found < best)
        if better:
            state.best_metric, state.best_global_step, state.best_model_checkpoint = found, step, str(checkpoint)
            self.control.should_save = True

    def _note_again(self, checkpoint_dir: Path, log_history: list[dict]) -> None:
        """The best of the evaluations before now whose checkpoint is still there."""
        name = f"eval_{(self.config.best_metric or '').removeprefix('eval_')}"
        for row in log_history:
            checkpoint = checkpoint_dir / f"checkpoint-{row['step']}"
            if row["step"] > 0 and name in row and checkpoint.is_dir():
                self.note_best(row["step"], row, checkpoint)
        self.control.should_save = False

    # What a checkpoint keeps

    def stored(self) -> dict:
        """The best evaluation, and the states of callbacks that have one (transformers' ExportableState)."""
        states = [[type(c).__name__, c.state()] for c in self.callbacks if isinstance(c, ExportableState)]
        best = {name: getattr(self.state, name) for name in BEST}
        best |= {name: getattr(self.args, name) for name in BEST_BY}
        return {**best, "callbacks": states, "stopped": self.control.should_training_stop}

    def restore(self, stored: dict, checkpoint_dir: Path, log_history: list[dict]) -> bool:
        """Takes up what `stored` returned. Returns whether the run had been stopped by callbacks that would stop it again: they
        are given again, as they were."""
        self.state.log_history = log_history
        if all(stored.get(name) == getattr(self.args, name) for name in BEST_BY if name in stored):
            for name in BEST:
                setattr(self.state, name, stored.get(name))
        else:  # what was the best by another metric says nothing about this one
            self._note_again(checkpoint_dir, log_history)
        if self.state.best_global_step is not None:  # output_dir may have been moved
            self.state.best_model_checkpoint = str(checkpoint_dir / f"checkpoint-{self.state.best_global_step}")
        states = [c for c in self.callbacks if isinstance(c, ExportableState)]
        saved = stored.get("callbacks", [])
        same = bool(saved) and len(states) == len(saved)
        for callback, (name, state) in zip(states, saved):
            if type(callback).__name__ != name:
                same = False
                continue
            same = same and callback.state()["args"] == state["args"]
            for attribute, value in state["attributes"].items():
                setattr(callback, attribute, value)
        return same and stored.get("stopped", False)
