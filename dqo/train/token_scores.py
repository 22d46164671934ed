"""The models of a finished run, and what they say of each token of stored responses: log-probabilities under the policy and
under its reference, entropies, the exact KL between both, and the value model's estimates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dqo.data.batches import Batch, Batching, micro_batch_plan
from dqo.data.episode import Episode
from dqo.errors import UserError
from dqo.models import attention
from dqo.models.adapters import adapter_base, merge
from dqo.models.critic import ValueHead, value_rows
from dqo.models.named import load_config, load_tokenizer
from dqo.models.policy import (
    final_softcap,
    head_inputs,
    head_of,
    head_stats,
    hidden_positions,
    load_policy,
    reference_head,
    weights_hash,
)
from dqo.models.value_form import form_of
from dqo.sampling.backends import dtype_of
from dqo.train.saved import Saved, find_saved, run_options
from dqo.train.saved_critic import saved_critic
from dqo_kernels import linear_token_stats

NAMES = ("logprobs", "ref_logprobs", "entropy", "ref_entropy", "lse", "ref_lse", "kl", "values")
CURE = "give --ref_model_name_or_path"
_TOKENS = {"cpu": 4096}  # of a batch, padding included
_MORE_TOKENS = 16_384


@dataclass(frozen=True)
class RunModels:
    """The models of a run, and the options in its config.yaml. `beta` is 1 for a method without one."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    value_model: nn.Module | None
    beta: float
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    options: dict[str, Any] = field(default_factory=dict)


def load_run(
    directory: str | Path,
    *,
    reference: str | None = None,
    with_reference: bool = True,
    dtype: str = "auto",
    device: torch.device | str | None = None,
) -> RunModels:
    """The models of a run, adapters merged.

    Args:
        directory: a run's output_dir, a checkpoint in it, or what was exported of it.
        reference: directory or hub name of the reference; None: the run's own, see `reference_of`.
        with_reference: False: none is looked for, unless the value model reads it.
        dtype: "float32", "bfloat16", "float16", or "auto": the one in which the policy is stored.
        device: None: the accelerator where there is one.

    Raises:
        UserError: for a directory that holds no finished run; a reference that is not told, cannot be loaded, or has another
            tokenizer or vocabulary.
    """
    path = Path(directory)
    saved = find_saved(path)
    options = run_options(path)
    name = reference_of(path, options, reference) if with_reference else None
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base = adapter_base(str(path))
    tokenizer = load_tokenizer(str(path))
    policy = load_policy(base or str(path), device, dtype_of(dtype, str(path)))
    value_model = saved_critic(saved, policy, base)  # of adapters: on the trunk without the policy's
    if name is None and value_model is not None and form_of(value_model).reads_reference:
        name = reference_of(path, options)
    if base is not None:
        policy = merge(policy, str(path), base)
    its_reference = None if name is None else load_reference(name, policy, tokenizer)
    if name is not None and its_reference is not None and reference is None:
        _check_unchanged(its_reference, name, saved, options, base is not None)
    return RunModels(policy, its_reference, value_model, beta_of(options), tokenizer, path, options)


def beta_of(options: dict[str, Any]) -> float:
    """The KL temperature of a run; 1 for a method without one."""
    return 1.0 if options.get("beta") is None else float(options["beta"])


def reference_of(directory: Path, options: dict[str, Any], given: str | None = None) -> str:
    """Name of the reference: the one `given`, else the one that the run's `options` name, else what an adapter is of, else the
    model that the run started from.

    Raises:
        UserError: where nothing tells it.
    """
    name = given or options.get("ref_model_name_or_path") or adapter_base(str(directory))
    name = name or options.get("model_name_or_path")
    if name is not None:
        return str(name)
    if options:
        raise UserError(f"the run of {directory} began with a model object, which its config.yaml cannot name; {CURE}")
    raise UserError(f"{directory} has no config.yaml of a training run that names its reference; {CURE}")


def load_reference(name: str, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The reference as `policy` is: of its dtype, on its device.

    Raises:
        UserError: where it cannot be loaded, or its tokens are not those of the policy.
    """
    try:
        size, its_tokenizer = load_config(name).get_text_config().vocab_size, load_tokenizer(name)
    except UserError as error:
        raise UserError(f"the reference: {error}; {CURE} where it lies elsewhere") from error
    if size != (own := policy.config.get_text_config().vocab_size):
        raise UserError(f"the reference {name} has {size:,} tokens, and the model has {own:,}; {CURE} of its own kind")
    if differ := other_token(tokenizer, its_tokenizer):
        i, token, its_token = differ
        raise UserError(
            f"the reference {name} has another tokenizer: token {i} is {token!r} of the model, and {its_token!r} of the "
            f"reference; {CURE} of its own kind"
        )
    return load_policy(name, policy.device, policy.dtype)


def other_token(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> tuple[int, str, str | None] | None:
    """The first id that is another token in the `other` tokenizer, with both tokens; None where they agree. Either may have
    added tokens that the other has not."""
    ids, its_ids = tokenizer.get_vocab(), other.get_vocab()
    its_tokens = {i: token for token, i in its_ids.items()}
    for token, i in sorted(ids.items(), key=lambda pair: pair[1]):
        if its_tokens.get(i, token) != token or its_ids.get(token, i) != i:
            return i, token, its_tokens.get(i)
    return None


def _check_unchanged(
    reference: PreTrainedModel, name: str, saved: Saved, options: dict[str, Any], adapters: bool
) -> None:
    """Refuses a reference whose files were changed after the run, as far as the run's checkpoint tells."""
    then = saved.state.get("identity", {}).get("reference")
    exact = reference.dtype in (torch.float32, load_config(name).dtype)
    if then is None or not exact:
        return
    kept = adapters and not options.get(
        "ref_model_name_or_path"
    )  # the frozen weights stay as they are; others are float32
    if weights_hash(reference, getattr(torch, options.get("dtype", "float32") if kept else "float32")) != then:
        raise UserError(
            f"the reference {name} has other weights than the one that {saved.run} was trained against: its files were changed; "
            f"{CURE} MODEL, the same name if it is meant"
        )


def batches_of(
    model: PreTrainedModel, pad_id: int, episodes: list[Episode], description: str | None = None
) -> Iterator[Batch]:
    """The episodes in batches as `model` takes them, in any order. `description`: of a progress bar; None shows none."""
    device = model.device
    packed = attention.packs(model)
    batching = Batching(pad_id, _TOKENS.get(device.type, _MORE_TOKENS), device, packed)
    plan = micro_batch_plan([[episode] for episode in episodes], 1, batching.max_tokens, packed)[0] if episodes else []
    for groups in tqdm(plan, desc=description, unit="batch", delay=2.0, leave=False, disable=description is None):
        assert groups is not None  # there is one process
        yield batching.collate([episode for group in groups for episode in group])


@torch.no_grad()
def token_scores(
    models: RunModels, episodes: Sequence[Episode], names: Collection[str], description: str | None = None
) -> list[dict[str, np.ndarray]]:
    """What the models say of each of an episode's T actions.

    Args:
        names: of `NAMES`: logprobs, ref_logprobs (of the token), entropy, ref_entropy (nats), lse, ref_lse (logsumexp of the
            logits), kl (KL(policy || reference) of the state, exact), values (V of the state before the token).
        description: of a progress bar; None shows none.

    Returns:
        {name: (T,) float32} of each episode, in their order.

    Raises:
        UserError: for names that need a reference or a value model where there is none.
    """
    _check_names(models, names)
    episodes = list(episodes)  # of a table each is made when it is read
    found: list[dict[str, np.ndarray]] = [{} for _ in episodes]
    place = {id(episode): i for i, episode in enumerate(episodes)}
    pad_id: Any = models.tokenizer.pad_token_id
    for batch in batches_of(models.policy, pad_id, episodes, description):
        pieces = {
            name: column.float().cpu().split([e.action_count for e in batch.episodes])
            for name, column in _columns(models, batch, names).items()
        }
        for i, episode in enumerate(batch.episodes):
            found[place[id(episode)]] = {name: pieces[name][i].numpy().copy() for name in pieces}
    return found


def _check_names(models: RunModels, names: Collection[str]) -> None:
    if unknown := sorted(set(names) - set(NAMES)):
        raise UserError(f"no score of a token is called {unknown[0]!r}; there are {', '.join(NAMES)}")
    wants_reference = sorted(name for name in names if name.startswith("ref_") or name == "kl")
    if models.reference is None and wants_reference:
        raise UserError(f"{models.directory}: {wants_reference[0]} needs the reference; {CURE}")
    if "values" in names:
        if models.value_model is None:
            raise UserError(f"{models.directory} has no value model (critic/), so it says no values of tokens")
        _check_read(models, models.value_model)
    if "kl" in names and models.reference is not None:
        caps = [final_softcap(model) for model in (models.policy, models.reference)]
        if caps[0] != caps[1]:
            raise UserError(f"kl: the model caps its logits at {caps[0]}, and the reference at {caps[1]}; {CURE}")


def _check_read(models: RunModels, value_model: nn.Module) -> None:
    """Refuses a value model that reads the log-probabilities of another reference than the one that is there."""
    form = form_of(value_model)
    if not form.reads_reference:
        return
    if models.reference is None:
        raise UserError(f"{models.directory}: its value model reads the reference; {CURE}")
    if weights_hash(models.reference, torch.float32) != form.reference:
        raise UserError(f"{models.directory}: its value model read another reference when it was trained; {CURE}")


def _columns(models: RunModels, batch: Batch, names: Collection[str]) -> dict[str, Tensor]:
    """{name: (N,)} of the batch's rows."""
    found: dict[str, Tensor] = {}
    hidden = None
    if not {"logprobs", "entropy", "lse", "kl"}.isdisjoint(names) or isinstance(models.value_model, ValueHead):
        hidden = hidden_positions(models.policy, batch)
        rows = hidden[batch.states]
        stats = head_stats(models.policy, rows, batch.actions)
        found |= {"logprobs": stats.logprobs, "entropy": stats.entropy, "lse": stats.lse}
    of_value = "values" in names and models.value_model is not None and form_of(models.value_model).reads_reference
    if of_value or any(name.startswith("ref_") or name == "kl" for name in names):
        assert models.reference is not None  # see _check_names
        ref_rows = hidden_positions(models.reference, batch)[batch.states]
        stats = head_stats(models.reference, ref_rows, batch.actions)
        found |= {"ref_logprobs": stats.logprobs, "ref_entropy": stats.entropy, "ref_lse": stats.lse}
        if "kl" in names:
            head = head_of(models.policy, rows.dtype) | reference_head(models.reference, ref_rows)
            weight = head.pop("weight")
            both = linear_token_stats(head_inputs(models.policy, rows), weight, batch.actions, **head)
            assert both.kl is not None
            found["kl"] = both.kl
    if "values" in names:
        assert models.value_model is not None
        if of_value:
            batch = replace(batch, columns=batch.columns | {n: found[n] for n in ("ref_logprobs", "ref_lse")})
        found["values"] = value_rows(models.value_model, batch, hidden)[0]
    return {name: found[name] for name in names}
