"""How much disk the checkpoints of a run will need."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from torch import nn

from dqo.files import in_units
from dqo.models.lora import has_adapter
from dqo.train.learner import Learner
from dqo.train.masters import master_of

logger = logging.getLogger(__name__)


def checkpoint_size(learner: Learner) -> int:
    """Bytes of one checkpoint: weights, and both averages of AdamW for each that is trained."""
    models = [model for model in (learner.policy, learner.value_model) if model is not None]
    trained = sum(_bytes(model, trained_only=True) for model in models)
    if has_adapter(learner.policy):  # the policy's adapter is there in peft's layout too
        weights = trained + _bytes(learner.policy, trained_only=True)
    else:
        weights = sum(_bytes(model) for model in models)
    return weights + 2 * trained + (0 if learner.target is None else _bytes(learner.target))


def _bytes(model: nn.Module, trained_only: bool = False) -> int:
    kept = (master_of(p) for p in model.parameters() if p.requires_grad or not trained_only)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def warn_of_little_room(output_dir: Path, learner: Learner, keep: int) -> None:
    """Warns where the disk has no room for as many checkpoints as will be there at once. It is no refusal: others may free it."""
    each, there = checkpoint_size(learner), sorted(output_dir.glob("checkpoint-*"))
    count = max(1, keep + 1 - len(there))  # the oldest is deleted when the newest is whole
    free = shutil.disk_usage(output_dir).free
    if count * each > free:
        logger.warning(
            "checkpoints need up to %s (%d of %s, until the oldest is deleted), and the disk of %s has %s left: lower "
            "--save_total_limit, or choose another --output_dir",
            in_units(count * each),
            count,
            in_units(each),
            output_dir,
            in_units(free),
        )
