"""Responses of a policy by transformers' generate, each from a random stream of its own; prompts sorted by length."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from dqo.models.decoding import decode, generated, left_padded, rows_can_leave
from dqo.models.draws import Draws, Sampling

__all__ = ["Request", "Response", "Sampling", "generate", "in_order", "text_of"]


@dataclass(frozen=True)
class Request:
    """One response that is wanted. `key`, strings and integers, names its random stream: equal keys get equal draws."""

    prompt_ids: list[int]
    key: tuple


@dataclass(frozen=True)
class Response:
    ids: list[int]  # with its end token when it ended
    logprobs: list[float]  # of each id, in the distribution that it was drawn from; greedy: in the model's own
    ended: bool


def in_order(found: Iterator[tuple[int, Response]]) -> list[Response]:
    """All responses, in the order of their requests."""
    return [response for _, response in sorted(found, key=lambda pair: pair[0])]


def text_of(tokenizer, response: Response) -> str:
    """The text of a response, without its end token."""
    return tokenizer.decode(response.ids[:-1] if response.ended else response.ids)


def _reads_padding(policy: PreTrainedModel, prompt: list[int], length: int, pad_id: int) -> bool:
    """Whether the next token after `prompt` changes with padding before it up to `length`: some recurrences take it in."""
    if length == len(prompt):
        return False
    alone, padded = (
        generated(
            policy, left_padded([prompt], size, pad_id, policy.device), pad_id, max_new_tokens=1, output_logits=True
        )
        .logits[0]
        .float()
        for size in (len(prompt), length)
    )
    scale = alone.abs().max().clamp_min(1e-12)
    return bool((padded - alone).abs().max() / scale > (1e-3 if policy.dtype == torch.float32 else 0.1))


def _batches(policy: PreTrainedModel, prompts: list[list[int]], batch_size: int, pad_id: int) -> list[list[int]]:
    """Indices of prompts, sorted by length: equal ones need no padding. A model that reads padding gets none."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order]
    if order and _reads_padding(policy, prompts[order[0]], len(prompts[order[-1]]), pad_id):
        groups = [list(found) for _, found in groupby(order, key=lambda i: len(prompts[i]))]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def generate(
    policy: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    pad_id: int,
    batch_size: int = 1024,
    description: str = "sample",
    quiet: bool = False,
) -> Iterator[tuple[int, Response]]:
    """(index of the request, response) of every request, as batches end. A response has ended when it has one of `stop_ids`.

    The distribution is the policy's under `sampling` alone, whatever the model's generation_config says. Token t of a response
    is a function of that distribution and of number t of the stream that (sampling.seed, request.key) names. So a response
    depends on the other requests and on `batch_size` by the rounding of the logits only. Where the policy is sharded all
    processes must give the same requests.
    """
    stops = frozenset(stop_ids)
    prompts = [request.prompt_ids for request in requests]
    with tqdm(total=len(prompts), desc=description, unit="response", disable=quiet, leave=False) as bar:
        tokens, leave = 0, bool(prompts) and rows_can_leave(policy, prompts[0], pad_id)
        for indices in _batches(policy, prompts, batch_size, pad_id):
            draws = Draws(sampling, [requests[i].key for i in indices], policy.device)
            found = decode(
                policy,
                [prompts[i] for i in indices],
                draws,
                stops=stops,
                pad_id=pad_id,
                max_new_tokens=sampling.max_new_tokens,
                leave=leave,
            )
            for i, ids, logprobs in zip(indices, found, draws.logprobs().tolist()):
                tokens += len(ids)
                yield i, Response(ids, logprobs[: len(ids)], ids[-1] in stops)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
            bar.update(len(indices))
