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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PredictionOutput, TrainOutput

from dqo.comparison.run import compare as compare
from dqo.config.launcher import obey
from dqo.config.options import Options, check_values, options_of
from dqo.config.sampling import SampleConfig
from dqo.config.values import checked_config
from dqo.data.overlap import check_unseen, trained_problems
from dqo.data.stored import column
from dqo.environment import env as env
from dqo.errors import UserError, did_you_mean
from dqo.evaluation.during import answering
from dqo.evaluation.evaluate import evaluate as evaluate
from dqo.evaluation.run import answers_of, base_answers
from dqo.evaluation.tasks import check_tasks, read_tasks
from dqo.files import writing
from dqo.inspection.run import inspect as inspect
from dqo.objectives.base import Objective
from dqo.objectives.registry import DEFAULT_METHOD, method_of, methods_table
from dqo.peers import told, told_by_methods
from dqo.report.command import report as report
from dqo.report.run import report_run
from dqo.sampling.backends import launched_for
from dqo.sampling.run import Sampled, sample_rows
from dqo.scoring.run import score  # noqa: F401
from dqo.train import checkpoint, hub
from dqo.train.absent import ABSENT
from dqo.train.callbacks import check_callbacks, made
from dqo.train.evaluation_rows import evaluation_episodes
from dqo.train.export import export as export
from dqo.train.held_out import predictions
from dqo.train.inputs import Given, check_options, load_rows, shared_prompts
from dqo.train.loop import Trainer
from dqo.train.metrics import read_metrics
from dqo.train.resume import as_stored
from dqo.train.run import Rows, begin, run_of
from dqo.zpg.run import zpg as zpg


class DQOConfig:
    """Options of a run by keyword: those of `dqo-train --help`, and of `dqo-train --method METHOD --help`.

    Args:
        method: a name, "package.module:Class", or a subclass of dqo.objectives.base.Objective. The names are
            {methods}
        values: any other option, such as output_dir, beta, learning_rate, per_device_train_batch_size.

    Raises:
        UserError: a ValueError that names an unknown option, with the nearest known one, or a value of the wrong type or range.
    """

    def __init__(self, *, method: str | type[Objective] = DEFAULT_METHOD, **values: Any):
        name = method_of(method) if isinstance(method, type) else method
        self.options = options_of({"method": name, **values}, "DQOConfig")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "options" or "options" in self.__dict__:
            raise AttributeError(f"a DQOConfig does not change: make another, with {name}= among its arguments")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "options" or name.startswith("__"):
            raise AttributeError(name)
        if name not in (flat := self.options.flat()):
            raise AttributeError(
                f"DQOConfig with method {flat['method']} has no option {name!r}.{did_you_mean(name, flat)}"
            )
        return flat[name]

    def __repr__(self) -> str:
        return f"DQOConfig({', '.join(f'{name}={value!r}' for name, value in self.options.flat().items())})"


DQOConfig.__doc__ = str(DQOConfig.__doc__).format(methods=methods_table().replace("\n", f"\n{' ' * 12}"))


def _refuse_twice(options: Options, given: dict[str, Any]) -> None:
    """Refuses an argument of DQOTrainer in whose place `options` name something else. A model object, of which nothing says where
    its tokenizer lies, may come with model_name_or_path."""
    argument = {"model_name_or_path": "model", "ref_model_name_or_path": "ref_model"}
    argument |= {"dataset_name": "train_dataset", "eval_dataset_name": "eval_dataset"}
    for name, value in given.items():
        told = getattr(options.train, name)
        an_object = not isinstance(value, (str, Path))
        if value is None or told is None or (an_object and name == "model_name_or_path"):
            continue
        if an_object or str(value) != told:
            raise UserError(f"{argument[name]} and {name}={told!r} (from DQOConfig) are both given; remove one")


@told
def sample(quiet: bool = False, **options: Any) -> Sampled:
    """Samples responses of a model to prompts into a file of rollout rows, as `dqo sample` does: sample(model_name_or_path="DIR",
    prompts="prompts.jsonl", output_file="rollouts.jsonl", num_generations=8). A call that was killed goes on where it was.

    Args:
        quiet: without a progress bar.
        options: those of `dqo.config.sampling.SampleConfig`.

    Raises:
        UserError: for options, prompts or a model that do not fit, before any work.
    """
    config = checked_config(SampleConfig, options)
    return sample_rows(config, quiet, launched_for("dqo sample", config.backend, config.use_cpu))


@told_by_methods
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
        callbacks: transformers.TrainerCallback objects or classes.
        peft_config: a peft.LoraConfig; trains adapters.
        compute_metrics: gets an EvalPrediction of the held-out responses at every evaluation, and returns numbers by name, which
            are logged with eval_ before the name. Its predictions and label_ids are those of `predict`.
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
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ):
        if args is not None and not isinstance(args, DQOConfig):
            raise UserError(f"args is a {type(args).__name__}; expected a DQOConfig")
        self.args = args or DQOConfig()
        options = self.args.options
        if options.train.dry_run:
            raise UserError("dry_run is an option of the command line: dqo-train --dry_run; leave it out of DQOConfig")
        named: dict[str, Any] = {"model_name_or_path": model, "ref_model_name_or_path": ref_model}
        named |= {"dataset_name": train_dataset, "eval_dataset_name": eval_dataset}
        _refuse_twice(options, named)
        named = {name: str(value) for name, value in named.items() if isinstance(value, (str, Path))}
        named_options = dataclasses.replace(options, train=dataclasses.replace(options.train, **named))
        check_values(named_options)
        self.options = obey(named_options)

        def unless_named(value: Any) -> Any:
            return None if isinstance(value, (str, Path)) else value

        self.given = Given(
            dataset=unless_named(train_dataset),
            eval_dataset=unless_named(eval_dataset),
            model=unless_named(model),
            tokenizer=processing_class,
            ref_model=unless_named(ref_model),
            peft_config=peft_config,
            callbacks=[made(callback) for callback in callbacks or ()],
        )
        self.compute_metrics = compute_metrics
        self._trainer: Trainer | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ABSENT:
            raise AttributeError(f"DQOTrainer has no {name}: {ABSENT[name]}")
        if hasattr(transformers.Trainer, name):
            raise AttributeError(f"DQOTrainer has no {name}, which transformers.Trainer has: its loop is dqo.train's")
        raise AttributeError(f"DQOTrainer has no {name!r}.{did_you_mean(name, dir(type(self)))}")

    def _begin(self, rows: Rows | None = None) -> Trainer:
        if self._trainer is None:
            self.options = as_stored(self.options)
            tasks = read_tasks(self.options.train.eval_tasks, self.options.train.verifier)
            answers = answering(self.options, tasks)
            self._trainer = begin(self.options, self.given, rows, announce=True, answers=answers)
            self._trainer.compute_metrics = self.compute_metrics
        return self._trainer

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Trains to the end, answers eval_tasks and writes report.html, as the command line does. A run that was killed in the
        same output_dir goes on where it was; `resume_from_checkpoint` is the option of that name (True: "auto", False: "never").

        Returns:
            (global_step, training_loss of the last logged row, metrics: those of the held-out rows).
        """
        if resume_from_checkpoint is not None:
            value = resume_from_checkpoint
            if isinstance(value, bool):
                value = "auto" if value else "never"
            if self._trainer is not None and str(value) not in ("auto", self.options.train.resume_from_checkpoint):
                raise UserError(
                    f"resume_from_checkpoint {value} comes too late: this DQOTrainer has already begun, at its first train, "
                    "evaluate, predict, model or state; make another one, and call train first"
                )
            train = dataclasses.replace(self.options.train, resume_from_checkpoint=str(value))
            self.options = dataclasses.replace(self.options, train=train)
        self.options = as_stored(self.options)
        check_callbacks(self.given.callbacks, self.options.train)
        tasks = read_tasks(self.options.train.eval_tasks, self.options.train.verifier)
        base = rows = None
        if self._trainer is None:
            check_options(self.options, self.given)
            rows = load_rows(self.options, self.given) if tasks else None
        if tasks:
            trained = trained_problems(rows[0] if rows else self._begin().train_rows)
            names = (
                str(self.options.train.eval_tasks),
                self.options.train.dataset_name or "the rows that are trained on",
            )
            check_unseen(tasks, trained, *names)
            check_tasks(self.options, self.given.model, self.given.tokenizer, tasks)
        if tasks and self.given.model is not None:  # it is trained in place: its answers are wanted before
            base = base_answers(self.options, self.given.model, self.given.tokenizer, tasks)
        trainer = self._begin(rows)
        if trainer.recorder.closed and trainer.position < trainer.steps:  # an earlier call was interrupted, or stopped
            if self.options.train.load_best_model_at_end and trainer.callbacks.control.should_training_stop:
                raise UserError(
                    "the models are now those of the best evaluation, not of the last step: make another DQOTrainer to go on"
                )
            trainer.recorder.open(trainer.counters)
        held_out = trainer.run(self.options.train.method)
        trainer.finish()
        run = run_of(trainer, held_out)
        if trainer.processes.main:
            print(report_run(self.options, run, answers_of(self.options, run, tasks, base)))
        losses = [row["loss"] for row in self.log_history if "loss" in row]
        return TrainOutput(trainer.counters["step"], losses[-1] if losses else 0.0, held_out)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Metrics of the held-out rows, or of others, at the weights as they are; on_evaluate is called with them.

        Args:
            eval_dataset: rows as in the constructor.

        Raises:
            UserError: when they share prompts with the rows that are trained on.
        """
        trainer = self._begin()
        groups = None
        if eval_dataset is not None:
            found, rows = evaluation_episodes(self.options, self.given, trainer.prepared, eval_dataset)
            shared_prompts(column(trainer.train_rows, "prompt"), rows, "eval_dataset", "the rows that are trained on")
            groups = found.objective
        metrics = trainer.held_out(groups)
        trainer.callbacks.evaluated(metrics)
        return metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """What policy and value model say of N responses, at the weights as they are; on_predict is called with the metrics.

        Args:
            test_dataset: rows as in the constructor; they may be among those that are trained on.

        Returns:
            (predictions, label_ids, metrics). predictions: {name: (N,)} with logps and ref_logps (log-probabilities of the
            responses, in nats), value_start and value_end (V of the first and of the last state), length (tokens) and label;
            ref_logps and the values where the method has them. label_ids: (N,) the outcome rewards. metrics: those of
            `evaluate`, with `metric_key_prefix`_ in the place of eval_.
        """
        trainer = self._begin()
        episodes, _ = evaluation_episodes(self.options, self.given, trainer.prepared, test_dataset)
        found, rewards = predictions(trainer.engine, episodes.all)
        metrics = trainer.held_out(episodes.objective)
        metrics = {f"{metric_key_prefix}_{n.removeprefix('eval_')}": value for n, value in metrics.items()}
        trainer.callbacks.call("on_predict", metrics=metrics)
        return PredictionOutput(found, rewards, metrics)  # type: ignore[arg-type]  # arrays by name, not one or a tuple

    def log(self, logs: dict[str, float]) -> None:
        """A row of metrics.jsonl and the tracker, at the step where the training is; on_log is called with it."""
        trainer = self._begin()
        if trainer.recorder.closed:
            raise UserError(
                "the run is finished, and its metrics.jsonl is closed: call log before train ends, in a callback"
            )
        trainer.recorder.record({"step": trainer.counters["step"], **logs})

    def add_callback(self, callback: TrainerCallback | type) -> None:
        """Adds a callback, an object or a class."""
        self._callbacks.append(made(callback))
        check_callbacks(self._callbacks, self.options.train)

    def pop_callback(self, callback: TrainerCallback | type) -> TrainerCallback | None:
        """Takes a callback out, the first of a class or this object, and returns it; None where it is not there."""
        for found in self._callbacks:
            if isinstance(found, callback) if isinstance(callback, type) else found is callback:
                self._callbacks.remove(found)
                return found
        return None

    def remove_callback(self, callback: TrainerCallback | type) -> None:
        """As pop_callback, without an answer."""
        self.pop_callback(callback)

    @property
    def _callbacks(self) -> list[TrainerCallback]:
        return self.given.callbacks if self._trainer is None else self._trainer.callbacks.callbacks

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Policy (or its adapter), tokenizer and critic/, as transformers loads them. None: the option output_dir."""
        trainer = self._begin()
        prepared = trainer.prepared
        models = trainer.learner, prepared.tokenizer, trainer.processes
        if output_dir is None:
            checkpoint.publish_models(trainer.output_dir, *models, dtype=prepared.save_dtype)
        else:
            with writing(Path(output_dir)):
                checkpoint.save_models(Path(output_dir), *models, dtype=prepared.save_dtype)

    def save_state(self) -> None:
        """trainer_state.json in output_dir, as transformers writes it; a run goes on from checkpoints, not from this file."""
        trainer = self._begin()
        if trainer.processes.main:
            path = trainer.output_dir / "trainer_state.json"
            with writing(path):
                trainer.callbacks.state.save_to_json(str(path))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """README.md in output_dir: base model, data, method, options and held-out metrics."""
        trainer = self._begin()
        if trainer.processes.main:
            hub.write_model_card(trainer.output_dir, self.options, self.state, model_name, dataset_name, tags)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str = "End of training",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str | None:
        """Writes models and model card to output_dir, and uploads those files, no checkpoints and no data, to the hub.

        Args:
            repo_id: "name" or "organisation/name"; None: the name of output_dir.

        Returns:
            The commit's address, in the first process.
        """
        trainer = self._begin()
        self.save_model()
        self.create_model_card()
        trainer.callbacks.call("on_push_begin")
        if not trainer.processes.main:
            return None
        return hub.upload(trainer.output_dir, repo_id, commit_message, private, token, revision)

    @property
    def state(self) -> transformers.TrainerState:
        """global_step, best_metric, log_history ..., as callbacks see it."""
        return self._begin().callbacks.state

    @property
    def processing_class(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self._begin().prepared.tokenizer

    def is_world_process_zero(self) -> bool:
        """Whether this is the first of all processes, the one that writes."""
        return self._begin().processes.main

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
