"""The settings of `accelerate launch`, which it passes on as environment variables. Each is obeyed or refused by its name.

They are checked with the options, before torch is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from dqo.config.options import Options, check_values
from dqo.errors import UserError

logger = logging.getLogger(__name__)

OFF = {"", "0", "false", "no", "none", "null", "n", "f", "off"}
ON = {"1", "true", "yes", "y", "t", "on"}

# Settings of accelerate's own start-up (process group, device, logging), which the trainer leaves to it.
ITS_OWN = {
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_ENABLE_RICH",
    "ACCELERATE_DEBUG_RDV_FILE",
    "ACCELERATE_NUM_PROCESSES",
    "ACCELERATE_BYPASS_DEVICE_MAP",
    "ACCELERATE_INIT_INCLUDE_BUFFERS",
    "ACCELERATE_CONFIG_DS_FIELDS",  # which of DeepSpeed's settings came from a file
    "ACCELERATE_ALLOW_CP_STANDALONE",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE",
}
# Says how dynamo compiles, which ACCELERATE_DYNAMO_BACKEND asks for.
WITH_DYNAMO = {f"ACCELERATE_DYNAMO_{n}" for n in ("MODE", "USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION")}

# Switches that are off, or refused with what to do instead.
SWITCHES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported; shard with --use_fsdp --fsdp_version 2",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; shard with --use_fsdp --fsdp_version 2",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's launcher is not supported; start the processes with accelerate launch",
    "ACCELERATE_IN_TPU_POD": "TPUs are not supported",
    "ACCELERATE_DOWNCAST_BF16": "TPUs are not supported",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile is not supported; set dynamo_backend to no",
}
# Families of settings that mean nothing without their switch, and are refused with it.
PREFIXES = {
    "ACCELERATE_DEEPSPEED_": SWITCHES["ACCELERATE_USE_DEEPSPEED"],
    "ACCELERATE_FP8_": "fp8 is not supported; use mixed_precision bf16",
}
PARALLELISM = ("TP_SIZE", "CP_SIZE", "SP_SIZE", "DP_REPLICATE_SIZE")  # 1 asks for nothing
PARALLELISM_DETAILS = {"DP_SHARD_SIZE", "CP_BACKEND", "CP_COMM_STRATEGY", "SP_BACKEND", "SP_SEQ_LENGTH"}
PARALLELISM_DETAILS |= {"SP_SEQ_LENGTH_IS_VARIABLE", "SP_ATTN_IMPLEMENTATION"}

# Where one of them is set, a process is one of several: of torchrun and of the launchers of MPI.
_OF_SEVERAL = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}

# FSDP_ settings, read under ACCELERATE_USE_FSDP: the values that are what this trainer does anyway, in lower case.
FSDP = {
    "VERSION": {"2"},
    "SHARDING_STRATEGY": {"full_shard", "1"},
    "RESHARD_AFTER_FORWARD": {"true", "full_shard", "1"},
    "AUTO_WRAP_POLICY": {"transformer_based_wrap"},
    "ACTIVATION_CHECKPOINTING_OFFLOAD": {"false"},
    "IGNORED_MODULES": set(),
}
FSDP_CURE = {
    "VERSION": "this trainer shards with FSDP2; add --fsdp_version 2",
    "AUTO_WRAP_POLICY": "the model's own blocks are sharded: TRANSFORMER_BASED_WRAP",
}
FSDP_OBEYED = {"TRANSFORMER_CLS_TO_WRAP", "ACTIVATION_CHECKPOINTING", "OFFLOAD_PARAMS"}
# Of FSDP version 1 alone, or of loading and saving, which are by whole tensors here.
FSDP_WITHOUT_EFFECT = {
    "MIN_NUM_PARAMS",
    "BACKWARD_PREFETCH",
    "FORWARD_PREFETCH",
    "USE_ORIG_PARAMS",
    "SYNC_MODULE_STATES",
}
FSDP_WITHOUT_EFFECT |= {"CPU_RAM_EFFICIENT_LOADING", "STATE_DICT_TYPE"}

# Options of which one value is right; the others are on when either asks for them.
ONE_VALUE = {"bf16", "gradient_accumulation_steps", "max_grad_norm"}
OBEYED = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"}
OBEYED |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"}
KNOWN = ITS_OWN | WITH_DYNAMO | OBEYED | SWITCHES.keys() | {"ACCELERATE_USE_PARALLELISM_CONFIG"}
KNOWN |= {f"FSDP_{name}" for name in [*FSDP, *FSDP_OBEYED, *FSDP_WITHOUT_EFFECT]}
KNOWN |= {f"PARALLELISM_CONFIG_{name}" for name in [*PARALLELISM, *PARALLELISM_DETAILS]}


def known(name: str) -> bool:
    """Whether this file says what becomes of the setting `name`. MEGATRON_LM_ settings need their switch, which is refused."""
    return name in KNOWN or name.startswith((*PREFIXES, "MEGATRON_LM_"))


def obey(options: Options, environment: Mapping[str, str] = os.environ) -> Options:
    """The options, changed to what the launcher's settings ask for.

    Raises:
        UserError: for a setting that this trainer does not have, or that contradicts an option that was given.
    """
    _refuse_settings(environment)
    for name in sorted(environment):
        if name.startswith("ACCELERATE_") and not known(name):
            _warn_once(f"{name}={environment[name]}: this setting of accelerate is not known, and has no effect")
    asked = _asked(environment)
    config = options.train
    changes: dict[str, Any] = {}
    for option, (value, setting) in asked.items():
        if option in ONE_VALUE and option in options.sources and getattr(config, option) != value:
            raise UserError(
                f"{setting} (a setting of accelerate) and {option} {getattr(config, option)} (from "
                f"{options.sources[option]}) contradict each other; remove one"
            )
        changes[option] = value
    if all(getattr(config, option) == value for option, value in changes.items()):
        return options
    sources = options.sources | {option: setting for option, (_, setting) in asked.items()}
    obeyed = dataclasses.replace(options, train=dataclasses.replace(config, **changes), sources=sources)
    check_values(obeyed)
    return obeyed


def whole_models(command: str, environment: Mapping[str, str] = os.environ) -> bool:
    """For a command that has the whole model in each process: whether the launcher asks for the CPU.

    Raises:
        UserError: for settings that shard a model, or choose its precision.
    """
    _refuse_settings(environment)
    if _on(environment, "ACCELERATE_USE_FSDP"):
        why = f"{command} has the whole model in each process; launch it without --use_fsdp"
        _refuse("ACCELERATE_USE_FSDP", environment["ACCELERATE_USE_FSDP"], why)
    if environment.get("ACCELERATE_MIXED_PRECISION", "no").strip().lower() == "bf16":
        _refuse("ACCELERATE_MIXED_PRECISION", "bf16", f"{command} has no autocast; give it --dtype bfloat16")
    return _on(environment, "ACCELERATE_USE_CPU")


def blocks_to_shard(environment: Mapping[str, str] = os.environ) -> set[str]:
    """Class names of FSDP_TRANSFORMER_CLS_TO_WRAP; none: the model's own."""
    names = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "") if _on(environment, "ACCELERATE_USE_FSDP") else ""
    return {name.strip() for name in names.split(",") if name.strip()}


def _on(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "false").strip().lower()
    if value not in ON | OFF:
        raise UserError(f"{name}={environment[name]}: expected true or false")
    return value in ON


def _refuse(setting: str, value: str, why: str) -> None:
    raise UserError(f"{setting}={value} (a setting of accelerate): {why}")


def _refuse_settings(environment: Mapping[str, str]) -> None:
    def given(name: str) -> str | None:
        value = environment.get(name, "").strip()
        return None if value.lower() in OFF else value

    alone = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if alone and not environment.keys() & _OF_SEVERAL:
        raise UserError(
            f"accelerate launch was asked for several processes (MASTER_ADDR={environment['MASTER_ADDR']} is set) and started "
            "one: it starts several only with its option multi_gpu, on CPUs too: accelerate launch --multi_gpu --num_processes "
            "N, without --cpu. Where one is meant, unset MASTER_ADDR"
        )
    for name, why in SWITCHES.items():
        if value := given(name):
            _refuse(name, value, why)
    for name in sorted(environment):
        for prefix, why in PREFIXES.items():
            if name.startswith(prefix) and (value := given(name)):
                _refuse(name, value, why)
    precision = (given("ACCELERATE_MIXED_PRECISION") or "no").lower()
    if precision not in ("no", "bf16"):
        _refuse("ACCELERATE_MIXED_PRECISION", precision, "only no and bf16 are supported: --mixed_precision bf16")
    if _on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        for name in PARALLELISM:
            setting = f"PARALLELISM_CONFIG_{name}"
            value = given(setting)
            if value is not None and value != "1":
                _refuse(setting, value, "only plain data parallelism and sharding over all processes are supported")
        shards, world = given("PARALLELISM_CONFIG_DP_SHARD_SIZE"), environment.get("WORLD_SIZE", "1")
        if shards not in (None, "1", "-1", world):
            _refuse("PARALLELISM_CONFIG_DP_SHARD_SIZE", shards, f"shards are over all {world} processes")
    if _on(environment, "ACCELERATE_USE_FSDP"):
        # the launcher always exports its version, which is 1 unless --fsdp_version says so
        for name, same in FSDP.items():
            value = environment.get(f"FSDP_{name}", "").strip()
            if value and value.lower() not in same | (OFF if "false" in same or not same else set()):
                allowed = ", ".join(sorted(same)) or "none"
                _refuse(f"FSDP_{name}", value, FSDP_CURE.get(name, f"not supported; allowed: {allowed}"))


def _asked(environment: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    """{option: (value that a setting asks for, that setting)}."""
    found: dict[str, tuple[object, str]] = {}

    def ask(option: str, value: object, setting: str) -> None:
        found[option] = value, f"{setting}={environment[setting]}"

    if environment.get("ACCELERATE_MIXED_PRECISION", "no").strip().lower() == "bf16":
        ask("bf16", True, "ACCELERATE_MIXED_PRECISION")
    if _on(environment, "ACCELERATE_USE_CPU"):
        ask("use_cpu", True, "ACCELERATE_USE_CPU")
    if _on(environment, "ACCELERATE_USE_FSDP"):
        ask("fsdp", True, "ACCELERATE_USE_FSDP")
        if _on(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
            ask("gradient_checkpointing", True, "FSDP_ACTIVATION_CHECKPOINTING")
        if _on(environment, "FSDP_OFFLOAD_PARAMS"):
            ask("fsdp_cpu_offload", True, "FSDP_OFFLOAD_PARAMS")
    numbers: dict[str, tuple[str, Callable[[str], float]]] = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", int),
        "ACCELERATE_GRADIENT_CLIPPING": ("max_grad_norm", float),
    }
    for setting, (option, kind) in numbers.items():
        text = environment.get(setting, "").strip()
        if text.lower() in OFF - {"0"} | {"auto"}:
            continue
        try:
            ask(option, kind(text), setting)
        except ValueError:
            raise UserError(f"{setting}={text}: expected a number") from None
    return found


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)
