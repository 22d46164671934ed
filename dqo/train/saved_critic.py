"""The value model that a run saved: as critic/, or, of a checkpoint with adapters, what was trained of it."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from dqo.errors import UserError
from dqo.models.critic import load_critic, make_value_model
from dqo.models.lora import lora_config, plain_name, with_fields
from dqo.train.saved import Saved

PLAIN_FORM = {"value_loss": ("squared",), "value_input": ("states",)}
PLAIN = PLAIN_FORM | {"value_model": ("separate", "head")}


def saved_critic(saved: Saved, policy: PreTrainedModel, base: str | None) -> nn.Module | None:
    """The value model beside a saved policy; None where there is none.

    Args:
        policy: a model with the weights of `base`, where a checkpoint's value model is an adapter on that trunk.
        base: what the policy is an adapter of; None: it is none.

    Raises:
        UserError: for the adapter of another model.
    """
    folder, adapters = saved.path / "critic", saved.path / "adapters.safetensors"
    if folder.is_dir():
        return load_critic(folder, policy.device).eval()
    tensors = {}
    if base is not None and adapters.exists():
        found = load_file(adapters)
        tensors = {name.removeprefix("critic/"): tensor for name, tensor in found.items() if name.startswith("critic/")}
    if not tensors:
        return None
    told = {name: saved.options.get(name, plain[0]) for name, plain in PLAIN.items()}
    other = [f"{name} {value}" for name, value in told.items() if value not in PLAIN[name]]
    if other:  # what its outputs mean, or what it is an adapter of, is told by the finished run alone
        raise UserError(
            f"{saved.path}: its value model, of {' and '.join(other)}, is whole in the finished run alone; give {saved.run}"
        )
    if "outer.weight" in tensors:
        critic = make_value_model("head", policy)
    else:
        fields = json.loads((saved.path / "adapter_config.json").read_text())
        critic = make_value_model("separate", policy, with_fields(lora_config(1, 1.0, None), fields))
    parameters = {plain_name(name): p for name, p in critic.named_parameters() if p.requires_grad}
    if parameters.keys() != (trained := {plain_name(name): tensor for name, tensor in tensors.items()}).keys():
        raise UserError(f"{adapters} holds the value model of another model than {base}, or of another version of peft")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    return critic.eval()
