"""LoRA adapters through peft: the trained part of a frozen model; switched off, the model is its own reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dqo.errors import UserError


def lora_config(rank: int, alpha: float, target_modules: tuple[str, ...] | None) -> Any:
    """A peft.LoraConfig without dropout: a policy that differs from itself has no log-ratio of 0."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=target_modules and list(target_modules)
    )


def add_adapter(model: PreTrainedModel, config: Any) -> None:
    """Freezes `model` and adds adapters, in float32, to linear layers of its trunk: all, or those that `config` names.

    Raises:
        UserError: when no layer has such a name, or when it is the head's, which the statistics read whole.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise UserError(f"peft_config is a {type(config).__name__}; only peft.LoraConfig is supported")
    if config.lora_dropout:
        raise UserError(
            f"lora_dropout is {config.lora_dropout}; with dropout the policy would differ from itself: use 0"
        )
    linear = {name for name, part in model.base_model.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
    leaves = {name.rpartition(".")[2] for name in linear}
    wanted = config.target_modules
    if isinstance(wanted, str):
        raise UserError(f"lora_target_modules is {wanted!r}; name layers, or leave it out for all linear layers")
    wanted = leaves if wanted is None else set(wanted)
    if unknown := sorted(wanted - leaves):
        raise UserError(
            f"lora_target_modules: no linear layer {', '.join(unknown)}; there are {', '.join(sorted(leaves))}"
        )
    named = type(config)(**{**config.to_dict(), "target_modules": sorted(wanted)})
    model.requires_grad_(False)
    model.add_adapter(named)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def has_adapter(model: nn.Module) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapter, where it has one."""
    if not has_adapter(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the same model with its adapters added to its weights, under the names it had without them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    state = {}
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            state[name.replace(".base_layer.", ".")] = tensor
    for name, part in model.named_modules():
        if isinstance(part, BaseTunerLayer):
            delta = part.get_delta_weight(part.active_adapters[0])
            state[f"{name}.weight"] = state[f"{name}.weight"] + delta.to(state[f"{name}.weight"].dtype)
    return state
