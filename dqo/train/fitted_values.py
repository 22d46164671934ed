"""The value model in the directory that the option value_model names, checked beside the models of the run."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from dqo.config.options import Options
from dqo.errors import UserError
from dqo.models import attention
from dqo.models.critic import ValueHead, backbone, load_critic
from dqo.models.fitness import check_trunk
from dqo.models.implicit_value import ImplicitValue
from dqo.models.on_disk import home
from dqo.models.policy import architecture, weights_hash
from dqo.models.value_form import form_of
from dqo.models.value_source import ValueSource, find_value_model
from dqo.objectives.base import VALUE_KINDS
from dqo.train.damage import loading

logger = logging.getLogger(__name__)


def fitted_value_model(
    options: Options, policy: PreTrainedModel, reference: PreTrainedModel, tokenizer, ids: list[int]
) -> nn.Module | None:
    """The value model, whole, on the policy's device; None where value_model names no directory. `ids` are a few tokens to try it
    with.

    Raises:
        UserError: for one of other tokens, of another width, with another reference, or one that sees tokens to the right.
    """
    kind = options.objective.value_kind
    if kind in VALUE_KINDS or options.objective.implied_from:
        return None
    source = find_value_model(kind)
    with loading(source.path):
        value_model = load_critic(source.path, home(policy))
    name, form, trunk = f"value_model {source.path}", form_of(value_model), backbone(value_model)
    fits_itself = form.loss == "squared" and not isinstance(value_model, ImplicitValue)
    if getattr(options.objective, "target", None) == "residual" and not fits_itself:
        raise UserError(
            f"{name} is fitted by a loss of its own, which target residual has no place for; use --target detach"
        )
    if form.reads_reference and form.reference != weights_hash(reference, torch.float32):
        raise UserError(
            f"{name} was fitted beside another reference: it is read with the log-probabilities of that one; give the same "
            "--ref_model_name_or_path, or another --value_model"
        )
    if trunk is None:
        _check_width(name, value_model, policy)
        logger.warning(
            "%s is a head on the hidden states of the policy that was trained with it; on those of another policy its values "
            "mean little, and this one's change with every step",
            name,
        )
        return value_model
    _check_tokens(name, source, trunk, policy, tokenizer)
    check_trunk(trunk, ids, tokenizer.pad_token_id)
    if attention.packs(policy):
        attention.enable(trunk)
    return value_model


def configuration_of(value_model: nn.Module) -> dict:
    """What makes values of its weights, as JSON gives it back: two value models of one hash may differ in it."""
    trunk = backbone(value_model)
    found = {} if trunk is None else architecture(trunk.config)
    found["value form"] = asdict(form_of(value_model))
    if isinstance(value_model, ImplicitValue):
        found["scale"] = asdict(value_model.scale)
    return json.loads(json.dumps(found))


def _check_width(name: str, head: nn.Module, policy: PreTrainedModel) -> None:
    assert isinstance(head, ValueHead)
    width, needed = head.inner.out_features, policy.get_output_embeddings().weight.shape[1]
    if width != needed:
        raise UserError(
            f"{name} is a head on hidden states of width {width}, and {type(policy).__name__} has {needed} here; it belongs to "
            "another model"
        )


def _check_tokens(name: str, source: ValueSource, trunk: PreTrainedModel, policy: PreTrainedModel, tokenizer) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (trunk, policy)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{name} has a vocabulary of {sizes[0]:,}, the policy of {sizes[1]:,}; a value model shares the policy's tokens"
        )
    if source.tokenizer is None:
        return
    try:
        theirs = AutoTokenizer.from_pretrained(source.tokenizer).get_vocab()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name}: the tokenizer in {source.tokenizer} cannot be read ({error}); copy it again"
        ) from error
    ours = tokenizer.get_vocab()
    if theirs != ours:
        token = min((t for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t)), key=str)
        raise UserError(
            f"{name} has another tokenizer than the policy: {token!r} is {theirs.get(token)} there and {ours.get(token)} here; a "
            "value model shares the policy's tokens"
        )
