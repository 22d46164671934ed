"""TRL's data: preference, unpaired preference and stepwise supervision sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dqo.convert.source import Converted, refuse_other_form, source_records
from dqo.data.forms import Record
from dqo.data.rows import rows_of
from dqo.errors import UserError


def convert_trl_preference(source: str | Path) -> Converted:
    """prompt, chosen, rejected: two rows, with rewards 1 and 0. The prompt may be implicit, the common beginning of both."""
    name, records = source_records(source)
    refuse_other_form(name, records, "preference", "chosen, rejected")
    implicit = 0
    for record in records:
        implicit += _split_prompt(record)
    return Converted(rows_of(name, records, []), {"pairs": len(records), "implicit_prompts": implicit})


def convert_trl_kto(source: str | Path) -> Converted:
    """prompt, completion, label: one row, with reward 1 when label is true, else 0."""
    name, records = source_records(source)
    refuse_other_form(name, records, "flat", "prompt, completion, label")
    found = {key: None for record in records for key in record.values}
    if "label" not in found:
        raise UserError(
            f"{name}: no row has label; found {', '.join(found)}. Unpaired preferences are prompt, completion and label"
        )
    for record in records:
        record.values.pop("reward", None)
    return Converted(rows_of(name, records, []), {})


def convert_trl_stepwise(source: str | Path) -> Converted:
    """prompt, completions, labels: the completions are the steps of one response, the labels its step_rewards."""
    name, records = source_records(source)
    refuse_other_form(name, records, "stepwise", "prompt, completions, labels")
    return Converted(rows_of(name, records, []), {})


def _split_prompt(record: Record) -> bool:
    """Moves what chosen and rejected share to prompt, where it stands in both of them; says whether it did."""
    chosen: Any = record.values.get("chosen")
    rejected: Any = record.values.get("rejected")
    prompt = record.values.get("prompt")
    kinds = {type(chosen), type(rejected)}
    if kinds not in ({str}, {list}) or (kinds == {str} and prompt is not None):
        return False  # what is wrong, if anything is, will be said where rows are checked
    if chosen == rejected:
        raise UserError(f"{record.source}: chosen and rejected do not differ; drop the row")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if kinds == {str}:
        while shared and not chosen[shared - 1].isspace():
            shared -= 1  # a word that begins alike belongs to the responses
        if shared and chosen[shared - 1] == " ":
            shared -= 1  # as tokenizers have it, a space belongs to the word after it
    if shared == 0:
        if prompt is None:
            raise UserError(
                f"{record.source}: has no prompt, and chosen and rejected share no beginning that could be it"
            )
        return False
    if kinds == {list} and isinstance(prompt, list) and chosen[:shared][: len(prompt)] != prompt:
        prompt = prompt + chosen[:shared]  # turns that follow the prompt
    else:
        prompt = chosen[:shared]
    record.values |= {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return True


FORMATS = {
    "trl-preference": convert_trl_preference,
    "trl-kto": convert_trl_kto,
    "trl-stepwise": convert_trl_stepwise,
}
