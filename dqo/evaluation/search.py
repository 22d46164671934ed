"""Search for responses: the most probable one, and step by step the best by a score.

A policy trained by DQO is its own Q-function up to V, so that searching for likely responses is searching for those of high value
("From r to Q*", Rafailov et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from dqo.data.episode import Episode
from dqo.evaluation.scoring import episode_of
from dqo.models.attention import unpacked
from dqo.models.decoding import without_generation_config
from dqo.models.generate import Request, Sampling, generate


@dataclass(frozen=True)
class Found:
    """A response, or the beginning of one."""

    ids: list[int]  # with its end token when it ended
    ended: bool
    score: float  # the sum of its tokens' log-probabilities; of a search by steps that of the scorer


@torch.inference_mode()
def beam_search(
    policy: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    width: int,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    batch_size: int = 64,
    description: str = "beams",
    quiet: bool = False,
) -> Iterator[tuple[int, Found]]:
    """(index of the prompt, its most probable response among those that a beam of `width` keeps), as batches end.

    The sum of log-probabilities decides, without a correction for length: it is what the search on Q is. A response that has not
    ended after `max_new_tokens` counts as one of that length. Prompts of one length share a batch of `batch_size` beams, so that
    no model sees padding.
    """
    stops = frozenset(stop_ids)
    settings = GenerationConfig(
        num_beams=width,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        length_penalty=0.0,
        early_stopping="never",  # nothing that could still be more probable is given up
        eos_token_id=sorted(stops),
        pad_token_id=pad_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    together = max(1, batch_size // width)
    with tqdm(total=len(prompts), desc=description, unit="problem", disable=quiet, leave=False) as bar:
        for length, found in groupby(order, key=lambda i: len(prompts[i])):
            same = list(found)
            for indices in (same[i : i + together] for i in range(0, len(same), together)):
                ids = torch.tensor([prompts[i] for i in indices], device=policy.device)
                with unpacked(policy), without_generation_config(policy):
                    output = policy.generate(  # type: ignore[operator]  # a model for generation has it, not its base class
                        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
                    )
                rows = output.sequences[:, length:].tolist()
                for i, row, total in zip(indices, rows, output.sequences_scores.tolist()):
                    end = next((at for at, token in enumerate(row) if token in stops), None)
                    yield i, Found(row if end is None else row[: end + 1], end is not None, total)
                bar.update(len(indices))


def separating_ids(tokenizer, separator: str) -> frozenset[int]:
    """The tokens whose text has `separator` in it; special tokens have no text."""
    ids = range(len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=True)
    return frozenset(token for token, text in zip(ids, texts) if separator in text)


def step_search(
    policy: PreTrainedModel,
    requests: Sequence[Request],
    score: Callable[[list[Episode]], list[float]],
    sampling: Sampling,
    *,
    beams: int,
    samples: int,
    separators: Collection[int],
    stop_ids: Collection[int],
    pad_id: int,
    batch_size: int = 64,
    quiet: bool = True,
) -> list[Found]:
    """The best response to each request that a search step by step finds.

    Each of at most `beams` beginnings is continued by `samples` sampled steps, which end with one of `separators`, of `stop_ids`,
    or at sampling.max_new_tokens of the whole response. Equal beginnings count once. Of them and of the responses that have ended
    the best `beams` by `score` stay, until all that stay have ended. A step's random stream is that of the request's key, the
    depth, the beginning and the sample.
    """
    stops, most = frozenset(stop_ids), sampling.max_new_tokens
    kept: list[list[Found]] = [[Found([], False, 0.0)] for _ in requests]

    def open_(found: Found) -> bool:
        return not found.ended and len(found.ids) < most

    depth = 0
    while any(open_(found) for beginnings in kept for found in beginnings):
        wanted, origin = [], []
        for i, (request, beginnings) in enumerate(zip(requests, kept)):
            for place, found in enumerate(beginnings):
                for sample in range(samples if open_(found) else 0):
                    wanted.append(Request(request.prompt_ids + found.ids, (*request.key, depth, place, sample)))
                    origin.append((i, found))
        room = most - min(len(found.ids) for _, found in origin)
        step = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, room, sampling.seed)
        ends = stops | frozenset(separators)
        made = generate(policy, wanted, step, stop_ids=ends, pad_id=pad_id, batch_size=batch_size, quiet=quiet)
        longer: list[dict[tuple[int, ...], bool]] = [{} for _ in requests]  # ids: whether they end
        for at, response in sorted(made, key=lambda pair: pair[0]):
            i, found = origin[at]
            ids = (found.ids + response.ids)[:most]
            longer[i][tuple(ids)] = ids[-1] in stops
        new = [(i, list(ids), ended) for i, distinct in enumerate(longer) for ids, ended in distinct.items()]
        values = score([episode_of(requests[i].prompt_ids, ids, ended) for i, ids, ended in new])
        for i, beginnings in enumerate(kept):
            candidates = [found for found in beginnings if not open_(found)]
            candidates += [Found(ids, ended, value) for (j, ids, ended), value in zip(new, values) if j == i]
            kept[i] = sorted(candidates, key=lambda found: found.score, reverse=True)[:beams]
        depth += 1
    return [max(beginnings, key=lambda found: found.score) for beginnings in kept]
