"""How much disk the checkpoints of a run, and the references of its phases, will need."""

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


def reference_size(learner: Learner) -> int:
    """Bytes of a policy that becomes the reference: its adapter, where it has one."""
    return _bytes(learner.policy, trained_only=has_adapter(learner.policy))


def warn_of_little_room(output_dir: Path, learner: Learner, keep: int, references: int = 0) -> None:
    """Warns where the disk has no room for as many checkpoints as will be there at once, and for the policies that become the
    reference of a phase. It is no refusal: others may free it.

    Args:
        references: phases that begin with a new reference.
    """
    each, there = checkpoint_size(learner), sorted(output_dir.glob("checkpoint-*"))
    count = max(1, keep + 1 - len(there))  # the oldest is deleted when the newest is whole
    new = max(0, references - len(list(output_dir.glob("reference-*"))))
    size, free = count * each + new * reference_size(learner), shutil.disk_usage(output_dir).free
    if size > free:
        also = f" and {new} references of {in_units(reference_size(learner))}" if new else ""
        logger.warning(
            "checkpoints need up to %s (%d of %s, until the oldest is deleted%s), and the disk of %s has %s left: lower "
            "--save_total_limit, or choose another --output_dir",
            in_units(size),
            count,
            in_units(each),
            also,
            output_dir,
            in_units(free),
        )
