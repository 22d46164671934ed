"""Options: one flat dataclass plus the fields of the objective; YAML under flags, unknown keys refused.

Imports neither torch nor transformers: `--help` and every check of the options come before those are loaded.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
import yaml

from dqo.config.sources import read_options
from dqo.config.values import brief, refuse, suggestion, typed, value_problems
from dqo.errors import UserError, did_you_mean
from dqo.files import name_problem
from dqo.grading.verifiers import VERIFIERS, VerifierName
from dqo.objectives import OBJECTIVES

CPU_BATCH_TOKENS = 4096  # more leave the caches: 8,192 cost a quarter of the speed with a model of 1 M parameters


def _verifier_help() -> str:
    each = "; ".join(f"{name} {verifier.what}" for name, verifier in VERIFIERS.items())
    return f"The verifier grades answers to eval_tasks: {each}."


@dataclass(frozen=True)
class TrainConfig:
    """Offline training on a file of responses and rewards. Without --dataset_name the built-in demonstration runs."""

    method: Literal["dqo", "sft", "rft", "dpo", "kto", "dro", "oreo"] = "dqo"
    """Objective; its own options are shown by `--method NAME --help`."""
    model_name_or_path: str | None = None
    """Directory or hub name of the causal language model to train."""
    ref_model_name_or_path: str | None = None
    """Reference policy; None: the initial model."""
    ref_cache_dir: str | None = None
    """Directory of cached reference log-probabilities, shared between runs; None: output_dir/ref_cache."""
    dataset_name: str | None = None
    """Rollout file (.jsonl or .parquet): prompt, completion, reward."""
    output_dir: str = "out"
    """Directory of checkpoints, metrics.jsonl and report.html."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights as they are kept; bfloat16 only for the frozen ones under use_peft."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the models that are written to output_dir at the end; None: what the files of model_name_or_path have, and float32 for
    adapters and their value model. Checkpoints keep the weights as they are trained, so that a run can go on exactly."""
    bf16: bool = False
    """Products in bfloat16 (autocast); weights, optimizer states and the loss stay float32."""
    attn_implementation: str | None = None
    """transformers' attention: sdpa, eager, flash_attention_2 ...; None: its own choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, a third more time."""
    use_peft: bool = False
    """Train LoRA adapters of policy and value model; the policy with its adapter off is the reference."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """Their scale is lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get one; None: all of the trunk."""

    router_aux_loss_coef: float | None = None
    """Factor of the load-balancing loss of a mixture-of-experts policy's router; None or 0: it is not applied. It is of the real
    tokens of a micro-batch, and a step's is the mean over its micro-batches by tokens: the one loss that depends on how a step is
    split, exact when a step is one micro-batch."""

    eval_dataset_name: str | None = None
    """Rollout file held out for evaluation; without it eval_fraction of the prompts is held out."""
    eval_fraction: float = 0.1
    """Share of the prompts held out of dataset_name."""
    eval_tasks: str | None = None
    """Problems to answer after training (.jsonl: prompt, answer)."""
    verifier: Annotated[VerifierName | None, tyro.conf.arg(help=_verifier_help())] = None
    num_generations: int = 4
    """Sampled answers a problem, beside the greedy one."""
    max_completion_length: int = 256
    """Tokens of a generated answer."""

    max_length: int = 1024
    """Tokens of prompt and completion."""
    allow_truncation: bool = False
    """Cut longer rows at max_length instead of refusing them."""
    truncation: Literal["terminal", "bootstrap", "drop"] = "terminal"
    """Responses that did not end: paid as they are, bootstrapped with V of their last state, or dropped."""
    process_reward: Literal["none", "additive", "potential"] | None = None
    """What step_rewards in the file do, which must be chosen when there are any: nothing; they are added on the last token of
    their step; or they are potentials (pass rates of the prefixes), whose differences are paid and move no optimum."""
    process_coef: float = 1.0
    """Factor of the step rewards or potentials."""
    reward_scale: float = 1.0
    """Outcome reward = reward_scale * reward + reward_shift."""
    reward_shift: float = 0.0
    """See reward_scale."""
    reward_threshold: float = 0.5
    """A response without label counts as correct above this reward."""
    skip_bad_rows: bool = False
    """Leave out rows that fail the checks, and say how many."""

    learning_rate: float = 1e-6
    """Of the policy."""
    critic_learning_rate: float = 1e-5
    """Of the value model."""
    value_warmup_steps: float = 0
    """First steps that train the value model alone; below 1 a share of all steps."""
    per_device_train_batch_size: int = 16
    """Responses (pairs for dpo) in an optimizer step, times gradient_accumulation_steps, times processes."""
    gradient_accumulation_steps: int = 1
    """See per_device_train_batch_size."""
    max_batch_tokens: int | None = None
    """Tokens of a micro-batch, padding included, for memory and speed: the updates do not depend on it. None:
    per_device_train_batch_size * max_length, what that many of the longest responses take; on a CPU at most 4,096."""
    padding_free: bool | None = None
    """Pack responses into one row instead of padding them. None: where flash-attn or torch's own attention for packed sequences
    runs (GPU, bfloat16); True insists."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; above 0 it overrides num_train_epochs."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup_steps: float = 0
    """Steps of linear learning-rate warm-up; below 1 a share of all steps."""
    weight_decay: float = 0.0
    """AdamW's, on matrices."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Clipping, of policy and value model each."""

    logging_steps: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_steps: int = 0
    """Steps between evaluations on the held-out rows; 0 evaluates before and after training only."""
    save_steps: int = 500
    """Steps between checkpoints; one is always written at the end."""
    save_total_limit: int = 2
    """Checkpoints kept; the best by metric_for_best_model and the newest always are."""
    metric_for_best_model: str | None = None
    """Held-out metric, with or without eval_, that says which evaluation is the best so far; such a one is followed by a
    checkpoint, which is kept. None: loss under load_best_model_at_end, else no metric."""
    greater_is_better: bool | None = None
    """Whether the best has the greatest metric_for_best_model; None: unless its name ends in loss."""
    load_best_model_at_end: bool = False
    """The models written at the end are those of the best evaluation, not of the last step."""
    resume_from_checkpoint: str = "auto"
    """"auto" goes on from the last checkpoint in output_dir, "never" refuses a used output_dir; or a checkpoint's directory."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Tracker that gets the rows of metrics.jsonl too."""
    run_name: str | None = None
    """The tracker's name of the run; None: output_dir."""
    project: str | None = None
    """Project of the tracker (wandb, trackio) that the run is in; None: WANDB_PROJECT, or dqo."""
    use_cpu: bool = False
    """Train on the CPU although there is an accelerator."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer states over the processes (FSDP2), as accelerate launch --use_fsdp does."""
    seed: int = 42
    """Of the data order and of generated answers."""
    dry_run: bool = False
    """Check options and data, print them, and stop before a model is loaded."""

    @property
    def best_metric(self) -> str | None:
        """metric_for_best_model, with its default."""
        return self.metric_for_best_model or ("loss" if self.load_best_model_at_end else None)

    @property
    def best_is_greatest(self) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        return self.best_metric is not None and not self.best_metric.endswith("loss")

    def batch_tokens(self, device_type: str) -> int:
        """The micro-batches' budget."""
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
        for name in ("value_warmup_steps", "warmup_steps", "weight_decay", "eval_steps"):
            need(getattr(self, name) >= 0, name, "at least 0")
        for name in ("value_warmup_steps", "warmup_steps"):
            value = getattr(self, name)
            need(value < 1 or value == int(value), name, "a share of all steps below 1, or a whole number of steps")
        for name in ("learning_rate", "critic_learning_rate", "num_train_epochs", "max_grad_norm", "adam_epsilon"):
            need(getattr(self, name) > 0, name, "positive")
        need(self.lora_alpha > 0, "lora_alpha", "positive")
        coefficient = self.router_aux_loss_coef or 0.0
        need(coefficient >= 0, "router_aux_loss_coef", "at least 0")
        need(
            self.dtype == "float32" or self.use_peft, "dtype", "float32 without use_peft (--bf16 computes in bfloat16)"
        )
        need(
            not (self.fsdp and self.dtype != "float32"), "dtype", "float32 with fsdp, which shards weights of one dtype"
        )
        for name in ("adam_beta1", "adam_beta2", "eval_fraction"):
            need(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        need(self.max_batch_tokens is None or self.max_batch_tokens >= 1, "max_batch_tokens", "at least 1")
        need(self.seed >= 0, "seed", "at least 0")
        need(self.max_steps == -1 or self.max_steps > 0, "max_steps", "positive, or -1 for num_train_epochs")
        if self.best_metric is not None:
            option = "metric_for_best_model" if self.metric_for_best_model else "load_best_model_at_end"
            need(self.eval_steps > 0, "eval_steps", f"above 0 with {option}, which compares evaluations")
        need(
            self.best_metric or self.greater_is_better is None,
            "greater_is_better",
            "None without metric_for_best_model",
        )
        need(self.eval_tasks is None or self.verifier is not None, "verifier", "set when eval_tasks is given")
        return found


@dataclass(frozen=True)
class Options:
    """What a command line resolves to, and where each value that is not a default came from."""

    train: TrainConfig
    objective: Any
    sources: dict[str, str]

    def flat(self) -> dict[str, Any]:
        return dataclasses.asdict(self.train) | dataclasses.asdict(self.objective)


def _take_config_files(arguments: list[str]) -> tuple[list[str], dict[str, tuple[Any, str]]]:
    """Splits `--config a.yaml b.yaml` and `--config=a.yaml` off, however often they come; later files win."""
    left, paths, i = [], [], 0
    while i < len(arguments):
        name, equals, path = arguments[i].partition("=")
        i += 1
        if name != "--config":
            left.append(arguments[i - 1])
            continue
        given = [path] if path else []
        while not equals and i < len(arguments) and not arguments[i].startswith("-"):
            given.append(arguments[i])
            i += 1
        if not given:
            raise UserError("--config needs a file")
        paths += given
    values: dict[str, tuple[Any, str]] = {}
    for path in paths:
        values |= read_options(path)
    return left, values


def _method(arguments: list[str], from_files: dict[str, tuple[Any, str]]) -> str:
    name, source = from_files.get("method", ("dqo", "default"))
    for i, argument in enumerate(arguments):
        if argument == "--method" and i + 1 < len(arguments):
            name, source = arguments[i + 1], "--method"
        elif argument.startswith("--method="):
            name, source = argument.partition("=")[2], "--method"
    if not isinstance(name, str) or name not in OBJECTIVES:
        nearest = did_you_mean(name, OBJECTIVES) if isinstance(name, str) else ""
        raise UserError(f"method must be one of {', '.join(OBJECTIVES)}, got {brief(name)} (from {source}).{nearest}")
    return str.__str__(name)


def _checked(cls: type, name: str, value: Any, source: str) -> Any:
    try:
        return typed(get_type_hints(cls)[name], value)
    except TypeError as error:
        raise UserError(f"{source}: {name} {error}") from error


def _resolve(objective_class: type, given: dict[str, tuple[Any, str]]) -> tuple[TrainConfig, Any]:
    """Defaults under `given` values, {name: (value, where from)}; unknown names and wrong types are refused."""
    train_fields = {f.name for f in dataclasses.fields(TrainConfig)}
    objective_fields = {f.name for f in dataclasses.fields(objective_class)}
    train_values, objective_values = {}, {}
    for key, (value, source) in given.items():
        if key in train_fields:
            train_values[key] = _checked(TrainConfig, key, value, source)
        elif key in objective_fields:
            objective_values[key] = _checked(objective_class, key, value, source)
        else:
            nearest = suggestion(key, train_fields | objective_fields, of_methods=_options_of_methods())
            raise UserError(f"{source}: unknown option {brief(key)}.{nearest}")
    return TrainConfig(**train_values), objective_class(**objective_values)


def options_of(values: dict[str, Any], source: str) -> Options:
    """Options from a dict; `source` says in messages where they come from."""
    given = {name: (value, source) for name, value in values.items()}
    train, objective = _resolve(OBJECTIVES[_method([], given)], given)
    options = Options(train, objective, dict.fromkeys(values, source))
    check_values(options)
    return options


def _options_of_methods() -> dict[str, set[str]]:
    return {method: {f.name for f in dataclasses.fields(cls)} for method, cls in OBJECTIVES.items()}


def _check_flags(arguments: list[str], known: set[str]) -> None:
    """Refuses unknown flags, and arguments that no option can hold, before tyro sees them: it knows no other trainer's names."""
    flag = "an argument"
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_flag = name.startswith("--") and len(name) > 2
        flag = name if is_flag else flag
        held = argument if not is_flag else value if equals else name
        if (problem := name_problem(held)) is not None:
            raise UserError(f"{brief(flag)} {problem}")
        option = name[2:].replace("-", "_")
        if is_flag and option.removeprefix("no_") not in known | {"help"} and not option.startswith("tyro_"):
            nearest = suggestion(option, known, "--", _options_of_methods())
            raise UserError(f"unknown option {brief(name)}.{nearest} `--help` lists all")


def flag_sources(arguments: list[str]) -> dict[str, str]:
    """{option: the flag that gives it}."""
    names = [a[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for a in arguments if a.startswith("--")]
    return {name: f"--{name}" for name in names}


def parse_flags(cls: type, arguments: list[str], prog: str) -> Any:
    """A command's dataclass from its flags, each value checked; exits with 2 when tyro finds one of the wrong type."""
    _check_flags(arguments, {f.name for f in dataclasses.fields(cls)})
    config = tyro.cli(cls, args=arguments, prog=prog, use_underscores=True)
    refuse(value_problems(config) or config.problems(), flag_sources(arguments))
    return config


def load_options(arguments: list[str], prog: str = "dqo-train") -> Options:
    """Flags over YAML over defaults; raises UserError (or exits 2 with the flag named) for anything that does not fit."""
    arguments, from_files = _take_config_files(list(arguments))
    objective_class = OBJECTIVES[_method(arguments, from_files)]
    known = {f.name for cls in (TrainConfig, objective_class) for f in dataclasses.fields(cls)}
    _check_flags(arguments, known | {"config"})
    train, objective = _resolve(objective_class, from_files)
    if arguments:
        # made here, because tyro resolves the annotations of a class by name and the objective is known only now
        shape = dataclasses.make_dataclass(
            "Flags", [("train", TrainConfig), ("objective", objective_class)], frozen=True
        )
        flags = tyro.cli(
            tyro.conf.OmitArgPrefixes[shape],
            args=arguments,
            default=shape(train, objective),
            prog=prog,
            use_underscores=True,
            description=TrainConfig.__doc__,
        )
        train, objective = flags.train, flags.objective
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
    return yaml.safe_dump(values, sort_keys=False)


def command_line() -> str:
    """The command as typed, for the report."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
