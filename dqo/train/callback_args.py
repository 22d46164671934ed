"""What callbacks get as `args`: our options by name, and the other names of transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from transformers import IntervalStrategy, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import ParallelMode

from dqo.config.options import Options
from dqo.errors import did_you_mean
from dqo.processes import Processes


class CallbackArguments:
    """Attributes: every option of the run; what transformers derives from them (eval_strategy, world_size, device ...); and
    TrainingArguments' own defaults for what this trainer does not have (fp16 is False, push_to_hub is False ...).

    Raises:
        AttributeError: for a name that neither has.
    """

    def __init__(self, options: Options, processes: Processes):
        defaults = {}
        for field in dataclasses.fields(TrainingArguments):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                defaults[field.name] = field.default_factory()
        self.__dict__.update(defaults | options.flat() | _derived(options, processes))

    def __getattr__(self, name: str) -> Any:  # for names that are not in __dict__
        near = did_you_mean(name, self.__dict__)
        raise AttributeError(f"args has no {name!r}: it is neither an option nor a field of TrainingArguments.{near}")

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, as JSON can hold it."""
        return json.loads(json.dumps(self.__dict__, default=str))

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """As trackers take it: bool, int, float or str."""
        return {n: v if isinstance(v, (bool, int, float, str)) else str(v) for n, v in self.to_dict().items()}

    def get_process_log_level(self) -> int:
        import logging

        return logging.WARNING if self.process_index == 0 else logging.ERROR


def _derived(options: Options, processes: Processes) -> dict[str, Any]:
    config = options.train
    on_accelerator = processes.device.type != "cpu"
    return {
        "eval_strategy": IntervalStrategy.STEPS if config.eval_steps else IntervalStrategy.NO,
        "logging_strategy": IntervalStrategy.STEPS,
        "save_strategy": SaveStrategy.STEPS,
        "eval_on_start": True,
        "do_train": True,
        "do_eval": config.eval_steps > 0,
        "metric_for_best_model": config.best_metric,
        "greater_is_better": config.best_is_greatest,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "train_batch_size": config.per_device_train_batch_size,
        "eval_batch_size": config.per_device_train_batch_size,
        "device": processes.device,
        "n_gpu": int(on_accelerator),
        "_n_gpu": int(on_accelerator),
        "parallel_mode": ParallelMode.DISTRIBUTED if processes.world > 1 else ParallelMode.NOT_PARALLEL,
        "world_size": processes.world,
        "process_index": processes.rank,
        "local_process_index": processes.local_rank,
        "local_rank": processes.local_rank,
        "should_log": processes.main,
        "should_save": processes.main,
    }
