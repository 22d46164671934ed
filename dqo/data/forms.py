"""The forms of rows that are read, and how each is rewritten to flat rows.

    flat        prompt, completion, reward or label     one response a row; all other columns are optional
    grouped     prompt, completions, rewards            lists: one row for each completion
    preference  prompt, chosen, rejected                two rows, with rewards 1 and 0
    stepwise    prompt, completions, labels             one row: the completions are the steps of one response
    oreo        prompt, response, reward                `response` is the completion

A stepwise row joins its steps with newlines. Its step rewards are its labels as numbers; its reward, unless
given, is 1 when every label is right (true, or above the threshold) and else 0: steps that are all right are
taken for a right solution. A preference row's score_chosen and score_rejected are not read, as is said when they are there:
scores of any scale in the place of 1 and 0 would be other rewards, and equal ones no preference.

With messages a row may have `tools` and `chat_template_kwargs`, which go to the chat template as TRL's do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dqo.data.hints import renaming_hint, structure_hint
from dqo.errors import UserError, closest, printable

FIELDS = (
    "prompt",
    "completion",
    "reward",
    "label",
    "steps",
    "step_rewards",
    "prompt_value",
    "prompt_ids",
    "completion_ids",
    "logprobs",
    "env_mask",
    "turn_spans",
    "turn_rewards",
    "finish_reason",
    "answer",
    "prompt_id",
    "sampling",
    "grading",
    "tools",
    "chat_template_kwargs",
)
_HARMLESS = {
    "answer",
    "prompt_id",
    "sampling",
    "grading",
    "tools",
    "chat_template_kwargs",
}  # nothing is lost when a column like these is ignored
_OF_TEMPLATES = ("tools", "chat_template_kwargs")  # of messages
_OF_THE_PROMPT = ("prompt", "prompt_ids", "prompt_id", "answer", "sampling", "prompt_value", *_OF_TEMPLATES)
_EACH = {  # columns of a grouped row with one value for each completion -> the field they become
    "rewards": "reward",
    "labels": "label",
    "steps": "steps",
    "step_rewards": "step_rewards",
    "completion_ids": "completion_ids",
    "logprobs": "logprobs",
    "env_mask": "env_mask",
    "turn_spans": "turn_spans",
    "turn_rewards": "turn_rewards",
    "finish_reasons": "finish_reason",
}
MASKS = ("response_mask", "completion_mask", "assistant_masks", "tool_mask")  # what others call env_mask
_NEEDED = {
    "flat": ("prompt", "completion"),
    "grouped": ("prompt", "completions", "rewards"),
    "preference": ("prompt", "chosen", "rejected"),
    "stepwise": ("prompt", "completions", "labels"),
    "oreo": ("prompt", "response", "reward"),
}
_OF_STEPS = (
    "completion",
    "steps",
    "step_rewards",
    "env_mask",
    "turn_spans",
    "turn_rewards",
)  # that a stepwise row has not
_USED = {  # columns that are read besides; in the other forms all of FIELDS
    "grouped": (*_OF_THE_PROMPT, *_EACH),
    "preference": _OF_THE_PROMPT,
    "stepwise": tuple(name for name in FIELDS if name not in ("completion", "steps", "step_rewards")),
}


@dataclass(slots=True)
class Record:
    """One row as it was read. `names` maps a field to its name in the source, where a form renames it."""

    index: int
    source: str
    values: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)

    def name(self, column: str) -> str:
        return self.names.get(column, column)


def form_of(values: Collection[str]) -> str:
    """The form that these columns belong to; "flat" when they fit no other."""
    if "completion" in values:
        return "flat"
    if "completions" in values:
        return "stepwise" if "labels" in values and "rewards" not in values else "grouped"
    if "chosen" in values or "rejected" in values:
        return "preference"
    return "oreo" if "response" in values else "flat"


@dataclass
class Shape:
    """Rows with the same columns and the same kind of prompt."""

    keys: tuple[str, ...]  # in the order of the first such row
    null_reward: bool  # a reward that could not be computed
    messages: bool  # the prompt is a list
    count: int
    first: str  # the source of the first


class Shapes:
    """The columns of all rows of a source, as few numbers: what is needed to know their form, and what they have in common."""

    def __init__(self) -> None:
        self._found: dict[tuple, Shape] = {}

    def note(self, record: Record) -> None:
        """Counts a row, without the values that `tidy` drops."""
        _tidy(record)
        values = record.values
        null_reward, messages = values.get("reward", 0) is None, isinstance(values.get("prompt"), (list, tuple))
        key = (*values, null_reward, messages)
        shape = self._found.get(key)
        if shape is None:
            self._found[key] = Shape(tuple(values), null_reward, messages, 1, record.source)
        else:
            shape.count += 1

    def tidy(self, record: Record) -> None:
        """Drops what stands for columns that a row does not have; when all rows are noted."""
        _tidy(record)
        if self.drops_rewards:
            record.values.pop("reward", None)

    @cached_property
    def drops_rewards(self) -> bool:
        """Whether the column reward holds nothing, and labels are there in its place."""
        rewarded = any("reward" in shape.keys and not shape.null_reward for shape in self._found.values())
        return not rewarded and any("label" in shape.keys for shape in self._found.values())

    @property
    def all(self) -> list[Shape]:
        """In the order in which they were met, without a column of rewards that holds nothing."""
        shapes = list(self._found.values())
        if not self.drops_rewards:
            return shapes
        return [
            replace(shape, keys=tuple(key for key in shape.keys if key != "reward"), null_reward=False)
            for shape in shapes
        ]


def check_columns(name: str, shapes: Shapes, scored: bool = True) -> tuple[str, str]:
    """The form of most rows, and a line on columns that nothing reads ("" where there are none). `scored`: flat rows need a
    reward or a label.

    Raises:
        UserError: for a column that looks like a misspelling, and for a needed column that no row has.
    """
    all_shapes = shapes.all
    forms: Counter[str] = Counter()
    for shape in all_shapes:
        forms[form_of(shape.keys)] += shape.count
    form = forms.most_common(1)[0][0]
    known = {*_NEEDED[form], *((*_OF_THE_PROMPT, *_EACH) if form == "grouped" else FIELDS)}
    meant: dict[str, str | None] = {}
    misspelt: Counter[str] = Counter()
    first: dict[str, str] = {}
    found: dict[str, None] = {}
    for shape in all_shapes:
        for key in shape.keys:
            found[key] = None
            if key in known:
                continue
            if key not in meant:
                meant[key] = closest(str(key), known - _HARMLESS, cutoff=0.8)
                if closest(str(key), known, cutoff=0.8) in _HARMLESS:
                    meant[key] = None
            if meant[key] and meant[key] not in shape.keys:
                misspelt[key] += shape.count
                first.setdefault(key, shape.first)
    missing = [column for column in _NEEDED[form] if column not in found]
    if form == "flat" and scored and "reward" not in found and "label" not in found:
        missing.append("reward (or label)")
    names = set(map(str, found))
    structure = structure_hint(names) if missing else ""
    total = sum(shape.count for shape in all_shapes)
    if misspelt and not structure:
        raise UserError(
            "\n".join(
                f"{first[key]}: unknown column '{key}' (in {count} of {total} rows). "
                f"Did you mean '{meant[key]}'? Rename it, or drop it if it is something else"
                for key, count in misspelt.items()
            )
        )
    if missing:
        needed = "prompt, completion and reward (or label)" if form == "flat" else " and ".join(_NEEDED[form])
        hint = structure or renaming_hint(names)
        raise UserError(
            f"{name}: no row has {' or '.join(missing)}; needs the columns {needed}; "
            f"found {', '.join(map(str, found))}{f'. {hint}' if hint else ''}"
        )
    return form, _unused(name, all_shapes, form)


def _tidy(record: Record) -> None:
    """Drops null values, but that of a reward which could not be computed: it must be heard, not replaced by the label."""
    if any(value is None for value in record.values.values()):
        record.values = {key: v for key, v in record.values.items() if v is not None or key == "reward"}
    _name_mask(record)


def _name_mask(record: Record) -> None:
    """Calls the mask of stored ids env_mask, whatever its column is called."""
    mask = next((name for name in MASKS if name in record.values), None)
    if mask is not None and "completion_ids" in record.values and "env_mask" not in record.values:
        record.values["env_mask"] = record.values.pop(mask)
        record.names["env_mask"] = mask


def _unused(name: str, shapes: list[Shape], form: str) -> str:
    """One line for the columns that nothing reads; "" where there are none."""
    used = {*_NEEDED[form], *(_USED.get(form) or FIELDS)}
    if not any(shape.messages for shape in shapes):
        used -= set(_OF_TEMPLATES)
    counts: Counter[str] = Counter()
    for shape in shapes:
        counts.update({key: shape.count for key in shape.keys if key not in used})
    if not counts:
        return ""
    columns = ", ".join(f"{key!r} (in {count:,} rows)" for key, count in counts.items())
    scores = "; the rewards of chosen and rejected are 1 and 0, write grouped rows (completions, rewards) for scores"
    hint = scores if form == "preference" and any("score" in str(key) for key in counts) else ""
    return f"{name}: columns that are not used: {printable(columns)}{hint}"


def needed(form: str) -> tuple[str, ...]:
    """The columns that every row of this form has."""
    return _NEEDED[form]


def one_row_each(form: str) -> bool:
    """Whether rows of this form are flat ones, but for the names of columns."""
    return form in ("flat", "oreo")


def to_flat(record: Record, form: str, reward_threshold: float) -> list[Record]:
    """The flat rows of one row.

    Raises:
        UserError: when the row does not have its form.
    """
    values = record.values
    missing = [column for column in _NEEDED[form] if column not in values]
    if missing:
        raise UserError(
            f"has no {' and no '.join(missing)}; found {', '.join(map(str, values))}. "
            f"Most rows are {form} rows, and one file holds one form"
        )
    if form == "grouped":
        return _ungroup(record)
    if form == "preference":
        shared = {key: v for key, v in values.items() if key in _OF_THE_PROMPT}
        rows = []
        for side, reward in (("chosen", 1.0), ("rejected", 0.0)):
            flat = {**shared, "completion": values[side], "reward": reward}
            rows.append(Record(record.index, f"{record.source}, {side}", flat, {"completion": side}))
        return rows
    if form == "stepwise":
        return [_join_steps(record, reward_threshold)]
    if form == "oreo":
        flat = {("completion" if key == "response" else key): v for key, v in values.items()}
        return [Record(record.index, record.source, flat, {"completion": "response"})]
    return [record]


def _lists(record: Record, first: str, others: Iterable[str]) -> None:
    """Checks that columns are lists of the same length."""
    for column in (first, *others):
        if not isinstance(record.values[column], (list, tuple)):
            raise UserError(f"{column} is {shown(record.values[column])}; expected a list")
        if len(record.values[column]) != len(record.values[first]):
            raise UserError(
                f"{first} has {len(record.values[first])} values but {column} has "
                f"{len(record.values[column])}; expected one for each"
            )
    if not record.values[first]:
        raise UserError(f"{first} is an empty list; expected at least one")


def _ungroup(record: Record) -> list[Record]:
    each = {column: name for column, name in _EACH.items() if column in record.values}
    _lists(record, "completions", each)
    shared = {key: v for key, v in record.values.items() if key in _OF_THE_PROMPT}
    rows = []
    for i, completion in enumerate(record.values["completions"]):
        values = {**shared, "completion": completion}
        values |= {name: record.values[column][i] for column, name in each.items()}
        values = {key: v for key, v in values.items() if v is not None or key == "reward"}
        names = {name: f"{column}[{i}]" for column, name in each.items()}
        names["completion"] = f"completions[{i}]"
        rows.append(Record(record.index, f"{record.source}, completion {i + 1}", values, names))
    return rows


def joined(steps: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Steps as the lines of one text, and their character spans, which cover it."""
    spans, position = [], 0
    for i, step in enumerate(steps):
        end = position + len(step) + (i < len(steps) - 1)
        spans.append((position, end))
        position = end
    return "\n".join(steps), spans


def _join_steps(record: Record, reward_threshold: float) -> Record:
    _lists(record, "completions", ["labels"])
    steps, labels = record.values["completions"], record.values["labels"]
    for i, (step, label) in enumerate(zip(steps, labels)):
        if not isinstance(step, str) or not step:
            raise UserError(f"completions[{i}] is {shown(step)}; expected the text of a step")
        if not isinstance(label, (bool, int, float)):
            raise UserError(f"labels[{i}] is {shown(label)}; expected true, false or a number")
    text, spans = joined(steps)
    values = {key: v for key, v in record.values.items() if key in FIELDS}
    values |= {"completion": text, "steps": spans, "step_rewards": [float(label) for label in labels]}
    values.setdefault("reward", 1.0 if all(label > reward_threshold for label in labels) else 0.0)
    names = {"completion": "completions", "step_rewards": "labels"}
    return Record(record.index, record.source, values, names)


def shown(value: Any) -> str:
    """A value as JSON, short enough for a message."""
    text = json.dumps(value, default=repr, ensure_ascii=False).encode(errors="replace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
