"""Tokens drawn by inverting the cumulative distribution, each response with random numbers of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dqo.errors import UserError

_CHUNK = 512  # tokens of the vocabulary whose weights are summed at once
_SMALL = 2048  # a vocabulary of at most this many tokens is summed in one go
_BELOW = 1 - 2**-50  # times a total: a number that is certainly smaller


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole. Where both cut it,
    top_k cuts first, as in transformers and vLLM."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


def uniforms(seed: int, key: Sequence, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): the beginning of the stream of (seed, key), the same on every machine."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """(B, 1): the first index where (B, N) running sums are above (B, 1) targets. The target is kept below the last sum, so that
    there is one; and there the sum grows, so that what is summed is positive. Sums that are NaN give any index."""
    found = torch.searchsorted(sums, torch.minimum(target, sums[:, -1:] * _BELOW), right=True)
    return found.clamp_max_(sums.shape[-1] - 1)


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of (B, V) logits by (B,) uniform numbers in [0, 1): token i where the cumulative distribution first exceeds them.
    One of probability 0 is never drawn.

    Returns:
        (B,) tokens and (B,) float32 log-probabilities.
    """
    top = logits.max(dim=-1, keepdim=True).values
    weights = (logits - top).exp_()
    if weights.shape[-1] <= _SMALL:
        sums = weights.cumsum(-1, dtype=torch.float64)
        token = _first_above(sums, uniform[:, None] * sums[:, -1:])
    else:
        token, sums = _by_chunks(weights, uniform)
    logprob = (logits.gather(1, token) - top).double() - sums[:, -1:].log()
    return token[:, 0], logprob[:, 0].clamp_max_(0.0).float()


def _by_chunks(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) tokens of (B, V) weights, and the running sums of their chunks: one running sum over 150,000 tokens takes longer."""
    chunks = pad(weights, (0, -weights.shape[-1] % _CHUNK)).view(len(weights), -1, _CHUNK)
    sums = chunks.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, chunks)
    target = uniform[:, None] * sums[:, -1:]
    chunk = _first_above(sums, target)
    before = torch.where(chunk > 0, sums.gather(1, (chunk - 1).clamp_min(0)), 0.0)
    inside = chunks.gather(1, chunk[..., None].expand(-1, 1, _CHUNK))[:, 0].double().cumsum(-1)
    return (chunk * _CHUNK + _first_above(inside, target - before)).clamp_max_(weights.shape[-1] - 1), sums


class Draws(LogitsProcessor):
    """Chooses the tokens inside transformers' greedy generate, by leaving it one token, and keeps their log-probabilities."""

    def __init__(self, sampling: Sampling, keys: Sequence[Sequence], device: torch.device):
        self.greedy = sampling.temperature == 0.0
        self.warpers: list[LogitsProcessor] = []
        self._logprobs: list[Tensor] = []
        self._rows = torch.arange(len(keys), device=device)  # those that are still drawn
        self._count = len(keys)
        if self.greedy:
            return
        if sampling.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        numbers = np.stack([uniforms(sampling.seed, key, sampling.max_new_tokens) for key in keys])
        self.uniforms = torch.from_numpy(numbers).to(device)  # (B, max_new_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits, float32 -> the same shape: 0 at the chosen token, -inf elsewhere; greedy: the logits."""
        if self.greedy:
            self._note(scores.max(dim=-1).values - scores.logsumexp(dim=-1))
            return scores
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        token, logprob = draw(scores, self.uniforms[:, len(self._logprobs)])
        self._note(logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)

    def keep(self, rows: Tensor) -> None:
        """Only `rows`, (B',) places in the batch as it is now, are drawn from here on."""
        self._rows = self._rows[rows]
        if not self.greedy:
            self.uniforms = self.uniforms[rows]

    def _note(self, logprobs: Tensor) -> None:
        self._logprobs.append(logprobs.new_zeros(self._count).index_copy_(0, self._rows, logprobs))

    def logprobs(self) -> Tensor:
        """(B, steps) of the tokens chosen so far; 0 where a row had left.

        Raises:
            UserError: when one is not finite: the model's logits were not.
        """
        found = torch.stack(self._logprobs, dim=1)
        if not found.isfinite().all():
            raise UserError(
                "the model's logits are not finite, so that no token can be drawn; its weights are damaged, or too large for "
                "their dtype: try another"
            )
        return found
