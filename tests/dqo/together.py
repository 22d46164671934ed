"""The processes of a launch as threads of one process, for tests of what they do together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dqo.processes import Processes


def launched(world: int, work: Callable[[Processes], Any], machines: int = 1) -> list[Any]:
    """`work(processes)` in each of `world` threads at once; what they return. `processes` has from_main, barrier and gather.
    `machines`: on so many they are, as many on each."""
    meet, told, lists = threading.Barrier(world, timeout=600), [], [[] for _ in range(world)]

    class Thread(Processes):
        def barrier(self):
            meet.wait()

        def from_main(self, function):
            if self.main:
                told.append(function())
            meet.wait()
            return told[-1]

        def gather(self, items):
            lists[self.rank] = items
            meet.wait()
            found = [item for members in lists for item in members]
            meet.wait()  # a faster one may already tell the next
            return found

    ranks = [Thread(rank, world, local_rank=rank % (world // machines)) for rank in range(world)]
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, ranks))
