"""The one exception that means the user can mend it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: an option, a file, a row. The command line prints it and exits 2."""


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word most like `word`, or None when none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question to append, " Did you mean 'x'?", or "" when no known word is near."""
    match = closest(word, known)
    return f" Did you mean '{match}'?" if match else ""
