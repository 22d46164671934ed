"""Responses of a policy by transformers' generate: prompts sorted by length, so that equal ones need no padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from dqo.attention import unpacked


@dataclass(frozen=True)
class Response:
    ids: list[int]  # with its end token when it ended
    ended: bool


@contextmanager
def without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """The model has a fresh generation_config inside, its own again outside: `generate` takes every field that its argument
    leaves open (min_p, no_repeat_ngram_size, num_beams ...) from the model's."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # under peft's wrapper
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


@torch.inference_mode()
def generate(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    *,
    stop_ids: Iterable[int],
    pad_id: int,
    num_generations: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 1024,
    seed: int = 0,
    description: str = "sample",
    quiet: bool = False,
) -> list[list[Response]]:
    """`num_generations` responses of every prompt; temperature 0 is greedy. Samples the whole distribution, whatever the model's
    generation_config says. A response has ended when it has one of `stop_ids`.

    Deterministic given the seed on one machine; the batch composition is part of what the seed fixes.
    """
    greedy = temperature == 0.0
    settings = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    )
    stops = frozenset(stop_ids)
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=pad_id, **settings
    )
    torch.manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    order = [i for i in order for _ in range(num_generations)]
    responses: list[list[Response]] = [[] for _ in prompts]
    for start in tqdm(range(0, len(order), batch_size), desc=description, unit="batch", disable=quiet, leave=False):
        indices = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in indices)
        ids = torch.full((len(indices), longest), pad_id, device="cpu")
        attention = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i], device="cpu")
            attention[row, longest - len(prompts[i]) :] = 1
        with unpacked(policy), without_generation_config(policy):
            output = policy.generate(
                input_ids=ids.to(policy.device),
                attention_mask=attention.to(policy.device),
                generation_config=generation,
            )
        for i, row in zip(indices, output[:, longest:].tolist()):
            end = next((at for at, token in enumerate(row) if token in stops), None)
            responses[i].append(Response(row if end is None else row[: end + 1], end is not None))
    return responses
