"""What the model said of the held-out responses before it was trained: held_out_start.jsonl, a line for each.

These scores need no training, so that credit which was learned can be told from what the initial model's own doubt says. They
come from the evaluation before the first step, which reads every response anyway.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dqo.credit.steps import step_highest
from dqo.data.episode import Episode
from dqo.train.held_out import Tokens
from dqo.train.record import write_lines

logger = logging.getLogger(__name__)

START_FILE = "held_out_start.jsonl"


def start_row(episode: Episode, tokens: Tokens) -> dict[str, Any]:
    """Sums over the response, and for each step its lowest log-probability and its highest entropy, both of a token."""
    return {
        "source": episode.source,
        "start_logps": float(tokens["logprobs"].sum()),
        "start_entropy": float(tokens["entropy"].sum()),
        "start_step_logprobs": _rounded(-step_highest(-tokens["logprobs"], episode.step_ends)),
        "start_step_entropies": _rounded(step_highest(tokens["entropy"], episode.step_ends)),
    }


def write_start(output_dir: Path, episodes: Sequence[Episode], tokens: Sequence[Tokens]) -> None:
    write_lines(output_dir / START_FILE, [start_row(e, said) for e, said in zip(episodes, tokens, strict=True)])


def read_start(output_dir: Path, episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """A row for each of these responses; [], with a warning where the file is not theirs, for runs that kept none."""
    path = output_dir / START_FILE
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        if [row["source"] for row in rows] == [e.source for e in episodes]:
            return [{name: row[name] for name in row if name.startswith("start_")} for row in rows]
        reason = "it is of other responses"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning("%s is left out of the report: %s", path, reason)
    return []


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values.astype(float), 6).tolist()
