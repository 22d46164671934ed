"""OREO's rows (arXiv 2412.16145): a prompt, a response and its reward."""

from __future__ import annotations

from pathlib import Path

from dqo.convert.source import Converted, refuse_other_form, source_records
from dqo.data.rows import rows_of


def convert_oreo(source: str | Path) -> Converted:
    """prompt, response, reward: one row."""
    name, records = source_records(source)
    refuse_other_form(name, records, "oreo", "prompt, response, reward")
    return Converted(rows_of(name, records, []), {})


FORMATS = {"oreo": convert_oreo}
