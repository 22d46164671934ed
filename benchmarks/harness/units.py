"""What an operation's work is counted in: the names of a record's fields, and what the report calls them.

A reduction is bound by memory, so its bytes are counted and a plain copy is the most it can reach; a projection is bound by
arithmetic, so its FLOPs are counted and bare matrix products are. A training step has no such bound; its tokens are counted.
"""

from __future__ import annotations

from typing import NamedTuple


class Unit(NamedTuple):
    count: str  # the field with the work of one call; with _formula, its text
    rate: str  # the field with the work per second, in units of `scale`
    scale: float
    title: str  # of the report's list of formulas
    columns: tuple[str, str]  # in the report: the rate, and its share of the ceiling's
    ceiling: str | None = None  # the implementation that does the same work and nothing else, timed in the same rounds
    ceiling_rate: str = ""
    share: str = ""


COPY = "copy"
GEMMS = "bare GEMMs"

BYTES = Unit(
    "bytes", "gb_per_s", 1e9, "Bytes that must move", ("GB/s", "of copy"), COPY, "copy_gb_per_s", "share_of_copy"
)
FLOPS = Unit(
    "flops", "tflop_per_s", 1e12, "FLOPs that count", ("TFLOP/s", "of GEMMs"), GEMMS, "gemms_tflop_per_s", "share_of_gemms"
)  # fmt: skip
TOKENS = Unit("tokens", "tokens_per_s", 1.0, "Tokens of a step", ("tokens/s", ""))
UNITS = (BYTES, FLOPS, TOKENS)
