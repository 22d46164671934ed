"""Value models: a network of its own, or a head on the policy's hidden states. Soft values need neither.

    separate   the policy's trunk, copied, with one zero output a token; a transformers token-classification model
    head       a two-layer perceptron on the policy's detached hidden states, its last layer zero
    q_model    a language model, whose logits are Q relative to the reference (q_model.py)
    implicit   a language model, whose log-ratio to the reference tells how likely success is (implicit_value.py)

The first two say V = 0 at the start, or what the bias of their last layer was set to. `separate` is saved as
AutoModelForTokenClassification (num_labels=1), as other trainers load a critic; where transformers has no such class for an
architecture, `load_critic` makes it of the trunk and transformers' generic head. `head` as critic/value_head.safetensors, which
no class of transformers describes. What another value_loss or value_input than the default needs (value_form.py) lies beside the
first in critic/value_form.safetensors, and in the second.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForTokenClassification

from dqo.data.batches import Batch
from dqo.errors import UserError
from dqo.models.architecture import disable_dropout
from dqo.models.implicit_value import (
    START,
    START_FILE,
    ImplicitValue,
    load_implicit_value,
    save_implicit_value,
    save_start,
)
from dqo.models.lora import add_adapter, in_four_bits
from dqo.models.on_disk import home, is_empty, without_memory
from dqo.models.policy import hidden_positions, ready
from dqo.models.q_model import QModel, load_q_model, save_description, save_q_model
from dqo.models.value_form import ValueForm, form_from, form_of, surprisal_at_positions, surprisal_of_states
from dqo.models.value_source import FORM_FILE, HEAD_FILE, IMPLICIT_FILE, Q_FILE
from dqo.objectives.value_outputs import outputs_for

DIRECTION = "surprisal_direction"  # the parameter that is added to the embedding of an action, times its surprisal


class ValueHead(nn.Module):
    """(..., D) hidden states, with the two columns of `surprisal_of_states` behind them where its form reads the reference ->
    (..., K) outputs."""

    def __init__(self, hidden_size: int, form: ValueForm | None = None):
        super().__init__()
        self.value_form = form or ValueForm()
        self.inner = nn.Linear(hidden_size + 2 * self.value_form.reads_reference, hidden_size)
        self.outer = nn.Linear(hidden_size, self.value_form.outputs)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outer(nn.functional.gelu(self.inner(hidden.to(self.inner.weight.dtype))))


def make_value_model(
    kind: str, policy: PreTrainedModel, peft_config=None, form: ValueForm | None = None, start: float | None = None
) -> nn.Module:
    """A value model of `kind` for `policy`, which has no adapter yet; with `peft_config` its own adapter and head are trained.

    Args:
        start: V of every state at first; None: the last layer is zero.
    """
    form = form or ValueForm()
    if kind == "head":
        value_model: nn.Module = ValueHead(_width(policy), form).to(home(policy))
    else:
        value_model = value_model_from(policy, form)
        if peft_config is not None:
            add_own_adapter(value_model, peft_config)
    if start is not None:
        _start_at(value_model, form, start)
    return value_model


def add_own_adapter(value_model: nn.Module, peft_config: Any) -> None:
    """An adapter is trained on its trunk, and what turns hidden states into values is trained whole; so is a ValueHead."""
    trunk = backbone(value_model)
    if trunk is None:
        return
    add_adapter(trunk, peft_config)
    if isinstance(value_model, QModel):
        return
    last = value_model.start if isinstance(value_model, ImplicitValue) else score_of(value_model)
    last.requires_grad_(True)
    keep_outputs(value_model)
    if trunk is value_model and form_of(value_model).reads_reference:
        direction = value_model.get_parameter(DIRECTION).requires_grad_(True)
        direction.data = direction.data.float()


def keep_outputs(value_model: nn.Module) -> None:
    """What turns hidden states into values is float32, whatever the trunk is: 8 bits would round every value by 0.4 %."""
    if isinstance(value_model, ImplicitValue):
        value_model.start.float()
    elif not isinstance(value_model, QModel):  # which has no such layer
        (value_model if isinstance(value_model, ValueHead) else score_of(value_model)).float()


@torch.no_grad()
def _start_at(value_model: nn.Module, form: ValueForm, value: float) -> None:
    """Sets the bias of the last layer."""
    last = value_model.outer if isinstance(value_model, ValueHead) else score_of(value_model)
    if last.bias is None:
        raise UserError(
            f"value_init mean_return sets the bias of the last layer, and {type(value_model).__name__} has none; use "
            "--value_init zero"
        )
    last.bias.copy_(outputs_for(form.loss, value, form.low, form.high))


def _width(policy: PreTrainedModel) -> int:
    """Of the hidden states that the head reads; OPT's may be narrower than its layers."""
    return policy.get_output_embeddings().weight.shape[1]


def score_of(value_model: nn.Module) -> nn.Linear:
    """The last layer of a token-classification model."""
    outputs = form_of(value_model).outputs
    return [m for m in value_model.modules() if isinstance(m, nn.Linear) and m.out_features == outputs][-1]


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


def _on_trunk_of(model: PreTrainedModel, form: ValueForm) -> PreTrainedModel:
    """A token-classification model of this form on a copy of the model's trunk; its score is anything."""
    config, classifier = _classifier(copy.deepcopy(model.config))
    config.num_labels, config.classifier_dropout = form.outputs, 0.0
    config.architectures = None
    four_bits = any(map(in_four_bits, model.modules()))
    if four_bits:
        del config.quantization_config
    empty = is_empty(model)
    with torch.device("meta") if four_bits else without_memory() if empty else nullcontext():
        value_model = classifier._from_config(config, dtype=model.dtype)
    trunk = value_model.base_model
    own = next((part for part in model.modules() if type(part) is type(trunk)), None)  # the text model of several
    if own is None:
        raise UserError(
            f"transformers has no model of {type(model.base_model).__name__} alone, so it has no separate value model here; use "
            "--value_model head or --value_model none"
        )
    value_model.value_form = form
    if empty:
        score_of(value_model).to_empty(device="cpu")
        path = next(name for name, part in model.named_modules() if part is own)
        names = {f"{value_model.base_model_prefix}.{name}": f"{path}.{name}" for name in own.state_dict()}
        value_model.on_disk = model.on_disk.under(names)  # type: ignore[operator, union-attr]
    elif four_bits:  # frozen, so that both have one
        shared = copy.deepcopy(own, {id(parameter): parameter for parameter in own.parameters()})
        setattr(value_model, value_model.base_model_prefix, shared)
        score_of(value_model).to_empty(device=model.device)
        value_model.is_loaded_in_4bit = True
    else:
        trunk.load_state_dict(own.state_dict())
    _take_form(value_model, form)
    return value_model


def value_model_from(policy: PreTrainedModel, form: ValueForm | None = None) -> PreTrainedModel:
    """A separate value model: the policy's trunk, copied, with zero outputs of a token: one, so that V = 0 at the start, or those
    of `form`.

    Raises:
        UserError: for a decoder that transformers has no model of without its encoder or its head.
    """
    value_model = _on_trunk_of(policy, form or ValueForm())
    score = score_of(value_model)
    if score.in_features != _width(policy):
        raise UserError(
            f"{type(policy).__name__} has hidden states of width {_width(policy)} here, and transformers' value model of it "
            f"reads {score.in_features}; use --value_model head or --value_model none"
        )
    nn.init.zeros_(score.weight)
    if score.bias is not None:
        nn.init.zeros_(score.bias)
    return disable_dropout(value_model) if is_empty(policy) else ready(value_model, policy.device)


def backbone(value_model: nn.Module | None) -> PreTrainedModel | None:
    """The model of transformers in a value model; None in a ValueHead, which reads the policy's hidden states."""
    found = value_model.model if isinstance(value_model, ImplicitValue | QModel) else value_model
    return found if isinstance(found, PreTrainedModel) else None


def _take_form(value_model: PreTrainedModel, form: ValueForm, direction: Tensor | None = None) -> None:
    """Makes a separate value model one of this form; `direction` is zero in a new one."""
    value_model.value_form = form  # type: ignore[assignment]  # torch types any attribute
    if form.reads_reference:
        like = value_model.get_input_embeddings().weight
        new = torch.zeros(like.shape[1], dtype=like.dtype, device=home(value_model))  # type: ignore[index, arg-type]
        value = new if direction is None else direction.to(new)
        value_model.register_parameter(DIRECTION, nn.Parameter(value))


@contextmanager
def _surprisal_added(value_model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """The embedding of each action is moved along the learned direction, by the action's surprisal."""
    if not form_of(value_model).reads_reference:
        yield
        return
    direction, surprisal = value_model.get_parameter(DIRECTION), surprisal_at_positions(batch)[..., None]
    embeddings: Any = value_model.get_input_embeddings()
    handle = embeddings.register_forward_hook(
        lambda module, ids, embedded: embedded + (surprisal * direction).to(embedded.dtype)
    )
    try:
        yield
    finally:
        handle.remove()


class Valued(NamedTuple):
    """What a value model says of a batch, float32."""

    values: Tensor  # (N,) V(s_t) of every row; without a gradient where there are outputs or a loss
    ends: Tensor  # (B,) V(s_{T+1}) after the last action of every episode
    outputs: Tensor | None = None  # (N, K) what a cross-entropy fits, with a gradient; None: the values are fitted
    loss: Tensor | None = None  # (B,) of a value model that is fitted to outcomes
    q: Tensor | None = None  # (N,) Q of every action, of a QModel, with a gradient


def value_rows(
    value_model: nn.Module, batch: Batch, hidden: Tensor | None = None, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """V(s_t) of every row (N,), and V(s_{T+1}) after the last action of every episode (B,), float32; see `valued`."""
    return valued(value_model, batch, hidden, bf16)[:2]


def valued(value_model: nn.Module, batch: Batch, hidden: Tensor | None = None, bf16: bool = False) -> Valued:
    """What a value model says of a batch, which has ref_logprobs where the model reads them.

    Args:
        hidden: the policy's (P, D) hidden states, which a ValueHead reads without a gradient to them.
    """
    if isinstance(value_model, QModel):
        q, values = value_model.q_and_values(batch, bf16)
        return Valued(
            values.detach(), values.new_zeros(len(batch.end_states)), q=q
        )  # no reference knows the last states
    if isinstance(value_model, ImplicitValue):
        before, after = value_model.logits(batch, bf16)
        return Valued(*value_model.values(before, after, batch), loss=value_model.loss(after, batch))
    wanted, form = torch.cat([batch.states, batch.end_states]), form_of(value_model)
    if isinstance(value_model, ValueHead):
        assert hidden is not None
        inputs = hidden.detach()[wanted]
        if form.reads_reference:
            inputs = torch.cat([inputs.float(), surprisal_of_states(batch)], dim=-1)
        outputs = value_model(inputs)
    else:
        assert isinstance(value_model, PreTrainedModel)
        score = score_of(value_model)
        with _surprisal_added(value_model, batch):
            own = hidden_positions(value_model, batch, bf16)[wanted]
        outputs = nn.functional.linear(own.to(score.weight.dtype), score.weight, score.bias)
    rows, ends = outputs.float().split([len(batch.states), len(batch.end_states)])
    if form.loss == "squared":
        return Valued(form.values(rows), form.values(ends))
    return Valued(form.values(rows.detach()), form.values(ends.detach()), rows)


def save_value_model(value_model: nn.Module, state: dict[str, Tensor], directory: Path) -> None:
    """`state` is the whole state dict, adapters merged."""
    if isinstance(value_model, ValueHead):
        directory.mkdir(parents=True, exist_ok=True)
        _save(state, directory / HEAD_FILE, form_of(value_model))
        return
    if isinstance(value_model, ImplicitValue):
        save_implicit_value(value_model, state, directory)
        return
    if isinstance(value_model, QModel):
        save_q_model(value_model, state, directory)
        return
    with torch.device("meta"):
        # without adapters or shards: only its names and config are used
        plain: Any = type(value_model)(value_model.config)
        plain.to(next(iter(state.values())).dtype)
    plain.save_pretrained(directory, state_dict={name: x for name, x in state.items() if name != DIRECTION})
    save_beside(value_model, {name: x for name, x in state.items() if name == DIRECTION}, directory)


def names_beside(value_model: nn.Module) -> list[str]:
    """The names, in the state dict, of what a value model with a trunk has beside the model file of the trunk."""
    return [n for n in value_model.state_dict() if n.startswith(START) or n == DIRECTION]


def save_beside(value_model: nn.Module, state: dict[str, Tensor], directory: Path) -> None:
    """Writes these, and how the value model is read."""
    if isinstance(value_model, ImplicitValue):
        save_start(value_model, state, directory)
    elif isinstance(value_model, QModel):
        save_description(value_model, directory)
    elif form_of(value_model) != ValueForm():
        _save(state, directory / FORM_FILE, form_of(value_model))


def read_beside(value_model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """What `save_beside` wrote, under its names in the state dict."""
    if isinstance(value_model, ImplicitValue):
        return {f"{START}{name}": tensor for name, tensor in load_file(directory / START_FILE).items()}
    return load_file(directory / FORM_FILE) if form_of(value_model).reads_reference else {}


def _save(state: dict[str, Tensor], path: Path, form: ValueForm) -> None:
    metadata = None if form == ValueForm() else {"value_form": form.dumped()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)


def _saved_form(path: Path) -> ValueForm:
    """Of a file that `_save` wrote; the plain form where there is none."""
    if not path.exists():
        return ValueForm()
    with safe_open(path, "pt") as file:
        return form_from((file.metadata() or {}).get("value_form"))


def load_critic(path: Path, device: torch.device | str = "cpu") -> nn.Module:
    """A saved value model; one without its trained head is refused, not re-initialised."""
    if (path / HEAD_FILE).exists():
        state = load_file(path / HEAD_FILE)
        head = ValueHead(state["inner.weight"].shape[0], _saved_form(path / HEAD_FILE))
        head.load_state_dict(state)
        return head.to(device)
    if (path / IMPLICIT_FILE).exists():
        return load_implicit_value(path, device)
    if (path / Q_FILE).exists():
        return load_q_model(path, device)
    config = AutoConfig.from_pretrained(path)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return ready(_of_reward_model(_whole(AutoModelForSequenceClassification, path, config)), device)
    config, classifier = _classifier(config)
    value_model, form = _whole(classifier, path, config), _saved_form(path / FORM_FILE)
    _take_form(value_model, form, load_file(path / FORM_FILE)[DIRECTION] if form.reads_reference else None)
    return ready(value_model, device)


def _whole(loader: Any, path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    model, loading = loader.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    if loading["missing_keys"]:
        raise UserError(
            f"{path} has no {', '.join(sorted(loading['missing_keys']))}; refusing to start from a random head"
        )
    return model


def _of_reward_model(model: PreTrainedModel) -> PreTrainedModel:
    """The score that a sequence classifier gives the last token, given to every token."""
    value_model, theirs = _on_trunk_of(model, ValueForm()), score_of(model)
    score = score_of(value_model)
    with torch.no_grad():
        score.weight.copy_(theirs.weight)
        if score.bias is not None:
            score.bias.copy_(torch.zeros_like(score.bias) if theirs.bias is None else theirs.bias)
    return value_model
