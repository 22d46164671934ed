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
from transformers import PreTrainedModel

from dqo.data.episodes import Episode
from dqo.errors import UserError
from dqo.evaluation.options import EvalConfig
from dqo.models.critic import load_critic
from dqo.models.policy import load_tokenizer
from dqo.train.token_scores import batches_of, beta_of, load_reference, reference_of, run_options


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
        value_model = load_critic(path, policy.device)
        value_model.eval()
    if "reference" in needs:
        directory = Path(str(config.model_name_or_path))
        options = run_options(directory)
        beta = beta_of(options) if config.beta is None else config.beta
        name = reference_of(directory, options, config.ref_model_name_or_path)
        reference = load_reference(name, policy, load_tokenizer(str(directory)))
    return Models(policy, pad_id, value_model, reference, beta)


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
    place = {id(episode): i for i, episode in enumerate(episodes)}
    for batch in batches_of(models.policy, models.pad_id, episodes, description):
        for name in found:
            values = scorer_of(name).score(models, batch).float().tolist()
            for episode, value in zip(batch.episodes, values):
                found[name][place[id(episode)]] = value
    return found
