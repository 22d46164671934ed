"""The options of training: one flat dataclass and the fields of the objective.

Flags override YAML files, which override defaults. Unknown names are refused. `--help` and every check of the options run before
torch and transformers are imported.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from dqo.config.flags import (
    check_flags,
    flag_sources,
    given_values,
    options_of_methods,
    plain_switches,
    take_config_files,
)
from dqo.config.optimizer import OptimizerOptions
from dqo.config.presets import PRESETS, under
from dqo.config.rows import RowOptions
from dqo.config.values import brief, refuse, suggestion, type_hints, typed, value_problems
from dqo.errors import UserError
from dqo.grading.verifiers import expected_name, verifiers_help
from dqo.objectives.base import Objective
from dqo.objectives.registry import DEFAULT_METHOD, OBJECTIVES, methods_help, objective_class

CPU_BATCH_TOKENS = 4096  # more leave the caches: 8,192 cost a quarter of the speed with a model of 1 M parameters


@dataclass(frozen=True)
class _RunOptions:
    """The options of TrainConfig that its help shows before those of the rows."""

    method: Annotated[str, tyro.conf.arg(help=methods_help())] = DEFAULT_METHOD
    preset: str | None = None
    """Options that are set together where nothing else sets them: "paper" is the setting of the paper on DQO, "soft" the
    same without a value model, "reasoning" what did best for DQO on graded answers. None takes the defaults."""
    model_name_or_path: str | None = None
    """The causal language model to train is in this directory, or has this name on the hub."""
    ref_model_name_or_path: str | None = None
    """The reference policy is in this directory, or has this name on the hub. None takes the initial model."""
    ref_cache_dir: str | None = None
    """The reference's log-probabilities are kept in this directory, which several runs may share. None takes
    output_dir/ref_cache."""
    dataset_name: str | None = None
    """The rollout file (.jsonl or .parquet) to train on, whose rows have prompt, completion and reward. Several stand with commas
    between them, and with the share of the run that each of them gets: a.jsonl:0.7,b.parquet:0.3. Without shares each row
    counts once."""
    output_dir: str = "out"
    """The directory where checkpoints, metrics.jsonl and report.html are written."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The weights are kept in this type. With bfloat16 the optimizer updates float32 copies of those that are trained, so that no
    small update is lost; adapters are float32 always."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The models written to output_dir at the end have this type. None takes the type of the files of model_name_or_path, and
    float32 for adapters and their value model. Checkpoints keep the weights as they are trained, so that a run can go on
    exactly."""
    bf16: bool = False
    """Matrix products are computed in bfloat16 (autocast). Weights, optimizer states and the loss stay float32."""
    attn_implementation: str | None = None
    """The attention of transformers to use, such as sdpa, eager or flash_attention_2. None leaves the choice to transformers."""
    gradient_checkpointing: bool = False
    """The backward pass computes the activations again, which saves memory and takes a third more time."""
    use_peft: bool = False
    """Policy and value model train LoRA adapters. The policy with its adapter switched off is the reference."""
    load_in_4bit: bool = False
    """The frozen weights of linear layers are quantised to 4 bits (QLoRA) when model_name_or_path is loaded. It needs use_peft
    and the package bitsandbytes."""
    lora_r: int = 16
    """The adapters have this rank. It needs use_peft."""
    lora_alpha: float = 32.0
    """The adapters' output is multiplied by lora_alpha / lora_r. It needs use_peft."""
    lora_target_modules: tuple[str, ...] | None = None
    """The linear layers with these names get an adapter. None gives one to every linear layer of the trunk."""

    router_aux_loss_coef: float | None = None
    """The load-balancing loss of a mixture-of-experts policy's router is multiplied by this. None or 0 leaves it out. It
    counts the real tokens of a micro-batch, and a step's loss is the mean over its micro-batches, weighted by their tokens.
    It is the one loss that depends on how a step is split into micro-batches."""

    eval_dataset_name: str | None = None
    """The rollout file to evaluate on, or several with commas between them. Without it a share of the prompts is held out, which
    eval_fraction sets."""
    eval_fraction: float = 0.1
    """This share of the prompts of dataset_name is held out for evaluation."""
    eval_tasks: str | None = None
    """The file of problems (.jsonl with prompt and answer) that the model answers before and after training. The prompts are
    strings, or messages for the chat template."""
    eval_task_problems: int = 100
    """With eval_steps the model answers this many of the problems of eval_tasks greedily at every evaluation, and eval_accuracy
    and eval_unparsed are logged. 0 answers none of them during training."""
    verifier: Annotated[
        str | None, tyro.conf.arg(help=f"The verifier grades answers to eval_tasks. {verifiers_help()}")
    ] = None
    num_generations: int = 4
    """The model samples this many answers to each problem of eval_tasks, beside the greedy one."""
    max_completion_length: int = 256
    """A generated answer has at most this many tokens."""


@dataclass(frozen=True)
class TrainConfig(OptimizerOptions, RowOptions, _RunOptions):
    """Offline training on a file of responses and rewards. Without --dataset_name the built-in demonstration runs."""

    learning_rate: float = 1e-6
    """The policy is trained with this learning rate after the warm-up."""
    critic_learning_rate: float | None = None
    """The value model is trained with this learning rate after the warm-up. None takes 1e-3 for a head and 1e-5 for a model of
    its own."""
    value_init: Literal["zero", "mean_return"] = "zero"
    """Where the value model starts. With "zero" its last layer is zero, so that V is 0, or with a value_loss that is a
    cross-entropy the middle between the least and the greatest return. With "mean_return" V is the mean return of the training
    data."""
    value_input: Literal["states", "ref_logprob"] = "states"
    """What the value model reads: the tokens of a state, or beside each token of the response the reference's log-probability
    of it too."""
    freeze_value_model: bool = False
    """The value model stays as it is in the directory that value_model names: it is not trained."""
    value_warmup_steps: float = 0
    """The first steps train the value model alone. A number below 1 is a share of all steps."""
    per_device_train_batch_size: int = 16
    """An optimizer step takes this many responses (pairs or lists for a method of such), times gradient_accumulation_steps,
    times the number of processes."""
    gradient_accumulation_steps: int = 1
    """An optimizer step takes this many times per_device_train_batch_size responses from each process."""
    max_batch_tokens: int | None = None
    """A micro-batch has at most this many tokens, padding included. It sets memory and speed, and the updates do not depend
    on it. None takes per_device_train_batch_size * max_length, and on a CPU at most 4,096."""
    padding_free: bool | None = None
    """Responses are packed into one row instead of being padded. None packs where flash-attn or torch's own attention for
    packed sequences runs (a GPU, bfloat16), and on a CPU a model of 512 dimensions or more. True refuses to run without
    packing."""
    num_train_epochs: float = 1.0
    """The training passes over the data this many times."""
    max_steps: int = -1
    """The training makes this many optimizer steps. A number above 0 takes the place of num_train_epochs."""

    logging_steps: int = 10
    """A row of metrics.jsonl is written every this many steps."""
    eval_steps: int = 0
    """The held-out rows are evaluated every this many steps. 0 evaluates before and after training only."""
    save_steps: int = 500
    """A checkpoint is written every this many steps, and one at the end."""
    save_total_limit: int = 2
    """This many checkpoints are kept. The best by metric_for_best_model and the newest are always among them."""
    metric_for_best_model: str | None = None
    """This held-out metric, with or without eval_, says which evaluation is the best so far. A checkpoint is written after it
    and kept. None takes the loss under load_best_model_at_end, and else no metric."""
    greater_is_better: bool | None = None
    """The best evaluation has the greatest metric_for_best_model. None says so unless the metric's name ends in loss."""
    load_best_model_at_end: bool = False
    """The models written at the end are those of the best evaluation, not of the last step."""
    resume_from_checkpoint: str = "auto"
    """What to go on from: "auto" takes the last checkpoint in output_dir, "never" refuses an output_dir that is in use, and
    any other word is the directory of a checkpoint."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """The rows of metrics.jsonl are sent to this tracker too."""
    run_name: str | None = None
    """The tracker shows the run under this name. None takes output_dir."""
    project: str | None = None
    """The tracker (wandb, trackio) puts the run into this project. None takes WANDB_PROJECT, or dqo without it."""
    shuffle_rewards: bool = False
    """The rows that are trained on get each other's rewards, by the seed. Such a run is a control: whatever it gains is not
    gained by the rewards. Held-out rows keep their own."""
    normalize_rewards: bool = False
    """The outcome rewards of the rows that are trained on get mean 0 and variance 1: it sets reward_scale and reward_shift."""
    use_cpu: bool = False
    """The training runs on the CPU although there is an accelerator."""
    seed: int = 42
    """The order of the data and the generated answers depend on this seed."""
    dry_run: bool = False
    """The command checks options and data, prints them, and stops before it loads a model."""

    @property
    def best_metric(self) -> str | None:
        """The metric that says which evaluation is the best; None where none was asked for."""
        return self.metric_for_best_model or ("loss" if self.load_best_model_at_end else None)

    @property
    def model_path(self) -> str:
        """model_name_or_path, where no model object was given in its place."""
        assert self.model_name_or_path is not None  # options without any model are refused
        return self.model_name_or_path

    @property
    def best_is_greatest(self) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        return self.best_metric is not None and not self.best_metric.endswith("loss")

    def batch_tokens(self, device_type: str) -> int:
        """The largest number of tokens in a micro-batch on a device of this type, padding included."""
        whole = self.per_device_train_batch_size * self.max_length
        return self.max_batch_tokens or (min(whole, CPU_BATCH_TOKENS) if device_type == "cpu" else whole)

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        found = []

        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                found.append((name, f"must be {expected}, got {getattr(self, name)}"))

        for name in ("num_generations", "max_completion_length", "max_length", "per_device_train_batch_size"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("gradient_accumulation_steps", "logging_steps", "save_steps", "save_total_limit", "lora_r"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("value_warmup_steps", "warmup_steps", "weight_decay", "eval_steps", "eval_task_problems"):
            need(getattr(self, name) >= 0, name, "at least 0")
        for name in ("value_warmup_steps", "warmup_steps"):
            value = getattr(self, name)
            need(value < 1 or value == int(value), name, "a share of all steps below 1, or a whole number of steps")
        for name in ("learning_rate", "num_train_epochs", "max_grad_norm", "adam_epsilon"):
            need(getattr(self, name) > 0, name, "positive")
        for name in ("critic_learning_rate", "critic_max_grad_norm"):
            value = getattr(self, name)
            need(value is None or value > 0, name, "positive or None")
        need(self.lora_alpha > 0, "lora_alpha", "positive")
        coefficient = self.router_aux_loss_coef or 0.0
        need(coefficient >= 0, "router_aux_loss_coef", "at least 0")
        need(
            not (self.fsdp and self.use_peft and self.dtype != "float32"),
            "dtype",
            "float32 with fsdp and use_peft: shards of one layer have one dtype",
        )
        need(not (self.fsdp and self.load_in_4bit), "load_in_4bit", "False with fsdp, whose shards cannot be of 4 bits")
        for name in ("adam_beta1", "adam_beta2", "eval_fraction"):
            need(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        need(self.max_batch_tokens is None or self.max_batch_tokens >= 1, "max_batch_tokens", "at least 1")
        need(self.seed >= 0, "seed", "at least 0")
        need(self.max_steps == -1 or self.max_steps > 0, "max_steps", "positive, or -1 for num_train_epochs")
        if self.best_metric is not None:
            option = "metric_for_best_model" if self.metric_for_best_model else "load_best_model_at_end"
            need(self.eval_steps > 0, "eval_steps", f"above 0 with {option}, which compares evaluations")
        need(
            self.best_metric is not None or self.greater_is_better is None,
            "greater_is_better",
            "None without metric_for_best_model",
        )
        need(self.preset is None or self.preset in PRESETS, "preset", f"{', '.join(PRESETS)} or None")
        need(self.eval_tasks is None or self.verifier is not None, "verifier", "set when eval_tasks is given")
        expected = expected_name(self.verifier) if self.verifier is not None else None
        need(expected is None, "verifier", expected or "")
        return found + self.optimizer_problems()


@dataclass(frozen=True)
class Options:
    """The options of a run. `sources` says where each value that was given came from."""

    train: TrainConfig
    objective: Objective
    sources: dict[str, str]

    @property
    def frozen_values(self) -> bool:
        """Whether values are read that nothing fits: of a frozen value model, or implied by the policy of another run."""
        return self.train.freeze_value_model or self.objective.implied_from is not None

    @property
    def trains_values(self) -> bool:
        """Whether a value model is trained."""
        return self.objective.needs_values and not self.frozen_values

    def flat(self) -> dict[str, Any]:
        return dataclasses.asdict(self.train) | dataclasses.asdict(self.objective)


def _flag(arguments: list[str], option: str) -> dict[str, tuple[Any, str]]:
    """{option: (its last value, where from)} of flags; {} where it is not among them."""
    found: dict[str, tuple[Any, str]] = {}
    for i, argument in enumerate(arguments):
        if argument == f"--{option}" and i + 1 < len(arguments):
            found[option] = arguments[i + 1], f"--{option}"
        elif argument.startswith(f"--{option}="):
            found[option] = argument.partition("=")[2], f"--{option}"
    return found


def _objective_class(arguments: list[str], from_files: dict[str, tuple[Any, str]]) -> type[Objective]:
    name, source = (from_files | _flag(arguments, "method")).get("method", (DEFAULT_METHOD, "default"))
    if not isinstance(name, str):
        raise UserError(f"method must be one of {', '.join(OBJECTIVES)}, got {brief(name)} (from {source})")
    taken = {"config", "help", *(f.name for f in dataclasses.fields(TrainConfig))}
    its_class = objective_class(str.__str__(name), source, taken)
    for f in dataclasses.fields(its_class):
        if f.default is not dataclasses.MISSING:
            _checked(its_class, f.name, f.default, f"method {name} (from {source}), default")
    return its_class


def _checked(cls: type, name: str, value: Any, source: str) -> Any:
    try:
        return typed(type_hints(cls)[name], value)
    except TypeError as error:
        raise UserError(f"{source}: {name} {error}") from error


def _resolve(its_class: type[Objective], given: dict[str, tuple[Any, str]]) -> tuple[TrainConfig, Objective]:
    """Defaults under `given` values, {name: (value, where from)}; unknown names and wrong types are refused."""
    train_fields = {f.name for f in dataclasses.fields(TrainConfig)}
    objective_fields = {f.name for f in dataclasses.fields(its_class)}
    train_values, objective_values = {}, {}
    for key, (value, source) in given.items():
        if key in train_fields:
            train_values[key] = _checked(TrainConfig, key, value, source)
        elif key in objective_fields:
            objective_values[key] = _checked(its_class, key, value, source)
        else:
            nearest = suggestion(key, train_fields | objective_fields, of_methods=options_of_methods())
            raise UserError(f"{source}: unknown option {brief(key)}.{nearest}")
    return TrainConfig(**train_values), its_class(**objective_values)


def options_of(values: dict[str, Any], source: str) -> Options:
    """Options from a dict; `source` says in messages where they come from."""
    given = under({name: (value, source) for name, value in values.items()}, {})
    train, objective = _resolve(_objective_class([], given), given)
    options = Options(train, objective, {name: its_source for name, (_, its_source) in given.items()})
    check_values(options)
    return options


def load_options(arguments: list[str], prog: str = "dqo-train") -> Options:
    """The options that a command line gives. Raises a UserError, or exits with 2, and names what does not fit."""
    arguments, from_files = take_config_files(list(arguments))
    from_files = under(from_files, _flag(arguments, "preset") | _flag(arguments, "method"))
    its_class = _objective_class(arguments, from_files)
    known = {f.name for cls in (TrainConfig, its_class) for f in dataclasses.fields(cls)}
    check_flags(arguments, known | {"config"})
    arguments = plain_switches(arguments, [TrainConfig, its_class])
    train, objective = _resolve(its_class, from_files)
    given = given_values([train, objective], arguments) if arguments else {}
    if given is None:
        # made here, because tyro resolves the annotations of a class by name and the objective is known only now
        shape = dataclasses.make_dataclass("Flags", [("train", TrainConfig), ("objective", its_class)], frozen=True)
        flags = tyro.cli(
            tyro.conf.OmitArgPrefixes[shape],  # type: ignore[misc, valid-type]  # a class made at run time
            args=arguments,
            default=shape(train, objective),
            prog=prog,
            use_underscores=True,
            description=TrainConfig.__doc__,
        )
        train, objective = flags.train, flags.objective
    else:
        train = dataclasses.replace(train, **{name: value for name, value in given.items() if hasattr(train, name)})
        objective = dataclasses.replace(objective, **{n: value for n, value in given.items() if not hasattr(train, n)})
    sources = {key: source for key, (_, source) in from_files.items()} | flag_sources(arguments)
    options = Options(train, objective, sources)
    check_values(options)
    return options


def check_values(options: Options) -> None:
    """Raises a UserError that names every value out of range, and where it came from."""
    if {"max_steps", "num_train_epochs"} <= options.sources.keys():
        raise UserError("max_steps and num_train_epochs are both set; remove one")
    parts = (options.train, options.objective)
    wrong = [problem for part in parts for problem in value_problems(part)]
    refuse(wrong or [problem for part in parts for problem in part.problems()], options.sources)


def dump_options(options: Options) -> str:
    """YAML of the resolved options; `--config` of it reproduces the run."""
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in options.flat().items()}
    del values["num_train_epochs" if options.train.max_steps > 0 else "max_steps"]  # only one of them may be set
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C, ten times as fast
    return yaml.dump(values, Dumper=dumper, sort_keys=False)


def command_line() -> str:
    """The command that runs, as a shell takes it, for the report."""
    program = Path(sys.argv[0])
    name = [program.name]
    if name == ["__main__.py"]:  # python -m dqo, or python -m dqo.train
        name = ["python", "-m", "dqo.train" if program.parent.name == "train" else program.parent.name]
    return shlex.join([*name, *sys.argv[1:]])
