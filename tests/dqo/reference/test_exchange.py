"""Caches of several machines become equal, whatever each of them has."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo.reference import exchange as module
from dqo.reference.cache import Entry, ReferenceCache
from dqo.reference.exchange import exchange
from tests.dqo.reference.passes import IDENTITY
from tests.dqo.together import launched


@settings(max_examples=25, deadline=None)
@given(data=st.data(), machines=st.integers(1, 3), each=st.integers(1, 2), together=st.integers(1, 12))
def test_every_machine_has_in_the_end_what_any_of_them_had(data, machines, each, together):
    keys = [bytes([i]) * 32 for i in range(6)]
    lengths = {key: 1 + i for i, key in enumerate(keys)}
    has = [data.draw(st.sets(st.sampled_from(keys))) for _ in range(machines)]
    sent: list[int] = []

    def gather(items, processes):
        if items and isinstance(items[0], tuple):
            sent.append(len(items))
        return processes.gather(items)

    def work(processes):
        machine = processes.rank // each
        values = {key: np.full(lengths[key], machine, np.float32) for key in has[machine]}
        entries = {key: Entry(value, value) for key, value in values.items()}
        exchange(entries, lengths, ReferenceCache(Path(folder, str(machine)), IDENTITY, "model"), processes)
        return entries

    with TemporaryDirectory() as folder:
        saved = module.gather_objects, module.SENT_TOGETHER
        module.gather_objects, module.SENT_TOGETHER = gather, together
        try:
            found = launched(machines * each, work, machines)
        finally:
            module.gather_objects, module.SENT_TOGETHER = saved
        for rank, entries in enumerate(found):
            machine = rank // each
            assert entries.keys() == set().union(*has)
            for key, entry in entries.items():
                owner = machine if key in has[machine] else next(m for m in range(machines) if key in has[m])
                assert entry.logprobs.tolist() == [owner] * lengths[key]
            written = ReferenceCache(Path(folder, str(machine)), IDENTITY, "model").lookup(lengths)
            assert written.keys() == entries.keys() - has[machine]
    lacking = [key for key in set().union(*has) if not all(key in mine for mine in has)]
    assert sum(sent) == len(lacking)  # each once
