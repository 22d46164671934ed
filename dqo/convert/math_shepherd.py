"""Math-Shepherd (peiyi9979/Math-Shepherd): solutions whose steps are labelled by where their completions led."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path

from dqo.convert.source import Converted, prompt_of, source_records, text_of, warn_unended
from dqo.data.forms import Record, joined
from dqo.data.rows import Row
from dqo.errors import UserError

logger = logging.getLogger(__name__)

_MARK = "ки"
_FIRST = re.compile(r"Step 1:|step 1:")
_LISTED = 5  # rows named in a message about what is left out


def convert_math_shepherd(source: str | Path) -> Converted:
    """`input` is question and steps, each step ended by a mark, `label` the same text with + or - for each mark.

    The question ends where "Step 1:" begins; a step reaches to its mark, a newline takes the place of what is between the marks
    and the next step. step_rewards are 1 and 0: whether some completion from there was right, so they serve as potentials.
    A solution ended when its last step says "The answer is", and is right when its last label is + as well. Rows whose input
    and label do not match mark by mark, or that have a mark inside the question, are named and left out.
    """
    _, records = source_records(source)
    rows, bad = [], []
    for record in records:
        try:
            rows.append(_row(record))
        except _Mislabelled as fault:
            bad.append(f"{record.source} ({fault})")
    if bad:
        logger.warning(
            "%d mislabelled rows are left out: %s", len(bad), ", ".join([*bad[:_LISTED], *["..."][: len(bad) - 5]])
        )
    warn_unended(rows)
    return Converted(rows, {"left_out_mislabelled": len(bad), "by_task": _shares_by(rows, "task")})


class _Mislabelled(Exception):
    pass


def _row(record: Record) -> Row:
    given, labelled = text_of(record, "input"), text_of(record, "label")
    *pieces, rest = given.split(_MARK)
    if not pieces:
        raise UserError(f'{record.source}: input has no mark "{_MARK}"; expected one after every step')
    signs: list[bool] = []
    position = 0
    for piece in pieces:
        position += len(piece)
        sign = labelled[position : position + 1]
        if labelled[position - len(piece) : position] != piece or sign not in ("+", "-"):
            raise _Mislabelled(f"mark {len(signs) + 1} has no + or - in label")
        signs.append(sign == "+")
        position += 1
    if rest.strip() or labelled[position:].strip():
        raise _Mislabelled("text after the last mark")
    first = _FIRST.search(given)
    if not first:
        raise _Mislabelled('no "Step 1:"')
    if first.start() > len(pieces[0]):
        raise _Mislabelled("a mark inside the question")
    question, pieces[0] = given[: first.start()], given[first.start() : len(pieces[0])]
    steps = [piece.strip() for piece in pieces]
    if not question.strip() or not all(steps):
        raise _Mislabelled("an empty question or step")
    text, spans = joined(steps)
    ended = "The answer is" in steps[-1]
    right = ended and signs[-1]
    task = record.values.get("task")
    return Row(
        prompt=prompt_of(question),
        completion=text,
        reward=float(right),
        label=right,
        steps=spans,
        step_rewards=[float(sign) for sign in signs],
        finish_reason="stop" if ended else "length",
        sampling={"task": task} if isinstance(task, str) else None,
        source=record.source,
    )


def _shares_by(rows: list[Row], name: str) -> dict[str, float]:
    """Share of right rows for each value of a field of `sampling`."""
    labels = defaultdict(list)
    for row in rows:
        labels[(row.sampling or {}).get(name, "?")].append(row.label)
    return {value: sum(found) / len(found) for value, found in labels.items()}


FORMATS = {"math-shepherd": convert_math_shepherd}
