"""The one exception that means the user can mend it."""

import difflib
from collections.abc import Iterable

# Characters that a terminal obeys instead of showing them: C0 and C1 controls, and those that turn the direction of text.
_CONTROLS = {*range(32), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS - set(map(ord, "\n\t"))}


def printable(text: str) -> str:
    """The text with control characters written out (\\x1b); line ends and tabs stay."""
    return text.translate(_ESCAPES)


class UserError(ValueError):
    """A mistake in what the user gave: an option, a file, a row. The command line prints it and exits 2. Its message may quote
    data: control characters are written out."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


# How torch, its libraries and C++ say that memory has run out where no type of exception does.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the machine. torch is not imported for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _NO_MEMORY)


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word most like `word`, or None when none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question to append, " Did you mean 'x'?", or "" when no known word is near."""
    match = closest(word, known)
    return f" Did you mean '{match}'?" if match else ""
