"""Scores of responses: the models that scorers read, and their batches."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from dqo.config.sources import read_options
from dqo.data.batches import Batching, micro_batch_plan
from dqo.data.episodes import Episode
from dqo.errors import UserError
from dqo.evaluation.options import EvalConfig
from dqo.models import attention
from dqo.models.critic import load_critic
from dqo.models.policy import load_policy, weights_hash
from dqo.models.value_form import form_of
from dqo.models.value_source import find_value_model

_TOKENS = {"cpu": 4096}  # of a batch, padding included
_MORE_TOKENS = 16_384


@dataclass(frozen=True)
class Models:
    """What scorers read."""

    policy: PreTrainedModel
    pad_id: int
    value_model: nn.Module | None = None
    reference: PreTrainedModel | None = None
    beta: float = 1.0


def scorer_of(name: str) -> Any:
    return importlib.import_module(f"dqo.evaluation.scorers.{name}")


def load_models(config: EvalConfig, policy: PreTrainedModel, pad_id: int) -> Models:
    """The models that the scorers of `config` need beside the policy.

    Raises:
        UserError: naming the option by which a model that is not found can be given.
    """
    needs = {need for name in config.scorers for need in scorer_of(name).NEEDS}
    value_model = reference = None
    beta = 1.0
    if "value_model" in needs:
        path = Path(config.value_model or f"{config.model_name_or_path}/critic")
        if not path.is_dir():
            raise UserError(
                f"scorer value: there is no value model in {path}; give --value_model DIRECTORY, the critic/ of a training run "
                "whose method has one"
            )
        value_model = load_critic(find_value_model(path).path, policy.device)
        value_model.eval()
    of_value = value_model is not None and form_of(value_model).reads_reference
    if "reference" in needs or of_value:
        scorer = "scorer implicit" if "reference" in needs else "scorer value"
        name, beta = reference_of(config, scorer)
        reference = load_policy(name, policy.device, torch.float32 if of_value else policy.dtype)
        sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{scorer}: the reference {name} has {sizes[1]:,} tokens, and the model has {sizes[0]:,}")
        read = None if value_model is None else form_of(value_model).reference
        if of_value and weights_hash(reference, torch.float32) != read:
            raise UserError(
                f"scorer value: the value model in {path} read another reference than {name} when it was trained; give that one "
                "as --ref_model_name_or_path"
            )
    return Models(policy, pad_id, value_model, reference, beta)


def reference_of(config: EvalConfig, scorer: str = "scorer implicit") -> tuple[str, float]:
    """The reference policy's name and beta: as given, else those of the training run that wrote the model's directory. `scorer`
    needs it, for messages."""
    directory = Path(str(config.model_name_or_path))
    found: dict[str, Any] = {}
    for folder in (directory, directory.parent):  # a run's output_dir, or a checkpoint in it
        if (folder / "config.yaml").is_file() and not found:
            found = {name: value for name, (value, _) in read_options(str(folder / "config.yaml")).items()}
    name = config.ref_model_name_or_path or found.get("ref_model_name_or_path") or found.get("model_name_or_path")
    if name is None:
        raise UserError(
            f"{scorer}: {directory} has no config.yaml of a training run that names its reference; give "
            "--ref_model_name_or_path"
        )
    beta = config.beta if config.beta is not None else found.get("beta")
    return str(name), 1.0 if beta is None else float(beta)


def episode_of(prompt_ids: list[int], completion_ids: list[int], ended: bool) -> Episode:
    """A response, or its beginning, as models read it; it earns nothing."""
    return Episode(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        rewards=np.zeros(len(completion_ids), np.float32),
        reward=0.0,
        label=False,
        terminated=ended,
        prompt_index=0,
        source="",
    )


@torch.no_grad()
def scores(
    models: Models, scorers: Collection[str], episodes: list[Episode], description: str | None = None
) -> dict[str, list[float]]:
    """{scorer: a score of each episode}. `description`: of a progress bar; None shows none."""
    found: dict[str, list[float]] = {name: [0.0] * len(episodes) for name in scorers}
    if not episodes or not found:
        return found
    device = models.policy.device
    packed = attention.packs(models.policy)
    batching = Batching(models.pad_id, _TOKENS.get(device.type, _MORE_TOKENS), device, packed)
    place = {id(episode): i for i, episode in enumerate(episodes)}
    plan = micro_batch_plan([[episode] for episode in episodes], 1, batching.max_tokens, packed)[0]
    for groups in tqdm(plan, desc=description, unit="batch", leave=False, disable=description is None):
        assert groups is not None  # there is one process
        batch = batching.collate([episode for group in groups for episode in group])
        for name in found:
            values = scorer_of(name).score(models, batch).float().tolist()
            for episode, value in zip(batch.episodes, values):
                found[name][place[id(episode)]] = value
    return found
