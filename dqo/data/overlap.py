"""Problems for evaluation that are trained on, found by their text, whether a row has it as a string or in a message."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

from dqo.data.prompts import Prompt
from dqo.data.rows import Row
from dqo.errors import UserError

_NAMED = 5  # problems of a message


def problem_keys(prompt: str | list[dict]) -> set[bytes]:
    """Of each text in which a prompt may ask its problem: the string, or what a user says in messages. Equal texts have equal
    keys, up to case, white space and forms of one character (Unicode's NFKC)."""
    texts = [prompt] if isinstance(prompt, str) else [m.get("content") for m in prompt if m.get("role") == "user"]
    folded = (
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts if isinstance(text, str)
    )
    return {hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in folded if text}


def trained_problems(rows: Iterable[Row]) -> set[bytes]:
    """The keys of all prompts, and of what users ask in the course of a completion, which the model's next turn answers."""
    texts = ([row.prompt] if isinstance(row.completion, str) else [row.prompt, row.completion] for row in rows)
    return set().union(*(problem_keys(text) for of_row in texts for text in of_row))


def check_unseen(tasks: list[Prompt], trained: set[bytes], name: str, trained_name: str) -> None:
    """Refuses problems for evaluation that are trained on. Of messages the last of the user asks the problem: those before it may
    be worked examples, which all prompts share.

    Args:
        trained: the keys of the prompts that are trained on.

    Raises:
        UserError: with their number and the first of them.
    """
    seen = [task.source for task in tasks if problem_keys(_asked(task.prompt)) & trained]
    if seen:
        more = ", ..." if len(seen) > _NAMED else ""
        raise UserError(
            f"{len(seen):,} of {len(tasks):,} problems of {name} are prompts of {trained_name} too, up to case and white space "
            f"({', '.join(seen[:_NAMED])}{more}): accuracy on them would not be that on new problems. Take them out of one of "
            "the two"
        )


def _asked(prompt: str | list[dict]) -> str | list[dict]:
    return prompt if isinstance(prompt, str) else [m for m in prompt if m.get("role") == "user"][-1:]
