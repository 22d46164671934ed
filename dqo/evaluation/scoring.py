"""Scores of responses: the models that scorers read, and their batches."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dqo.data.episode import Episode
from dqo.errors import UserError
from dqo.evaluation.options import EvalConfig
from dqo.models.critic import load_critic
from dqo.models.identity import check_holds_model, model_identity
from dqo.models.named import load_config, load_tokenizer
from dqo.models.policy import weights_hash
from dqo.models.value_form import form_of
from dqo.models.value_source import find_value_model
from dqo.scoring.by import models_of
from dqo.train.saved import find_saved, run_options
from dqo.train.token_scores import batches_of, beta_of, load_reference, other_token, reference_of


@dataclass(frozen=True)
class Models:
    """What scorers read."""

    policy: PreTrainedModel
    pad_id: int
    value_model: nn.Module | None = None
    reference: PreTrainedModel | None = None
    beta: float = 1.0
    separators: frozenset[int] = frozenset()  # tokens that end a step


def stored_name(scorer: str) -> str:
    """The name of a scorer in the files: of NAME:RUN with a hash of all that its scores depend on, so that a run that was trained
    again, or that has another reference or beta now, is another scorer."""
    name, _, path = scorer.partition(":")
    if not path:
        return scorer
    needs = scorer_of(name).NEEDS
    if needs & {"reference", "value_model"}:
        find_saved(Path(path))  # refuses what is no run
    check_holds_model(path)
    told = [model_identity(path, config := load_config(path))]
    if "value_model" in needs:  # its files name the reference that it reads
        told.append(model_identity(f"{path}/critic", config))
    if "reference" in needs:
        options = run_options(Path(path))
        reference = reference_of(Path(path), options)
        told += [model_identity(reference, load_config(reference)), str(beta_of(options))]
    return f"{scorer}@{hashlib.sha256(' '.join(told).encode()).hexdigest()[:8]}"


def load_scorers(
    config: EvalConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, separators: frozenset[int]
) -> dict[str, Models]:
    """{scorer, as config has it: the models that it reads}: the evaluated policy and what belongs to it, or those of a RUN.

    Raises:
        UserError: see `load_models`, and for a RUN that is none, lacks a model, or has another tokenizer.
    """
    own = replace(load_models(config, policy, tokenizer.pad_token_id), separators=separators)
    found = {}
    for scorer in config.scorers:
        name, _, path = scorer.partition(":")
        found[scorer] = _of_run(name, path, config, own, tokenizer) if path else own
    return found


def _of_run(name: str, path: str, config: EvalConfig, own: Models, tokenizer: PreTrainedTokenizerBase) -> Models:
    needs = scorer_of(name).NEEDS
    kind = "implicit" if "reference" in needs else "value" if "value_model" in needs else "likelihood"
    run = models_of(kind, path, dtype=config.dtype, device=own.policy.device)
    if differ := other_token(tokenizer, run.tokenizer):
        i, token, its_token = differ
        raise UserError(
            f"scorer {name}:{path}: has another tokenizer than {config.model_name_or_path}, whose samples it cannot read: token "
            f"{i} is {its_token!r} of the scorer, and {token!r} of the model; name a run of a model of its kind"
        )
    return Models(run.policy, own.pad_id, run.value_model, run.reference, run.beta, own.separators)


def scorer_of(name: str) -> Any:
    return importlib.import_module(f"dqo.evaluation.scorers.{name}")


def load_models(config: EvalConfig, policy: PreTrainedModel, pad_id: int) -> Models:
    """The models that the scorers of `config` without a RUN need beside the policy.

    Raises:
        UserError: naming the option by which a model that is not found can be given.
    """
    needs = {need for name in config.scorers if ":" not in name for need in scorer_of(name).NEEDS}
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
        directory = Path(str(config.model_name_or_path))
        options = run_options(directory)
        beta = beta_of(options) if config.beta is None else config.beta
        name = reference_of(directory, options, config.ref_model_name_or_path)
        reference = load_reference(name, policy, load_tokenizer(str(directory)))
    if value_model is not None and of_value:
        assert reference is not None
        if weights_hash(reference, torch.float32) != form_of(value_model).reference:
            raise UserError(
                f"scorer value: the value model in {path} read another reference than {name} when it was trained; give that one "
                "as --ref_model_name_or_path"
            )
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
