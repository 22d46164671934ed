"""Cuts texts into lines, in the same places for the checks of rows, the converters and the graders."""

import re


def line_spans(text: str) -> list[tuple[int, int]]:
    """Character spans of the lines, which cover the text: a newline belongs to the line it ends."""
    return [match.span() for match in re.finditer(r"[^\n]*\n|[^\n]+", text)]
