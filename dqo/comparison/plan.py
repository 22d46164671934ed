"""The runs of a comparison: each method's options and its share of the one budget."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dqo.config.options import Options, load_options
from dqo.errors import UserError
from dqo.objectives.registry import objective_class
from dqo.train.phases import as_steps

OURS = {"method": "--methods", "resume_from_checkpoint": "nothing: finished runs are kept, the others go on"}


class Flag(NamedTuple):
    """An option of the command line with its values."""

    name: str  # without dashes, with underscores
    words: list[str]


@dataclass(frozen=True)
class PlannedRun:
    method: str
    seed: int
    directory: Path
    arguments: list[str]  # of dqo train


def flags_of(arguments: Sequence[str]) -> list[Flag]:
    """The options that a command line gives, in their order."""
    found: list[Flag] = []
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            found.append(Flag(word[2:].partition("=")[0].replace("-", "_"), [word]))
        elif not found:
            raise UserError(f"unexpected argument {word!r}; options begin with --")
        else:
            found[-1].words.append(word)
    return found


def plan(
    methods: Sequence[str], seeds: int, output_dir: Path, flags: list[Flag]
) -> tuple[list[PlannedRun], list[Options]]:
    """The runs, method by method, and the options of each method's first.

    Every method makes max_steps updates of its policy, from batches of per_device_train_batch_size responses: a value warm-up
    comes on top, and a method of pairs takes half as many pairs.

    Args:
        flags: options of `dqo train`; `--METHOD.OPTION` is of one method alone, and goes before the same option for all.

    Raises:
        UserError: for options that do not fit, naming the method.
    """
    if len(set(methods)) < len(methods):
        raise UserError(f"--methods names {next(m for m in methods if methods.count(m) > 1)} twice")
    for method in methods:
        objective_class(method, "--methods")
    common = [flag for flag in flags if "." not in flag.name]
    own: dict[str, list[Flag]] = {method: [] for method in methods}
    for flag in flags:
        method, _, option = flag.name.rpartition(".")
        if method and method not in own:
            raise UserError(f"--{flag.name} is of the method {method}, and --methods has {', '.join(methods)}")
        if option in OURS:
            raise UserError(f"--{flag.name} is not an option of a comparison; what takes its place is {OURS[option]}")
        if method and option in ("max_steps", "seed", "output_dir"):
            raise UserError(f"--{flag.name}: every method has the same {option}; give --{option}")
        if method:
            own[method].append(Flag(option, [_without_method(flag.words[0], method), *flag.words[1:]]))
    runs, firsts = [], []
    for method in methods:
        with _named(method):
            arguments, options = _budget(method, common, own[method])
        first_seed = options.train.seed
        for seed in range(first_seed, first_seed + seeds):
            directory = output_dir / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', method)}-seed{seed}"
            place = ["--seed", str(seed), "--output_dir", str(directory)]
            runs.append(PlannedRun(method, seed, directory, [*arguments, *place]))
        with _named(method):
            firsts.append(load_options(runs[-seeds].arguments, "dqo train"))
    return runs, firsts


def _without_method(word: str, method: str) -> str:
    """--dpo.beta=0.1 as --beta=0.1."""
    return f"--{word[len(method) + 3 :]}"


def _budget(method: str, common: list[Flag], own: list[Flag]) -> tuple[list[str], Options]:
    """The arguments of a method's runs, but seed and place, and the options that they were made from."""
    named = {flag.name for flag in own}
    words = ["--method", method]
    for flag in [*(flag for flag in common if flag.name not in named), *own]:
        words += flag.words
    options = load_options(words, "dqo train")
    config, objective = options.train, options.objective
    if config.max_steps <= 0:
        raise UserError("give --max_steps, the updates that every method makes: an epoch of pairs is none of responses")
    changes: dict[str, Any] = {}
    if options.trains_values and config.value_warmup_steps:
        warmup = as_steps(config.value_warmup_steps, config.max_steps)
        changes |= {"value_warmup_steps": warmup, "max_steps": config.max_steps + warmup}
    size = objective.group_size
    if size is None and "per_device_train_batch_size" not in named:
        raise UserError(
            "it trains on all responses to a prompt at once, so that an update has per_device_train_batch_size prompts; give "
            f"--{method}.per_device_train_batch_size: {config.per_device_train_batch_size} responses are "
            f"{config.per_device_train_batch_size / 8:g} prompts of 8"
        )
    if size is not None and size > 1 and "per_device_train_batch_size" not in named:
        if config.per_device_train_batch_size % size:
            raise UserError(
                f"per_device_train_batch_size {config.per_device_train_batch_size} responses cannot be cut into groups of {size}"
            )
        changes["per_device_train_batch_size"] = config.per_device_train_batch_size // size
    kept = ["--method", method]
    for flag in [*(flag for flag in common if flag.name not in named), *own]:
        if flag.name not in {*changes, "seed", "output_dir"}:
            kept += flag.words
    return kept + [word for name, value in changes.items() for word in (f"--{name}", str(value))], options


@contextlib.contextmanager
def _named(method: str) -> Iterator[None]:
    """A message of this method's run says so."""
    try:
        yield
    except UserError as error:
        raise UserError(f"method {method}: {error}") from error
