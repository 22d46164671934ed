"""The trainer from Python, with TRL's argument names.

from dqo import DQOConfig, DQOTrainer
trainer = DQOTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    args=DQOConfig(output_dir="out", beta=0.03, process_reward="additive"),
    train_dataset="rollouts.jsonl",
)
trainer.train()
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from dqo import checkpoint
from dqo.config import options_of
from dqo.errors import UserError
from dqo.inputs import Given
from dqo.metrics import read_metrics
from dqo.train import Trainer, begin


class DQOConfig:
    """Options of a run by keyword: those of `dqo-train --help`, and of `dqo-train --method METHOD --help`.

    Args:
        method: "dqo", "dpo", "kto", "dro", "oreo", "rft" or "sft".
        values: any other option, such as output_dir, beta, learning_rate, per_device_train_batch_size.

    Raises:
        UserError: a ValueError that names an unknown option, with the nearest known one, or a value of the wrong type or range.
    """

    def __init__(self, *, method: str = "dqo", **values: Any):
        self.options = options_of({"method": method, **values}, "DQOConfig")

    def __getattr__(self, name: str) -> Any:
        if name == "options" or name not in (flat := self.options.flat()):
            raise AttributeError(name)
        return flat[name]

    def __repr__(self) -> str:
        return f"DQOConfig({', '.join(f'{name}={value!r}' for name, value in self.options.flat().items())})"


class DQOTrainer:
    """Trains a policy, and its value model, on stored responses.

    Args:
        model: directory or hub name of a causal language model, or such a model; it is trained in place, in float32 unless
            adapters are. None: the option model_name_or_path.
        args: the options.
        train_dataset, eval_dataset: path of a rollout file, hub name, list of dicts, or datasets.Dataset, in any form that a file
            may have. None: the options dataset_name and eval_dataset_name.
        processing_class: the tokenizer; by default that of `model`.
        ref_model: reference policy, a path or a model; None: the policy as it is before training.
        callbacks: transformers.TrainerCallback objects.
        peft_config: a peft.LoraConfig; trains adapters.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: DQOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | PreTrainedModel | None = None,
        callbacks: list | None = None,
        peft_config: Any = None,
    ):
        if args is not None and not isinstance(args, DQOConfig):
            raise UserError(f"args is a {type(args).__name__}; expected a DQOConfig")
        options = (args or DQOConfig()).options
        named = {"model_name_or_path": model, "ref_model_name_or_path": ref_model}
        named |= {"dataset_name": train_dataset, "eval_dataset_name": eval_dataset}
        named = {name: str(value) for name, value in named.items() if isinstance(value, (str, Path))}
        self.options = dataclasses.replace(options, train=dataclasses.replace(options.train, **named))

        def unless_named(value: Any) -> Any:
            return None if isinstance(value, (str, Path)) else value

        self.given = Given(
            dataset=unless_named(train_dataset),
            eval_dataset=unless_named(eval_dataset),
            model=unless_named(model),
            tokenizer=processing_class,
            ref_model=unless_named(ref_model),
            peft_config=peft_config,
            callbacks=list(callbacks or ()),
        )
        self._trainer: Trainer | None = None

    def _begin(self) -> Trainer:
        if self._trainer is None:
            self._trainer = begin(self.options, self.given)
        return self._trainer

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Trains to the end. A run that was killed in the same output_dir goes on where it was; `resume_from_checkpoint` is the
        option of that name (True: "auto", False: "never").

        Returns:
            (global_step, training_loss of the last logged row, metrics: those of the held-out rows).
        """
        if resume_from_checkpoint is not None:
            value = {True: "auto", False: "never"}.get(resume_from_checkpoint, resume_from_checkpoint)
            train = dataclasses.replace(self.options.train, resume_from_checkpoint=str(value))
            self.options = dataclasses.replace(self.options, train=train)
        trainer = self._begin()
        held_out = trainer.run(self.options.train.method)
        trainer.finish()
        losses = [row["loss"] for row in self.log_history if "loss" in row]
        return TrainOutput(trainer.counters["step"], losses[-1] if losses else 0.0, held_out)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out rows, at the weights as they are."""
        trainer = self._begin()
        return trainer.held_out()

    def save_model(self, output_dir: str | Path) -> None:
        """Policy (or its adapter), tokenizer and critic/, as transformers loads them."""
        trainer = self._begin()
        prepared = trainer.prepared
        checkpoint.save_models(
            Path(output_dir), trainer.learner, prepared.tokenizer, trainer.processes, dtype=prepared.save_dtype
        )

    @property
    def model(self) -> PreTrainedModel:
        """The policy."""
        return self._begin().learner.policy

    @property
    def value_model(self) -> Any:
        """The value model, or None."""
        return self._begin().learner.value_model

    @property
    def log_history(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        return read_metrics(Path(self.options.train.output_dir) / "metrics.jsonl")
