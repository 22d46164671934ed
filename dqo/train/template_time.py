"""The time of a chat template that reads the clock: a run that goes on tells it the time of its begin."""

from __future__ import annotations

import datetime

from dqo.config.options import TrainConfig
from dqo.data.chat import reads_clock
from dqo.processes import Processes, gather_objects
from dqo.train.resume import found_state

TEMPLATE_TIME = "time that the chat template was told"  # in the identity of runs whose template reads the clock


def told_time(config: TrainConfig, tokenizer, processes: Processes) -> datetime.datetime | None:
    """What a chat template that reads the clock takes for now: the time of the run that goes on, whose ids must come again; of a
    new run the clock of the first process. None where no template reads it."""
    if not reads_clock(tokenizer):
        return None
    found = found_state(config)
    if found is not None:
        try:
            return datetime.datetime.fromisoformat(found[1]["identity"][TEMPLATE_TIME])
        except (ValueError, KeyError, TypeError):  # of a run without it: named when it is claimed
            pass
    return gather_objects([datetime.datetime.now()], processes)[0]
