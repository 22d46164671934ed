"""A batch of prompts decoded by transformers' generate: equal prompts are read once, and rows that have ended leave the batch.

Both need a cache whose rows can be chosen: keys and values of plain and sliding attention. Recurrent states and caches of a
fixed size have no such operation; there all rows stay until the last one ends, and every prompt is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList

from dqo.models.attention import unpacked
from dqo.models.draws import Draws

CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"  # an older name
LEAVE = 0.25  # rows leave when this share of them has ended: entering generate again costs a few ms


@contextmanager
def without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """The model has a fresh generation_config inside, its own again outside: `generate` takes every field that its argument
    leaves open (min_p, no_repeat_ngram_size, num_beams ...) from the model's."""
    inner = getattr(model, "get_base_model", lambda: model)()  # under peft's wrapper
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def left_padded(prompts: Sequence[Sequence[int]], length: int, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask, (B, length) each, with padding on the left of prompts."""
    ids = torch.full((len(prompts), length), pad_id, device="cpu")
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt, device="cpu")
        attention[row, length - len(prompt) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": attention.to(device)}


def is_sharded(model: nn.Module) -> bool:
    """Whether forward passes are those of all processes, which gather the weights for them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def generated(policy: PreTrainedModel, inputs: dict[str, Any], pad_id: int, **settings: Any) -> Any:
    """What transformers' greedy generate returns. `settings`: fields of its GenerationConfig, of which the model's own says
    nothing, and logits_processor and stopping_criteria. Of a sharded policy all processes must ask for as many tokens."""
    objects = {name: settings.pop(name) for name in ("logits_processor", "stopping_criteria") if name in settings}
    config = GenerationConfig(do_sample=False, pad_token_id=pad_id, return_dict_in_generate=True, **settings)
    sharded = is_sharded(policy)
    # weights that are gathered in inference mode for the first time could not be trained afterwards
    no_gradients = torch.no_grad() if sharded else torch.inference_mode()
    with unpacked(policy), without_generation_config(policy), no_gradients:
        return policy.generate(**inputs, **objects, generation_config=config, synced_gpus=sharded)  # type: ignore[operator]  # models for generation have it


def rows_can_leave(policy: PreTrainedModel, prompt: Sequence[int], pad_id: int) -> bool:
    """Whether rows of the policy's cache can be chosen, seen at one token after `prompt`; of a sharded policy they stay, so that
    all processes go through as many forward passes."""
    if is_sharded(policy):
        return False
    inputs = left_padded([prompt], len(prompt), pad_id, policy.device)
    cache = generated(policy, inputs, pad_id, max_new_tokens=1).get(CACHE)
    return isinstance(cache, Cache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


class _ManyEnded(StoppingCriteria):
    """Ends a row at one of `stops`, and all of them when LEAVE of them have ended."""

    def __init__(self, stops: Tensor):
        self.stops = stops
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = torch.isin(input_ids[:, -1], self.stops)
        self.ended = ended if self.ended is None else self.ended | ended
        return self.ended | (self.ended.sum() >= LEAVE * len(ended))


def decode(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    draws: Draws,
    *,
    stops: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    leave: bool,
) -> list[list[int]]:
    """New tokens of each prompt, up to one of `stops`, which is among them, or `max_new_tokens`.

    Args:
        draws: chooses the tokens; its rows are the prompts.
        leave: whether rows leave the batch when they have ended, see `rows_can_leave`.
    """
    inputs: dict[str, Any] = left_padded(prompts, max(map(len, prompts)), pad_id, policy.device)
    if leave:
        inputs |= _prompts_read_once(policy, prompts, pad_id)
    criteria = torch.tensor(sorted(stops), dtype=torch.long, device=policy.device)
    found: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    while rows:
        output = generated(
            policy,
            inputs,
            pad_id,
            max_new_tokens=max_new_tokens - len(found[rows[0]]),
            eos_token_id=sorted(stops),
            logits_processor=LogitsProcessorList([draws]),
            stopping_criteria=StoppingCriteriaList([_ManyEnded(criteria)] if leave else []),
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        alive = []
        for place, (row, tokens) in enumerate(zip(rows, new.tolist())):
            end = next((at for at, token in enumerate(tokens, start=1) if token in stops), None)
            found[row] += tokens[:end]
            if end is None and len(found[row]) < max_new_tokens:
                alive.append(place)
        rows = [rows[place] for place in alive]
        if rows:
            index = torch.tensor(alive, device=policy.device)
            draws.keep(index)
            cache = output[CACHE]
            _choose_rows(cache, index)
            attention = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)[index]
            inputs = {"input_ids": output.sequences[index], "attention_mask": attention, CACHE: cache}
    return found


@torch.inference_mode()
def _choose_rows(cache: Cache, index: Tensor) -> None:
    cache.batch_select_indices(index)


def _prompts_read_once(policy: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """The cache of all prompts but their last tokens, where several are equal; else nothing."""
    place = {prompt: at for at, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    if len(place) == len(prompts) or min(map(len, place)) < 2:
        return {}
    beginnings = [prompt[:-1] for prompt in place]
    inputs = left_padded(beginnings, max(map(len, beginnings)), pad_id, policy.device)
    cache = generated(policy, inputs, pad_id, max_new_tokens=1)[CACHE]
    _choose_rows(cache, torch.tensor([place[tuple(prompt)] for prompt in prompts], device=policy.device))
    return {CACHE: cache}
