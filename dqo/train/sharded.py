"""Models that are sharded before they have weights: wrapped, filled from their files, and then tried on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dqo.config.options import TrainConfig
from dqo.models import attention
from dqo.models.critic import backbone
from dqo.models.fitness import check_head, check_trunk
from dqo.models.on_disk import fill
from dqo.models.policy import load_policy, weights_hash
from dqo.processes import Processes
from dqo.train.learner import Learner
from dqo.train.parallel import wrap
from dqo.train.run_models import load_initial


def shard(learner: Learner, config: TrainConfig, processes: Processes) -> nn.Module:
    """Wraps the models over the processes, and reads this process's share of those without memory."""
    learner.float()
    bf16 = config.bf16 or config.dtype == "bfloat16"
    module = wrap(learner, processes, bf16, cpu_offload=config.fsdp_cpu_offload)
    fill(module, torch.device("cpu") if config.fsdp_cpu_offload else processes.device)
    return module


@torch.no_grad()
def within(module: nn.Module, work: Callable, *arguments: Any) -> Any:
    """`work(...)` where the wrapper gathers what a forward pass reads; all processes must call it."""
    return module(lambda _: work(*arguments))


def load_frozen(
    path: str | Path, config: TrainConfig, processes: Processes, sharded: bool
) -> tuple[PreTrainedModel, nn.Module | None, str]:
    """A language model in float32 that is read and not trained, what wraps it over the processes where `sharded`, and the hash of
    its weights."""
    if not sharded:
        model = load_policy(str(path), processes.device)
        return model, None, weights_hash(model)
    config = replace(config, model_name_or_path=str(path), dtype="float32")
    model = load_initial(config, processes)
    sha256 = weights_hash(model)
    return model, shard_reference(model, config, processes), sha256


def shard_reference(reference: PreTrainedModel, config: TrainConfig, processes: Processes) -> nn.Module:
    """A reference policy that is in no learner."""
    return shard(Learner(reference.requires_grad_(False)), config, processes)


def try_model(module: nn.Module, model: PreTrainedModel, config: TrainConfig, ids: list[int], pad_id: int) -> None:
    """What `prepare` asks of a whole model. `module` wraps it."""
    within(module, lambda: check_trunk(model, ids, pad_id))
    within(module, lambda: check_head(model, ids))  # apart: the backward before gave up what was gathered
    packs = within(module, lambda: attention.choose(model, config.padding_free, ids))
    trunk = backbone(getattr(module, "value_model", None))  # FSDP2 wraps in place
    if packs and trunk is not None and not attention.packs(trunk):
        attention.enable(trunk)
