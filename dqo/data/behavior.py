"""The policy mu that wrote the responses of a file, as far as its rows tell. Importance weights pi/mu need its log-probabilities:
those that are stored, or the reference's where the reference wrote the responses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dqo.data.rows import Row
from dqo.data.stored import OPTIONAL, column

_ADVICE = "; where it was the reference at temperature 1, give --is_level trajectory"


class Known(NamedTuple):
    """Whether the log-probabilities of the policy that wrote the responses are known, and by what, as a clause."""

    known: bool
    why: str


class ReferenceName(NamedTuple):
    """What a row's `sampling` may call the reference policy."""

    name: str | None  # directory or hub name; None of a model object
    identity: Callable[[], str | None]  # models.identity.model_identity, which reads the model's files


def known_behavior(rows: Sequence[Row], reference: ReferenceName) -> Known:
    """By stored logprobs, which are taken for those of the policy that sampled; else by `sampling`, where every row's names the
    reference."""
    if (column(rows, "present") >> OPTIONAL.index("logprobs") & 1).all():
        return Known(True, "every row has the logprobs of the policy that wrote it")
    other = not_of_reference(rows, reference)
    if other is None:
        return Known(
            True, "no row has logprobs, and sampling names the reference, at temperature 1, as the policy that wrote it"
        )
    return Known(False, f"no row has logprobs, and {other}")


def not_of_reference(rows: Iterable[Row], reference: ReferenceName) -> str | None:
    """Of the first row that is not said to be sampled from the reference as it is, why not; None where all are."""
    identity: list[str | None] = []
    for row in rows:
        told = row.sampling or {}
        if "model" not in told and "model_hash" not in told:
            return f"nothing tells which policy wrote {row.source}{_ADVICE}"
        if "model_hash" in told:
            identity = identity or [reference.identity()]
            same = told["model_hash"] == identity[0]
        else:
            same = told["model"] == reference.name
        if not same:
            return f"sampling of {row.source} names another model than the reference, {told.get('model', told.get('model_hash'))}"
        if changed := _changes(told):
            return (
                f"sampling of {row.source} has {changed}, which is not the distribution of the reference; store the logprobs of "
                "such samples, as `dqo sample` does"
            )
    return None


def reference_samples(rows: Sequence[Row], reference: ReferenceName) -> set[str]:
    """Sources of the rows whose `sampling` says that the reference wrote them as it is."""
    once = ReferenceName(reference.name, functools.cache(reference.identity))
    return {row.source for row in rows if not_of_reference([row], once) is None}


def _changes(told: dict[str, Any]) -> str:
    """What makes another distribution of the model's, for a message; "" where nothing does."""
    plain: dict[str, tuple] = {
        "temperature": (1,),
        "top_p": (None, 1),
        "top_k": (None, 0, -1),
        "prefix_tokens": (None, 0),
    }
    return ", ".join(
        f"{name} {told.get(name, 'unknown')}" for name, usual in plain.items() if told.get(name) not in usual
    )


def weight_level(option: str, behavior: Known) -> str:
    """What the option is_level comes to."""
    return option if option != "auto" else "trajectory" if behavior.known else "none"


def weights_line(option: str, level: str, behavior: Known) -> str:
    """What is assumed of the responses, as training and `dqo check` say it."""
    begin = f"importance weights: {level} (is_level {option})"
    if option == "auto":
        return f"{begin}, because {behavior.why}"
    if option == "none":
        return begin
    assumed = "" if behavior.known else ", which takes every row for a sample of the reference at temperature 1"
    return f"{begin}{assumed}; {behavior.why.removesuffix(_ADVICE)}"
