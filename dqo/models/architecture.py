"""What is done to a model of any class of transformers: where its trunk is, no randomness, activations recomputed."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dqo.errors import UserError


def name_trunk(model: PreTrainedModel) -> PreTrainedModel:
    """Makes `model.base_model` the trunk, token ids -> hidden states, where a class (Llama 4, Mllama) names a part it has not.

    Raises:
        UserError: for a model whose trunk cannot be told from its head.
    """
    if model.base_model is not model:
        return model
    inner = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    if len(inner) != 1:
        raise UserError(f"{type(model).__name__} has no trunk that could be told from its head; it is not supported")
    model.base_model_prefix = inner[0]
    return model


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Evaluation mode for good, `model.train()` included: dropout, dropped layers, routers' noise and whatever else a class draws
    in training mode, under whatever name its configuration has it. Gradients do not depend on the mode."""
    # a bound method, so that a copy has one of its own
    model.train = MethodType(_stay_in_evaluation_mode, model)  # type: ignore[method-assign]
    return model.train()


def _stay_in_evaluation_mode(model: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    return type(model).train(model, False)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The model's layers, none inside another."""
    names = set(model._no_split_modules or ())
    found: list[nn.Module] = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    found = found or [part for part in model.modules() if type(part).__name__ in names]
    found = found or [part for parts in model.modules() if isinstance(parts, nn.ModuleList) for part in parts]
    inside = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inside]


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing of every layer. transformers' own works in training mode only, in which there is dropout.

    Raises:
        UserError: for a model whose layers are not known.
    """
    layers = layers_of(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} does not say what its layers are, so their activations cannot be recomputed; leave out "
            "--gradient_checkpointing"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
