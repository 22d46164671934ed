"""Log-probabilities and logsumexps of the reference policy: computed once, cached on disk, stored on the episodes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from dqo import signals
from dqo.data.batches import Batch, Batching
from dqo.data.episode import Episode, first_tokens
from dqo.data.episodes import Episodes
from dqo.data.joined import parts_of
from dqo.errors import UserError
from dqo.files import in_units
from dqo.models.memory import in_memory
from dqo.processes import Processes
from dqo.reference.cache import Entry, ReferenceCache, response_key
from dqo.reference.exchange import exchange
from dqo_kernels import TokenStats

logger = logging.getLogger(__name__)

StatsOf = Callable[[Batch], TokenStats]  # the reference's forward pass

FLUSH_SECONDS = 20.0  # a killed pass loses at most these, or
FLUSH_TOKENS = 2**22  # 32 MiB of float32 pairs
PACE_SECONDS = 5.0  # after so many the pace is known

# How far two computations of one model may be apart, relative to 1 + |logprob|, in batches of different shapes: matrix kernels
# add up in another order. 99 random Llama and Qwen2 models on a CPU (width 64-512, 2-48 layers, standard deviation of the
# weights 0.02-0.3, entropy 7.1-0.5 nats a token) reached 8.9e-6 in float32, 0.038 in bfloat16 by autocast and 0.086 with bfloat16
# parameters.
AGREEMENT_BOUNDS = {"float32": 3e-5, "bfloat16": 0.1}


def _batches(keys: list[bytes], sizes: dict[bytes, int], max_tokens: int) -> Iterator[list[bytes]]:
    """Runs of responses, longest first, of at most `max_tokens` padded tokens, or one response. Where a run ends depends on
    nothing before its first response, so a pass that goes on after some runs computes the same batches as an unbroken one."""
    begin = 0
    while begin < len(keys):
        end = begin + max(1, max_tokens // sizes[keys[begin]])
        yield keys[begin:end]
        begin = end


def key_of(e: Episode) -> bytes:
    """Of its entry in the cache."""
    return response_key(e.prompt_ids, e.completion_ids, e.env_mask)


def _together(batches: Iterator[list[bytes]], processes: Processes) -> Iterator[list[bytes]]:
    """`batches`, and empty ones until every process is through with its own."""
    while True:
        batch = next(batches, [])
        if not processes.largest(len(batch)):
            return
        yield batch


def _with_companions(episodes: Iterable[Episode]) -> Iterator[Episode]:
    for e in episodes:
        yield e
        if e.companion is not None:
            yield e.companion


class Pace:
    """Says once, after the first batches, how long a pass will take.

    Args:
        lengths: tokens of the responses, in the order in which they are computed.
        what: whose pass it is.
    """

    def __init__(self, processes: Processes, lengths: list[int], what: str = "reference"):
        self.processes, self.ends, self.what = processes, np.cumsum([0, *lengths]), what
        self.begun, self.said = time.monotonic(), False

    def note(self, done: int) -> None:
        """After `done` responses."""
        seconds = time.monotonic() - self.begun
        if self.said or seconds < PACE_SECONDS or done == len(self.ends) - 1:
            return
        self.said = True
        rate = self.ends[done] / seconds
        left = (self.ends[-1] - self.ends[done]) / rate
        self.processes.say(f"{self.what} pass: {rate:,.0f} tokens/s, about {_in_minutes(left)} left")


def _in_minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _compute(
    members: list[Episode], keys: list[bytes], stats_of: StatsOf, batching: Batching, what: str
) -> dict[bytes, Entry]:
    stats = stats_of(batching.collate(members))
    logprobs, lse = stats.logprobs.float().cpu().numpy(), stats.lse.float().cpu().numpy()
    entries, begin = {}, 0
    for e, key in zip(members, keys):
        end = begin + e.action_count
        entries[key] = Entry(logprobs[begin:end], lse[begin:end])
        wrong = np.flatnonzero(~np.isfinite(entries[key].logprobs + entries[key].lse))
        if len(wrong):
            raise UserError(
                f"{e.source}: the {what} policy gives token {wrong[0] + 1} of the response the log-probability "
                f"{logprobs[begin + wrong[0]]}; a ratio to it means nothing. Drop the row, or check model and dtype"
            )
        begin = end
    return entries


@torch.no_grad()
def add_reference(
    episodes: list[Episode],
    stats_of: StatsOf,
    batching: Batching,
    processes: Processes,
    cache: ReferenceCache | None = None,
    what: str = "reference",
    together: bool = False,
) -> int:
    """Fills `ref_logprobs` and `ref_lse`, float32 (T,), of every episode and of its companion; returns how many it computed. See
    `reference_entries`."""
    entries, computed = reference_entries(episodes, stats_of, batching, processes, cache, what, together)
    fill(episodes, entries)
    return computed


def fill(episodes: Sequence[Episode], entries: dict[bytes, Entry], column: str | None = None) -> None:
    """Sets `ref_logprobs` and `ref_lse` of every episode and of its companion, or this column of every episode to the logprobs.
    Episodes that are made when they are read have them from then on."""
    for part in parts_of(episodes):
        if isinstance(part, Episodes):
            part.set_said(entries, key_of, column)
            continue
        for e in _with_companions(part) if column is None else part:
            found = entries[key_of(e)]
            if column is None:
                e.ref_logprobs, e.ref_lse = found.logprobs, found.lse
            else:
                e.columns[column] = found.logprobs


@torch.no_grad()
def reference_entries(
    episodes: Sequence[Episode],
    stats_of: StatsOf,
    batching: Batching,
    processes: Processes,
    cache: ReferenceCache | None = None,
    what: str = "reference",
    together: bool = False,
    companions: bool = True,
) -> tuple[dict[bytes, Entry], int]:
    """What the reference says of every episode and of its companion, by `key_of`, and how many of them it computed.

    Args:
        episodes: equal responses are computed once; they are read again where they are computed.
        stats_of: the reference's forward pass, on batches of `batching`.
        processes: each computes its share and reads the others' after a barrier, or is sent them; several need a cache.
        cache: what is there is not computed, and what is computed goes there a segment at a time; None keeps nothing.
        what: whose forward pass it is, for messages.
        together: a forward pass is one of all processes, whose shards it gathers: who is done computes along.
        companions: False leaves them out.

    Raises:
        UserError: for a response to which the reference gives no finite log-probability.
    """
    places: dict[bytes, tuple[int, bool]] = {}  # the first episode, and whether its companion is meant
    lengths: dict[bytes, int] = {}  # actions
    sizes: dict[bytes, int] = {}  # tokens
    for i, episode in enumerate(episodes):
        for e in filter(None, (episode, episode.companion if companions else None)):
            key = key_of(e)
            if key not in places:
                places[key], lengths[key], sizes[key] = (i, e is not episode), e.action_count, e.length

    def member(key: bytes) -> Episode:
        i, of_companion = places[key]
        found = episodes[i].companion if of_companion else episodes[i]
        assert found is not None
        return found

    entries = {} if cache is None else cache.lookup(lengths)
    if processes.world > 1 and cache is not None:
        exchange(entries, lengths, cache, processes)

    # By key among equals, and shares of all responses rather than of the missing ones: after a kill every rank goes on as before.
    ordered = sorted(places, key=lambda key: (-sizes[key], key))
    missing = [key for key in ordered[processes.rank :: processes.world] if key not in entries]
    known = f" ({len(entries):,} of {len(places):,} cached)" if entries else ""
    hidden = not processes.main or not missing
    bar = tqdm(total=len(missing), desc=f"{what}{known}", unit="response", disable=hidden, leave=False)
    pending: dict[bytes, Entry] = {}

    def flush() -> None:
        if cache is not None:
            cache.add(pending)
        entries.update(pending)
        pending.clear()

    done, tokens, flushed = 0, 0, time.monotonic()
    batch: list[bytes] = []
    pace = Pace(processes, [sizes[key] for key in missing], what)
    if cache is not None:
        cache.check_room([lengths[key] for key in places if key not in entries])
    if processes.main and missing:
        todo = sum(sizes[key] for key in missing)
        of = f" for each of {processes.world} processes" if processes.world > 1 else ""
        needs = "" if cache is None else f", {in_units(cache.size([lengths[key] for key in missing]))} of cache"
        processes.say(f"{what} pass: {len(missing):,} responses, {todo:,} tokens{needs}{of}")

    def rest_of_the_pass(max_tokens: int) -> None:
        nonlocal done, tokens, flushed, batch
        own = _batches(missing[done:], sizes, max_tokens)
        for batch in _together(own, processes) if together else own:
            if not batch:
                stats_of(batching.collate([member(ordered[-1])]))
                continue
            pending.update(_compute([member(key) for key in batch], batch, stats_of, batching, what))
            done, tokens = done + len(batch), tokens + sum(lengths[key] for key in batch)
            bar.update(len(batch))
            pace.note(done)
            if tokens >= FLUSH_TOKENS or time.monotonic() - flushed >= FLUSH_SECONDS:
                flush()
                tokens, flushed = 0, time.monotonic()

    def smaller(_: int) -> int | None:
        return len(batch) * sizes[batch[0]] // 2 if len(batch) > 1 and not together else None

    with signals.raising():
        try:
            in_memory(rest_of_the_pass, batching.max_tokens, smaller, f"{what} pass", batching.device)
        finally:  # an interrupted pass keeps the batches that it finished
            flush()
            bar.close()
    if processes.world > 1:
        assert cache is not None  # the caller gives one
        processes.barrier()
        entries |= cache.lookup({key: length for key, length in lengths.items() if key not in entries})
        exchange(entries, lengths, cache, processes)
    if cache is not None and processes.local_rank == 0:
        cache.describe()
    return entries, len(missing)


def _shortened(e: Episode) -> Episode:
    """The response without its last action: nothing that a causal policy says about the others changes."""
    if e.action_count == 1:
        return e
    completion, env_mask, _ = first_tokens(e.completion_ids, e.env_mask, len(e.completion_ids) - 1)
    columns = ("rewards", "behavior_logprobs", "ref_logprobs", "ref_lse")
    cut = {name: getattr(e, name)[:-1] for name in columns if getattr(e, name) is not None}
    turn_ends = [end for end in e.turn_ends if end < e.action_count - 1]
    return replace(e, completion_ids=completion, env_mask=env_mask, turn_ends=turn_ends, columns={}, **cut)


@torch.no_grad()
def check_agreement(
    episodes: Sequence[Episode],
    stats_of: StatsOf,
    batching: Batching,
    dtype: str = "float32",
    cache: ReferenceCache | None = None,
) -> None:
    """Recomputes 64 responses with the initial policy, which was declared to be the reference, in batches of other shapes: one
    token shorter, and long ones beside short ones. `dtype` is that of the forward pass and decides the bound."""
    chosen = episodes[:: max(1, len(episodes) // 64)][:64]
    ordered = sorted((_shortened(e) for e in chosen), key=lambda e: -e.length)

    def compared(max_tokens: int) -> list[tuple[float, int, Episode]]:
        """The largest excess of each response, and where."""
        found, count = [], -(-len(ordered) * ordered[0].length // max_tokens)
        for members in (ordered[i::count] for i in range(count) if ordered[i::count]):
            batch = batching.collate(members)
            expected = batch.columns["ref_logprobs"]
            apart = ((stats_of(batch).logprobs - expected).abs() / (1.0 + expected.abs())).nan_to_num(float("inf"))
            for e, piece in zip(members, apart.split([e.action_count for e in members])):
                worst, position = piece.max(0)
                found.append((worst.item(), int(position.item()) + 1, e))
        return found

    def smaller(max_tokens: int) -> int | None:
        whole = len(ordered) * ordered[0].length
        return min(max_tokens, whole) // 2 if max_tokens > ordered[0].length and len(ordered) > 1 else None

    excess = in_memory(compared, batching.max_tokens, smaller, "check of the reference", batching.device)
    bound = AGREEMENT_BOUNDS[dtype]
    wrong = sorted((x for x in excess if not x[0] <= bound), key=lambda x: -x[0])
    if not wrong:
        return
    rows = ", ".join(f"{e.source} ({worst:.3g} at token {position})" for worst, position, e in wrong[:10])
    stale = "" if cache is None else f", or stale values in the cache: delete {cache.directory}"
    raise UserError(
        f"the reference's log-probabilities differ from the initial policy's by up to {wrong[0][0]:.3g} at step 0, relative to "
        f"1 + |logprob|; rounding in {dtype} explains {bound:g}. {len(wrong)} of {len(excess)} responses: {rows}"
        f"{' ...' if len(wrong) > 10 else ''}. Causes: another reference model, an adapter that was not switched off, dropout, "
        f"attention that is not causal{stale}"
    )
