"""transformers' TrainerCallbacks around our loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from dqo.config import Options
from dqo.learner import Learner


class Callbacks:
    """Calls on_train_begin, on_step_end, on_log, on_evaluate, on_save and on_train_end of each, in their order.

    Their `args` are the options by name; `state` has global_step, max_steps, epoch and log_history; of `control`,
    should_training_stop is obeyed. model and processing_class are keyword arguments, as in transformers.
    """

    def __init__(
        self,
        callbacks: list[TrainerCallback],
        options: Options,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        main: bool,
    ):
        self.callbacks = callbacks
        self.args = SimpleNamespace(**options.flat())
        self.state = TrainerState(is_world_process_zero=main, is_local_process_zero=main)
        self.control = TrainerControl()
        self.models = {"model": learner.policy, "processing_class": tokenizer}

    def _call(self, event: str, **options: Any) -> None:
        for callback in self.callbacks:
            changed = getattr(callback, event)(self.args, self.state, self.control, **self.models, **options)
            self.control = changed or self.control

    def train_begin(self, step: int, steps: int) -> None:
        self.state.global_step, self.state.max_steps = step, steps
        self._call("on_train_begin")

    def step_end(self, step: int, epoch: float) -> bool:
        """Whether a callback wants the training to stop after this step."""
        self.state.global_step, self.state.epoch = step, epoch
        self._call("on_step_end")
        return self.control.should_training_stop

    def log(self, row: dict[str, float]) -> None:
        self.state.global_step = int(row["step"])
        self.state.log_history.append(row)
        self._call("on_log", logs=row)

    def evaluate(self, found: dict[str, float]) -> None:
        self._call("on_evaluate", metrics=found)

    def save(self) -> None:
        self._call("on_save")

    def train_end(self) -> None:
        self._call("on_train_end")
