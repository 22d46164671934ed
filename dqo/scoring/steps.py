"""Cuts a response into steps: character spans that cover its text."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate

from dqo.errors import UserError
from dqo.grading.text import line_spans
from dqo.grading.verifiers import load_function

Spans = list[tuple[int, int]]

_BREAK = re.compile(r"[.!?]+[\"')\]*_]*\s+|\n\s*")
_NUMBERING = re.compile(r"\s*\(?(?:[0-9]{1,3}|[a-zA-Z])[.)]\s*")  # "2. " begins a sentence, and is none


def line_steps(text: str) -> Spans:
    """The lines that are not blank; a blank one belongs to the line before it."""
    return _joined(text, [end for _, end in line_spans(text)], lambda piece: not piece.strip())


def sentence_steps(text: str) -> Spans:
    """Sentences, and lines where one ends without a full stop. White space belongs to the sentence before it."""
    ends = [match.end() for match in _BREAK.finditer(text)]
    return _joined(text, ends, lambda piece: not piece.strip() or _NUMBERING.fullmatch(piece) is not None)


def _joined(text: str, ends: list[int], is_no_step: Callable[[str], bool]) -> Spans:
    """Spans up to the ends; what is no step of its own goes with the piece after it, at the text's end with the one before."""
    spans: Spans = []
    start = 0
    for end in sorted({*ends, len(text)}):
        if spans and not text[start:end].strip():
            spans[-1] = (spans[-1][0], end)
        elif is_no_step(text[start:end]) and end < len(text):
            continue
        else:
            spans.append((start, end))
        start = end
    return [span for span in spans if span[0] < span[1]]


def step_splitter(name: str) -> Callable[[str], Spans]:
    """The function of `lines`, `sentences`, or python:module:function, which returns the pieces of a text, in order.

    Raises:
        UserError: when the user's function is not there; the splitter raises it where the pieces do not join to the text.
    """
    if name in SPLITTERS:
        return SPLITTERS[name]
    function = load_function(name)

    def split(text: str) -> Spans:
        try:
            pieces = list(function(text))
        except Exception as error:
            raise UserError(f"steps by {name}: {type(error).__name__}: {error}, at {text!r:.80}") from error
        if not all(isinstance(piece, str) and piece for piece in pieces) or "".join(pieces) != text:
            raise UserError(
                f"steps by {name} must be strings, none of them empty, that join to the response; got {pieces!r:.80} for "
                f"{text!r:.80}"
            )
        ends = list(accumulate(map(len, pieces)))
        return list(zip([0, *ends], ends))

    return split


SPLITTERS: dict[str, Callable[[str], Spans]] = {"lines": line_steps, "sentences": sentence_steps}
