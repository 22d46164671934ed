"""Value models: a network of its own, or a head on the policy's hidden states. Soft values need neither.

    separate   the policy's trunk, copied, with one zero output a token; a transformers token-classification model
    head       a two-layer perceptron on the policy's detached hidden states, its last layer zero
    implicit   a language model, whose log-ratio to the reference tells how likely success is (implicit_value.py)

The first two say V = 0 at the start. `separate` is saved as AutoModelForTokenClassification (num_labels=1), as other trainers
load a critic; where transformers has no such class for an architecture, `load_critic` makes it of the trunk and transformers'
generic head. `head` as critic/value_head.safetensors, which no class of transformers describes.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForTokenClassification

from dqo.data.batches import Batch
from dqo.errors import UserError
from dqo.models.implicit_value import IMPLICIT_FILE, ImplicitValue, load_implicit_value, save_implicit_value
from dqo.models.lora import add_adapter
from dqo.models.policy import hidden_positions, ready

HEAD_FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """(..., D) hidden states -> (...) values."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outer(nn.functional.gelu(self.inner(hidden.to(self.inner.weight.dtype))))[..., 0]


def make_value_model(kind: str, policy: PreTrainedModel, peft_config=None) -> nn.Module:
    """A value model of `kind` for `policy`, which has no adapter yet; with `peft_config` its own adapter and head are trained."""
    if kind == "head":
        return ValueHead(_width(policy)).to(policy.device)
    value_model = value_model_from(policy)
    if peft_config is not None:
        add_adapter(value_model, peft_config)
        score_of(value_model).requires_grad_(True).float()
    return value_model


def _width(policy: PreTrainedModel) -> int:
    """Of the hidden states that the head reads; OPT's may be narrower than its layers."""
    return policy.get_output_embeddings().weight.shape[1]


def score_of(value_model: nn.Module) -> nn.Linear:
    """The last layer of a token-classification model with one label."""
    return [m for m in value_model.modules() if isinstance(m, nn.Linear) and m.out_features == 1][-1]


def _classifier(config: PreTrainedConfig) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The configuration, or that of its text model, and the token-classification class for it: transformers' own, or where it
    has none its generic head on the trunk of this architecture."""
    known: Any = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    if type(config) not in known:
        config = config.get_text_config()
    kind: Any = type(config)
    return config, known[kind] if kind in known else _generic_classifier(kind)


@cache
def _generic_classifier(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    trunks: Any = MODEL_MAPPING
    if config_class not in trunks:
        raise UserError(
            f"transformers has no model of type {config_class.model_type} without its head, so it has no separate value model "
            "here; use --value_model head or --value_model none"
        )
    trunk: Any = trunks[config_class]
    family = next(base for base in trunk.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = f"{trunk.__name__.removesuffix('Model')}ForTokenClassification"
    # transformers reads the file of the module to learn what attention and experts the class may be set to
    fields = {"config_class": config_class, "__module__": trunk.__module__}
    return type(name, (GenericForTokenClassification, family), fields)


def value_model_from(policy: PreTrainedModel) -> PreTrainedModel:
    """A separate value model: the policy's trunk, copied, with one zero output a token, so that V = 0 at the start.

    Raises:
        UserError: for a decoder that transformers has no model of without its encoder or its head.
    """
    config, classifier = _classifier(copy.deepcopy(policy.config))
    config.num_labels, config.classifier_dropout = 1, 0.0
    config.architectures = None
    value_model = classifier._from_config(config, dtype=policy.dtype)
    trunk = value_model.base_model
    own = next((part for part in policy.modules() if type(part) is type(trunk)), None)  # the text model of several
    if own is None:
        raise UserError(
            f"transformers has no model of {type(policy.base_model).__name__} alone, so it has no separate value model here; use "
            "--value_model head or --value_model none"
        )
    trunk.load_state_dict(own.state_dict())
    score = score_of(value_model)
    if score.in_features != _width(policy):
        raise UserError(
            f"{type(policy).__name__} has hidden states of width {_width(policy)} here, and transformers' value model of it "
            f"reads {score.in_features}; use --value_model head or --value_model none"
        )
    nn.init.zeros_(score.weight)
    if score.bias is not None:
        nn.init.zeros_(score.bias)
    return ready(value_model, policy.device)


def backbone(value_model: nn.Module | None) -> PreTrainedModel | None:
    """The model of transformers in a value model; None in a ValueHead, which reads the policy's hidden states."""
    found = value_model.model if isinstance(value_model, ImplicitValue) else value_model
    return found if isinstance(found, PreTrainedModel) else None


class Valued(NamedTuple):
    """What a value model says of a batch, float32."""

    values: Tensor  # (N,) V(s_t) of every row
    ends: Tensor  # (B,) V(s_{T+1}) after the last action of every episode
    loss: Tensor | None = (
        None  # (B,) what it is fitted by, where that is a loss of its own; its values have no gradient then
    )


def value_rows(
    value_model: nn.Module, batch: Batch, hidden: Tensor | None = None, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """V(s_t) of every row (N,), and V(s_{T+1}) after the last action of every episode (B,), float32; see `valued`."""
    return valued(value_model, batch, hidden, bf16)[:2]


def valued(value_model: nn.Module, batch: Batch, hidden: Tensor | None = None, bf16: bool = False) -> Valued:
    """What a value model says of a batch.

    Args:
        hidden: the policy's (P, D) hidden states, which a ValueHead reads without a gradient to them.
    """
    if isinstance(value_model, ImplicitValue):
        before, after = value_model.logits(batch, bf16)
        return Valued(*value_model.values(before, after, batch), value_model.loss(after, batch))
    wanted = torch.cat([batch.states, batch.end_states])
    if isinstance(value_model, ValueHead):
        assert hidden is not None
        values = value_model(hidden.detach()[wanted])
    else:
        assert isinstance(value_model, PreTrainedModel)
        score = score_of(value_model)
        own = hidden_positions(value_model, batch, bf16)[wanted]
        values = nn.functional.linear(own.to(score.weight.dtype), score.weight, score.bias)[:, 0]
    return Valued(*values.float().split([len(batch.states), len(batch.end_states)]))


def save_value_model(value_model: nn.Module, state: dict[str, Tensor], directory: Path) -> None:
    """`state` is the whole state dict, adapters merged."""
    if isinstance(value_model, ValueHead):
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / HEAD_FILE)
        return
    if isinstance(value_model, ImplicitValue):
        save_implicit_value(value_model, state, directory)
        return
    with torch.device("meta"):
        # without adapters or shards: only its names and config are used
        plain: Any = type(value_model)(value_model.config)
        plain.to(next(iter(state.values())).dtype)
    plain.save_pretrained(directory, state_dict=state)


def load_critic(path: Path, device: torch.device | str = "cpu") -> nn.Module:
    """A saved value model; one without its trained head is refused, not re-initialised."""
    if (path / HEAD_FILE).exists():
        state = load_file(path / HEAD_FILE)
        head = ValueHead(state["inner.weight"].shape[0])
        head.load_state_dict(state)
        return head.to(device)
    if (path / IMPLICIT_FILE).exists():
        return load_implicit_value(path, device)
    config, classifier = _classifier(AutoConfig.from_pretrained(path))
    loaded: Any = classifier.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    value_model, loading = loaded
    if loading["missing_keys"]:
        raise UserError(
            f"{path} has no {', '.join(sorted(loading['missing_keys']))}; refusing to start from a random head"
        )
    return ready(value_model, device)
