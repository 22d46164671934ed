"""The value model of --value_model implied:RUN: V along each response as the policy pi' of a finished run implies it.

    V(s_{t+1}) = ( V(s_t) + beta * log(pi'(y_t|s_t) / ref(y_t|s_t)) - r_t ) / gamma     beta is RUN's, r and gamma are this run's
    V(s_1)     = the mean over the prompt's other responses of: sum of r - beta * log(pi'/ref), discounted;
                 where there are none the mean return of the training data

pi' stays as it is. Its log-probabilities are computed once, before the first step, and kept in the cache of the reference's; no
further model is in memory while the policy is trained. Of the live policy every residual would be that of arXiv 2405.19107.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from dqo.config.options import Options
from dqo.credit.implied import implied_values, soft_return, starts
from dqo.data.batches import Batch, Batching
from dqo.data.episode import Episode
from dqo.data.episodes import ended, put_columns
from dqo.data.joined import parts_of
from dqo.errors import UserError
from dqo.models import attention
from dqo.models.adapters import adapter_base, merge
from dqo.models.named import load_tokenizer
from dqo.models.policy import load_policy, policy_stats, weights_hash
from dqo.objectives.base import Objective
from dqo.processes import Processes
from dqo.reference.cache import ReferenceCache, reference_id
from dqo.reference.columns import key_of, reference_entries
from dqo.train.implied_run import ImpliedRun, implied_run
from dqo.train.token_scores import other_token, reference_of
from dqo_kernels import TokenStats


class ImpliedValues:
    """The frozen policy and what it says of responses. It is loaded at once, and released by `release`.

    Raises:
        UserError: for a run of other tokens, or with another reference than this run's.
    """

    def __init__(self, options: Options, run: ImpliedRun, reference: PreTrainedModel, tokenizer, ids: list[int]):
        self.options, self.run, self.tokenizer, self.ids = options, run, tokenizer, ids
        self.mean = 0.0  # where V begins for a prompt without other responses
        self._check(reference)
        self.policy: PreTrainedModel | None = self._loaded(reference.device)
        self.identity = f"{weights_hash(self.policy)} {run.beta}"

    def _check(self, reference: PreTrainedModel) -> None:
        run, name = self.run, f"value_model implied:{self.run.path}"
        if differ := other_token(self.tokenizer, load_tokenizer(str(run.path))):
            i, token, its_token = differ
            raise UserError(
                f"{name} has another tokenizer than the policy: token {i} is {its_token!r} there, and {token!r} here; name a run "
                "of the same base model"
            )
        own = {weights_hash(reference, dtype) for dtype in (None, torch.float32, torch.bfloat16)}
        then, its_name = run.reference, reference_of(run.path, run.options)
        if then is None:
            then = weights_hash(load_policy(its_name, "cpu"), torch.float32)
        if then not in own:
            raise UserError(
                f"{name} was trained against another reference ({its_name}): its log-ratios are no advantages over this run's; "
                "name a run of the same base model, or give its reference as --ref_model_name_or_path"
            )

    def _loaded(self, device: torch.device) -> PreTrainedModel:
        path = str(self.run.path)
        base = adapter_base(path)
        policy = load_policy(base or path, device)
        if base is not None:
            policy = merge(policy, path, base)
        policy.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.options.train.bf16):
            attention.choose(policy, self.options.train.padding_free, self.ids)
        return policy

    def add(self, episodes: Sequence[Episode], batching: Batching, processes: Processes) -> None:
        """The columns `values`, and where a response was cut `bootstrap`, of episodes that have ref_logprobs."""
        config = self.options.train
        policy = self.policy = self.policy or self._loaded(torch.device(batching.device))

        def stats_of(batch: Batch) -> TokenStats:
            return policy_stats(policy, batch, config.bf16)

        numbers = reference_id(policy, weights_hash(policy), config.bf16)
        root = config.ref_cache_dir or Path(config.output_dir) / "ref_cache"
        cache = ReferenceCache(root, numbers, str(self.run.path))
        batching = replace(batching, packed=attention.packs(policy))
        entries, _ = reference_entries(episodes, stats_of, batching, processes, cache, "frozen", companions=False)
        logprobs = [entries[key_of(e)].logprobs for e in episodes]
        add_columns(self.options.objective, episodes, logprobs, self.run.beta, self.mean)

    def release(self) -> None:
        """Takes the model out of memory; a later `add` loads it again."""
        self.policy = None


def implied_values_of(
    options: Options, reference: PreTrainedModel, tokenizer, trained: Sequence[Episode], ids: list[int]
) -> ImpliedValues | None:
    """None where value_model is another. `trained`: the episodes that are trained on. `ids`: a few tokens to try a model with."""
    run = implied_run(options.objective)
    if run is None:
        return None
    found = ImpliedValues(options, run, reference, tokenizer, ids)
    found.mean = mean_return(options.objective, trained)
    return found


def mean_return(objective: Objective, episodes: Sequence[Episode]) -> float:
    """Of whole responses. Those that were cut are left out where others are not: what would have followed is unknown."""
    whole = ended(episodes)
    return float(np.mean([soft_return(np.zeros(e.action_count), e.rewards, _discounts(objective, e)) for e in whole]))


def add_columns(
    objective: Objective, episodes: Sequence[Episode], logprobs: Sequence[np.ndarray], beta: float, mean: float
) -> None:
    """The columns of `ImpliedValues.add`.

    Args:
        logprobs: (T,) of each episode, of the frozen policy. beta: of its run. mean: V of a prompt without other responses.
    """
    paths, prompts, returns, terminated = [], [], [], []
    for e, own in zip(episodes, logprobs):
        assert e.ref_logprobs is not None
        gain, discount = beta * (own.astype(np.float64) - e.ref_logprobs), _discounts(objective, e)
        paths.append((gain, e.rewards, discount))
        prompts.append(json.dumps(e.prompt_ids))
        returns.append(soft_return(*paths[-1]) if e.terminated else np.nan)
        terminated.append(e.terminated)
    begun = starts(prompts, returns, np.full(len(prompts), mean))
    values, bootstrap = [], []
    for (gain, rewards, discount), start, whole in zip(paths, begun, terminated):
        found = implied_values(gain, rewards, start.value, discount).values.astype(np.float32)
        values.append(found[:-1])
        bootstrap.append(np.zeros_like(found[:-1]))
        bootstrap[-1][-1] = 0.0 if whole else found[-1]
    columns = {"values": values} if all(terminated) else {"values": values, "bootstrap": bootstrap}
    begin = 0
    for part in parts_of(episodes):
        end = begin + len(part)
        put_columns(part, {name: np.concatenate(pieces[begin:end]) for name, pieces in columns.items()})
        begin = end


def _discounts(objective: Objective, e: Episode) -> np.ndarray:
    return e.discounts(objective.discount_factor, objective.discount_at)
