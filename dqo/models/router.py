"""Mixture-of-experts: the loss that keeps a router from sending all tokens to the same experts, as transformers defines it."""

from __future__ import annotations

import logging
import sys

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dqo.data.batches import Batch
from dqo.errors import UserError

logger = logging.getLogger(__name__)

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def has_experts(model: PreTrainedModel) -> bool:
    text = model.config.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in EXPERTS)


def check_router(model: PreTrainedModel, coefficient: float | None) -> None:
    """Says whether a mixture-of-experts model is trained with its router's loss.

    Raises:
        UserError: for a coefficient with a model that has no such loss.
    """
    name = type(model).__name__
    if not coefficient:
        if has_experts(model):
            logger.warning(
                "%s has experts, and its router is trained without its auxiliary loss; --router_aux_loss_coef applies it",
                name,
            )
        return
    if not has_experts(model):
        raise UserError(f"router_aux_loss_coef is {coefficient}, and {name} has no experts; leave it out")
    known = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    if not known or not hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func"):
        raise UserError(
            f"transformers has no auxiliary loss for the router of {name}; leave out --router_aux_loss_coef"
        )
    logger.warning("%s is trained with %g times its router's auxiliary loss", name, coefficient)


def real_tokens(batch: Batch) -> Tensor:
    """Bool, of the shape of input_ids: what is no padding."""
    rows, length = batch.input_ids.shape
    if rows != len(batch.episodes):  # packed
        return torch.ones_like(batch.input_ids, dtype=torch.bool)
    lengths = torch.tensor([e.length for e in batch.episodes], device=batch.input_ids.device)
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def router_loss(model: PreTrainedModel, router_logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """The auxiliary loss of a batch's real tokens, a scalar: 1 times the experts a token when the experts are used alike."""
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    return function(router_logits, model.num_experts, model.num_experts_per_tok, real_tokens(batch))
