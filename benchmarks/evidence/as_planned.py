"""Options of plans that are older than an option of DQO."""

from __future__ import annotations

from typing import Any


def as_planned(options: dict[str, Any]) -> dict[str, Any]:
    """What these options of `dqo train` meant when they were written: without a likelihood of correct responses, unless they name
    it. So recorded runs stay what their options make."""
    return {"nll_coef": 0.0} | options if options.get("method", "dqo") == "dqo" and "preset" not in options else options
