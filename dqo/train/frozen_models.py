"""Frozen language models that an objective reads beside the reference: their log-probabilities are columns, computed once and
cached as the reference's are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dqo.config.options import Options
from dqo.data.batches import Batch, Batching
from dqo.data.episode import Episode
from dqo.data.joined import parts_of
from dqo.errors import UserError
from dqo.models import attention
from dqo.models.limits import check_positions
from dqo.models.named import load_config, load_tokenizer
from dqo.models.policy import architecture_hash, final_softcap, policy_stats
from dqo.processes import Processes
from dqo.reference.cache import ReferenceCache, ReferenceId
from dqo.reference.columns import fill, reference_entries
from dqo.train.sharded import load_frozen, within
from dqo.train.token_scores import other_token
from dqo_kernels import TokenStats


@dataclass(frozen=True)
class Frozen:
    """`option` names the model, whose column is option_logprobs; `sharded` wraps it over the processes."""

    option: str
    path: str
    model: PreTrainedModel
    sha256: str  # of its weights
    sharded: nn.Module | None = None

    @property
    def column(self) -> str:
        return f"{self.option}_logprobs"

    def choose_attention(self, padding_free: bool | None, ids: list[int]) -> None:
        """As the policy's, see models/attention.py."""
        wanted = self.model, padding_free, ids
        attention.choose(*wanted) if self.sharded is None else within(self.sharded, attention.choose, *wanted)


def frozen_models(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    episodes: Sequence[Episode],
    processes: Processes,
    sharded: bool,
) -> list[Frozen]:
    """The models that the objective reads; `sharded`: each process reads its share of them.

    Raises:
        UserError: for one that cannot be loaded, has other tokens than the policy, or too few positions for the episodes.
    """
    found = []
    for option in options.objective.reads_models:
        path = str(getattr(options.objective, option))
        its_config = load_config(path)
        size = its_config.get_text_config().vocab_size
        differ = other_token(tokenizer, load_tokenizer(path)) if size == vocab_size else None
        if size != vocab_size or differ:
            what = f"a vocabulary of {size:,}, the policy of {vocab_size:,}"
            if differ:
                what = f"another tokenizer: token {differ[0]} is {differ[2]!r} there, and {differ[1]!r} of the policy"
            raise UserError(f"{option} {path} has {what}; give a model that shares the policy's tokens")
        for part in parts_of(episodes):
            check_positions(its_config, part)
        model, wrapper, sha256 = load_frozen(path, options.train, processes, sharded)
        found.append(Frozen(option, path, model, sha256, wrapper))
    return found


def add_columns(
    frozen: Iterable[Frozen], options: Options, episodes: Sequence[Episode], batching: Batching, processes: Processes
) -> None:
    """Sets the column of each model on all episodes, from the cache where it has them."""
    config = options.train
    for one in frozen:
        dtype = "bfloat16" if config.bf16 else "float32"
        identity = ReferenceId(one.sha256, architecture_hash(one.model), dtype, final_softcap(one.model))
        cache = ReferenceCache(config.ref_cache_dir or Path(config.output_dir) / "ref_cache", identity, one.path)

        def stats_of(batch: Batch, one: Frozen = one) -> TokenStats:
            if one.sharded is None:
                return policy_stats(one.model, batch, config.bf16)
            return within(one.sharded, policy_stats, one.model, batch, config.bf16)

        its_batching, together = replace(batching, packed=attention.packs(one.model)), one.sharded is not None
        entries, _ = reference_entries(
            episodes, stats_of, its_batching, processes, cache, together=together, companions=False
        )
        fill(episodes, entries, one.column)
