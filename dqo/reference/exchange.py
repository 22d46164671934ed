"""Entries of the reference's cache for the machines that lack them: each machine may have a cache of its own.

Where all processes read one directory nothing is sent. Otherwise what one has, or has computed, is sent to the others, and the
first process of each machine writes what came into its cache.
"""

from __future__ import annotations

import hashlib

from dqo.processes import Processes, gather_objects
from dqo.reference.cache import Entry, ReferenceCache

SENT_TOGETHER = 2**22  # tokens


def exchange(
    entries: dict[bytes, Entry], lengths: dict[bytes, int], cache: ReferenceCache, processes: Processes
) -> None:
    """Adds to `entries` those that another process has. All processes must call it.

    Args:
        lengths: tokens of each response that is wanted, the same in all processes.
    """
    have = sorted(key for key in lengths if key in entries)
    if len(set(gather_objects([hashlib.sha256(b"".join(have)).digest()], processes))) == 1:
        return
    owner: dict[bytes, int] = {}
    count: dict[bytes, int] = {}
    for rank, keys in enumerate(gather_objects([have], processes)):
        for key in keys:
            owner.setdefault(key, rank)
            count[key] = count.get(key, 0) + 1
    for part in _parts([key for key in sorted(owner) if count[key] < processes.world], lengths):
        mine = [(key, entries[key]) for key in part if owner[key] == processes.rank]
        came = {key: entry for key, entry in gather_objects(mine, processes) if key not in entries}
        entries.update(came)
        if processes.local_rank == 0:
            cache.add(came)


def _parts(keys: list[bytes], lengths: dict[bytes, int]) -> list[list[bytes]]:
    """Keys that are sent together."""
    found: list[list[bytes]] = []
    tokens = SENT_TOGETHER
    for key in keys:
        if tokens >= SENT_TOGETHER:
            found.append([])
            tokens = 0
        found[-1].append(key)
        tokens += lengths[key]
    return found
