"""A run that goes on does so under what its checkpoint says, not under the defaults of today. Read without torch.

A checkpoint's state has "options" (all of them, resolved), "defaults" (of then), "identity" (what must be the same: the options
that change data or updates, and hashes) and "derived" (what options came to: steps of warm-up, dtype of the final models, level
of the importance weights).
Earlier checkpoints have the identity alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dqo.config.lora import PREFIX
from dqo.config.options import Options, TrainConfig, options_of
from dqo.errors import UserError
from dqo.objectives.registry import objective_class, source_of
from dqo.train.damage import checkpoints, read_state
from dqo.train.phases import Stretch

logger = logging.getLogger(__name__)

# Of the place where a run goes on, not of the run: what nothing gives is today's default.
PLACE = {"output_dir", "resume_from_checkpoint", "dry_run", "use_cpu", "fsdp", "fsdp_cpu_offload"}
PLACE |= {"attn_implementation", "padding_free"}
# Arguments of DQOTrainer as well, which are no options then.
NAMED = ("model_name_or_path", "ref_model_name_or_path", "dataset_name", "eval_dataset_name")
FITTED = "configuration of the fitted value model"
# Of the models, among a run's identity: {key: (model, its file), for messages}.
CONFIGURATIONS = {
    "configuration": ("model", "config.json"),
    "reference configuration": ("reference model", "config.json"),
    FITTED: ("value model that it began with", "directory"),
}
TRAINED_END = "trained end token"
# What the objective says of itself; another version of a class may say something else under the same options.
OF_OBJECTIVE = ("groups, columns and companions", "unit of the loss", "value model")
LATER = {*CONFIGURATIONS, TRAINED_END, *OF_OBJECTIVE}  # what the identity of earlier checkpoints lacks
_PACKAGES = ("dqo", "torch", "transformers", "peft")


def found_state(config: TrainConfig) -> tuple[Path, dict] | None:
    """The checkpoint that a run with these options will go on from, unless it turns out to be damaged, and its state."""
    named = config.resume_from_checkpoint
    if named == "never":
        return None
    for checkpoint in reversed(checkpoints(Path(config.output_dir)) if named == "auto" else [Path(named)]):
        try:
            state = read_state(checkpoint)
        except UserError:  # it is named when the checkpoint is claimed
            continue
        if isinstance(state.get("identity"), dict) and isinstance(state["identity"].get("options"), dict):
            return checkpoint, state
    return None


def default_values(options: Options) -> dict[str, Any]:
    """{name: default} of the same options."""
    return dataclasses.asdict(type(options.train)()) | dataclasses.asdict(type(options.objective)())


def stored_options(
    options: Options, warmup: int, stretches: list[Stretch], save_dtype: Any, is_level: str
) -> dict[str, Any]:
    """What a checkpoint keeps of the options and of what they came to, as JSON gives it back."""
    dtype = None if save_dtype is None else str(save_dtype).removeprefix("torch.")
    begins = {stretch.phase.name: stretch.begin for stretch in stretches}
    derived = {"warmup": warmup, "phases": begins, "save_dtype": dtype, "is_level": is_level}
    kept: dict[str, Any] = {"options": options.flat(), "defaults": default_values(options), "derived": derived}
    kept["objective source"] = source_of(type(options.objective))
    return json.loads(json.dumps(kept))


@functools.cache
def versions() -> dict[str, str]:
    """{package: version} of those whose names and defaults a checkpoint depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def as_stored(options: Options) -> Options:
    """`options`, and in the place of defaults the values of the checkpoint that the run goes on from.

    Raises:
        UserError: when a stored value is none that the option can have today, or does not fit the given ones.
    """
    found = found_state(options.train)
    if found is None:
        return options
    checkpoint, state = found
    then = state["identity"]["options"] | state.get("options", {})
    flat, usual = options.flat(), default_values(options)
    given = {name: value for name, value in flat.items() if name in options.sources or value != usual[name]}
    method = then.get("method")
    if not isinstance(method, str) or given.get("method", method) != method:  # refused when the checkpoint is claimed
        return options
    objective = objective_class(method, str(checkpoint))
    then = objective.earlier | then
    known = {f.name for cls in (TrainConfig, objective) for f in dataclasses.fields(cls)} - PLACE
    taken = {name: value for name, value in then.items() if name in known and name not in given}
    if "num_train_epochs" in given:  # steps and epochs are one thing
        taken.pop("max_steps", None)
    values, epochs = taken | given, None
    if values.get("max_steps", -1) > 0:
        epochs = values.pop("num_train_epochs", None)  # without effect; only one of them may be given
    else:
        values.pop("max_steps", None)
    resolved = options_of(values, str(checkpoint))
    if epochs is not None:
        resolved = dataclasses.replace(resolved, train=dataclasses.replace(resolved.train, num_train_epochs=epochs))
    return dataclasses.replace(resolved, sources=options.sources)  # what is taken counts as nobody's wish


def taken_options(options: Options, checkpoint: Path) -> str | None:
    """A line on the options that nothing gives and that have the checkpoint's value, not their default."""
    usual = default_values(options)
    silent = {*options.sources, *NAMED, *PLACE}
    told = ", ".join(f"{n} {v!r}" for n, v in options.flat().items() if n not in silent and v != usual[n])
    return f"going on under options of {checkpoint}, which nothing gives now: {told}" if told else None


def changed_source(options: Options, checkpoint: Path, state: dict) -> str | None:
    """A line on an objective of another package whose file is no longer what it was."""
    then, now = state.get("objective source"), source_of(type(options.objective))
    if then in (None, now):
        return None
    return f"the file of {options.train.method} has changed since {checkpoint}: the run goes on with what it says now"


def option_differences(checkpoint: Path, state: dict, new: dict, defaults: dict) -> list[str]:
    """The options of an identity that differ from the checkpoint's, a line each. One that exists on one side alone and has its
    default there is the same on both.

    Args:
        new: options of this run's identity.
        defaults: today's, of all options; of those that runs began without, what they are in these (`Objective.earlier`).
    """
    old, then, usual = state["identity"]["options"], state.get("options", {}), state.get("defaults", {})
    same_method = old.get("method") == new.get("method")
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, then.get(name)), new.get(name)
        if name in new or not same_method or name.startswith(PREFIX):
            added = same_method and name not in old | then and name in defaults and defaults[name] == now
            if before != now and not added:
                found.append(f"option {name}: {before!r} then, {now!r} now")
        elif name in defaults:  # another value of it would be no other run any more
            continue
        elif before == usual.get(name):
            logger.warning(
                "option %s, %r in %s, is gone; it had its default and is passed over", name, before, checkpoint
            )
        else:
            found.append(f"option {name}: {before!r} then, and there is no such option now")
    for name in sorted(then.keys() - old.keys() - defaults.keys()) if same_method and defaults else []:
        logger.warning(
            "option %s, %r in %s, is gone; it changed no update and is passed over", name, then[name], checkpoint
        )
    return found


def check_configurations(checkpoint: Path, saved: dict, identity: dict, same_transformers: bool) -> None:
    """Refuses a model whose weights are the same and whose configuration is not: it computes something else with them.

    Args:
        same_transformers: whether both are of one version of transformers. Another one may have other fields.
    """
    for key in CONFIGURATIONS:
        if not isinstance(saved.get(key), dict) or key not in identity:
            continue
        old, new = _flat(saved[key]), _flat(identity[key])
        names = old.keys() | new.keys() if same_transformers else old.keys() & new.keys()
        changed = [f"{n} {old.get(n)!r} then, {new.get(n)!r} now" for n in sorted(names) if old.get(n) != new.get(n)]
        if changed:
            model, file = CONFIGURATIONS[key]
            raise UserError(
                f"{checkpoint}: the configuration of the {model} has changed since: {'; '.join(changed)}. Put its {file} "
                "back, or choose another --output_dir"
            )


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """{"rope_parameters.rope_theta": 10000.0, ...}"""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def stored_derived(config: TrainConfig) -> dict[str, Any]:
    """What the options of the checkpoint came to; {} for a new run, and for one whose checkpoint does not tell."""
    found = found_state(config)
    return {} if found is None else found[1].get("derived", {})


def adapter_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields of adapter_config.json in the checkpoint that the run goes on from; {} where there is none."""
    found = found_state(config)
    path = None if found is None else found[0] / "adapter_config.json"
    if path is None or not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):  # named when the checkpoint is claimed
        return {}
    return fields if isinstance(fields, dict) else {}
