"""LoRA adapters through peft's own functions: the trained part of a frozen model; switched off, the model is its own reference.

transformers' integration of peft is not used: it demands versions of peft that need not exist.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dqo.config.lora import PLAIN, check_lora_config
from dqo.errors import UserError

ADAPTER = "default"  # peft's name of a model's first adapter; it is part of the parameters' names


def lora_config(rank: int, alpha: float, target_modules: tuple[str, ...] | None) -> Any:
    """A peft.LoraConfig without dropout: a policy that differs from itself has no log-ratio of 0."""
    return _peft().LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=target_modules and list(target_modules)
    )


def with_fields(config: Any, fields: dict[str, Any]) -> Any:
    """A LoraConfig with the fields of an adapter_config.json that say what is trained, as far as it has such fields: a later peft
    may have other defaults, and a later model other linear layers."""
    config = copy.deepcopy(config)
    for name in PLAIN & fields.keys():
        if hasattr(config, name):
            setattr(config, name, fields[name])
    return config


def _peft() -> ModuleType:
    """The package, or one line: later versions of it and of transformers may not import side by side."""
    try:
        import peft
    except Exception as error:
        raise UserError(_cannot("be imported", error)) from error
    return peft


def _cannot(what: str, error: Exception) -> str:
    return (
        f"peft {version('peft')} beside transformers {version('transformers')} cannot {what}: {error}. Versions that work "
        "together are in the project's constraints.txt"
    )


def add_adapter(model: PreTrainedModel, config: Any, base: str | None = None) -> None:
    """Freezes `model` and adds adapters, in float32, to linear layers of its trunk: all, or those that `config` names.

    Args:
        config: a peft.LoraConfig. It is copied.
        base: directory or hub name of the model, for the adapter's own configuration.

    Raises:
        UserError: when `config` is not plain LoRA; when no layer has such a name, or when it is the head's, which the statistics
            read whole; when peft cannot do it.
    """
    check_lora_config(config)
    config = copy.deepcopy(config)
    config.target_modules = set(_layer_names(model, "target_modules", config.target_modules))
    if config.exclude_modules:
        config.exclude_modules = set(_layer_names(model, "exclude_modules", config.exclude_modules))
    config.task_type, config.inference_mode, config.base_model_name_or_path = "CAUSAL_LM", False, base
    model.requires_grad_(False)
    try:
        _peft().inject_adapter_in_model(config, model, ADAPTER)
        adapter_state(model)  # what the first checkpoint will need
    except Exception as error:
        raise UserError(_cannot(f"add adapters to {type(model).__name__}", error)) from error
    _check_layers(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _layer_names(model: PreTrainedModel, option: str, wanted: Any) -> list[str]:
    """Names of layers, or ends of them, as peft matches them; the last part of each linear layer's name where all are wanted."""
    linear = {name for name, part in model.base_model.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    if wanted is None or wanted == "all-linear":
        return leaves
    if isinstance(wanted, str):
        raise UserError(f"lora_{option} is {wanted!r}; name layers, or leave it out for all linear layers")
    ends = tuple(f"{model.base_model_prefix}.{name}" for name in linear)
    if unknown := sorted(name for name in wanted if not any(f".{end}".endswith(f".{name}") for end in ends)):
        raise UserError(f"lora_{option}: no linear layer {', '.join(unknown)}; there are {', '.join(leaves)}")
    return sorted(wanted)


def _check_layers(model: PreTrainedModel, config: Any) -> None:
    """Refuses adapters that are not where they were asked for, or not of the kind that `merged_state` merges."""
    from peft.tuners.lora import Linear
    from peft.utils.other import get_pattern_key

    trunk = {id(part) for part in model.base_model.modules()}
    layers = dict(_adapted(model))
    for name, layer in layers.items():
        kind = type(layer.get_base_layer()).__name__
        if not (isinstance(layer, Linear) or in_four_bits(layer.get_base_layer())) or not isinstance(
            layer.get_base_layer(), (nn.Linear, Conv1D)
        ):
            raise UserError(
                f"peft adapts {name}, a {kind}, by a {type(layer).__name__}; only linear layers are supported"
            )
        if id(layer) not in trunk:
            raise UserError(f"lora_target_modules: {name} is outside of the trunk; name layers more exactly")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(get_pattern_key([pattern], name) == pattern for name in layers):
                raise UserError(f"peft_config: {field} {pattern!r} matches no layer that has an adapter")
    wanted = config.layers_to_transform
    numbers = {int(part) for name in layers for part in name.split(".") if part.isdigit()}
    if missing := sorted(set([wanted] if isinstance(wanted, int) else wanted or ()) - numbers):
        raise UserError(f"peft_config: layers_to_transform {missing} are no layers of {type(model).__name__}")


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer that peft wrapped."""
    return ((name, part) for name, part in model.named_modules() if hasattr(part, "get_base_layer"))


def in_four_bits(layer: nn.Module) -> bool:
    """Whether the weights of this very layer are quantised by bitsandbytes."""
    return hasattr(getattr(layer, "weight", None), "quant_state")


def has_adapter(model: nn.Module) -> bool:
    return any(True for _ in _adapted(model))


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapter, where it has one."""
    layers = [layer for _, layer in _adapted(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def base_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model's state dict would be without its adapters."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if "lora_" not in name}


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the same model with its adapters added to its weights, under the names it had without them. Weights of 4
    bits are what their quantisation stands for."""
    state = base_state(model.state_dict())
    for name, part in model.named_modules():
        if in_four_bits(part):
            from bitsandbytes.functional import dequantize_4bit

            weight = f"{name.removesuffix('.base_layer')}.weight"
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{weight}.")}
            state[weight] = dequantize_4bit(part.weight.data, part.weight.quant_state)
    for name, layer in _adapted(model):
        delta = layer.get_delta_weight(ADAPTER)
        state[f"{name}.weight"] = state[f"{name}.weight"] + delta.to(state[f"{name}.weight"].dtype)
    return state


def adapter_state(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors out of `state`, the model's own by default, under the names of peft's files."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, state, ADAPTER, save_embedding_layers=False)
    return {f"base_model.model.{name}": tensor for name, tensor in found.items()}


def plain_name(parameter: str) -> str:
    """A parameter's name without what a version of peft adds: base_model.model in front, the adapter's name behind lora_A."""
    name = parameter.replace("base_model.model.", "", 1)
    return re.sub(rf"(\.lora_\w+)\.{ADAPTER}(?=\.|$)", r"\1", name)


def save_adapter(model: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> None:
    """The adapter in peft's layout. `state` is the model's whole state dict."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in adapter_state(model, state).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[ADAPTER])
    for name in ("target_modules", "exclude_modules"):
        if isinstance(named := getattr(config, name), set):  # peft writes it in an order that each process has anew
            setattr(config, name, sorted(named))
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
