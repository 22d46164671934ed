"""Cleans token ids: no padding, one BOS, one end token. And tokenises a text that continues another."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from dqo.data.ends import Ends
from dqo.errors import UserError

IDS_ALONE = {"return_attention_mask": False, "return_token_type_ids": False}  # what nothing reads takes time and memory
AT_ONCE = 512  # texts: the library takes 100 bytes for each of their tokens until their ids are read
Some = TypeVar("Some")
_PREFIXES = ("\u2581", "\u0120")  # a space's piece, of sentencepiece and of byte-level tokenizers


@dataclass(frozen=True, slots=True)
class Specials:
    """The special tokens that a tokenizer puts at the beginning and the end of a text."""

    pad: int | None
    bos: int | None
    eos: int | None
    adds_bos: bool
    adds_eos: bool

    @classmethod
    def of(cls, tokenizer) -> Specials:
        pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        before, after = whole[:at], whole[at + len(plain) :]
        return cls(pad, bos, eos, bos is not None and bos in before, eos is not None and eos in after)


def clean_prompt(ids: list[int], stored: bool, of_template: bool, specials: Specials, cuts: Counter) -> list[int]:
    """Ids of a prompt without padding (of stored ids), a repeated BOS, and a tokenizer's end token. `cuts` counts them."""
    found = ids
    if stored:
        begin = _run(found, specials.pad)
        if begin and specials.pad == specials.bos:  # one is the beginning itself
            begin -= 1
        end = len(found) - _run(found[::-1], specials.pad)
        if specials.pad == specials.eos and end == len(found) - 1 and not specials.adds_eos:
            end += 1  # one may be the prompt's own
        if begin or end < len(found):
            cuts["padding of prompt_ids"] += 1
            found = found[begin:end]
    repeated = _run(found, specials.bos) - 1
    if repeated > 0:
        cuts["a second BOS of the prompt"] += 1
        found = found[repeated:]
    if specials.adds_eos and not of_template and found and found[-1] == specials.eos:
        cuts["the EOS that the tokenizer appends to the prompt"] += 1
        found = found[:-1]
    return found


def clean_completion(
    ids: list[int],
    logprobs: list[float] | None,
    cut: bool,
    ends: Ends,
    specials: Specials,
    cuts: Counter,
    before: int = 0,
) -> tuple[list[int], list[float] | None]:
    """Stored ids of a completion, or of its last turn, and their log-probabilities, up to the first end. `cut`: the response did
    not end. `before`: ids of the completion before these.

    Raises:
        UserError: when the response goes on after an end.
    """
    begin, end = 0, len(ids)
    if specials.adds_bos and logprobs is None and ids[0] == specials.bos and specials.bos not in ends.stops:
        cuts["the BOS of completion_ids"] += 1  # tokenised apart, with special tokens; no sampler writes one
        begin = 1
    pads = ends.stops | ({specials.pad} - {None})
    while end > begin and ids[end - 1] in pads:
        end -= 1
    first = next((i for i in range(begin, end) if ids[i] in ends.stops), None)
    if first is not None:
        raise UserError(
            f"completion_ids has the end token {ids[first]} at position {before + first}, and goes on after it; cut it there, or "
            "drop the row"
        )
    tail = ids[end:]
    if cut:  # one end token is what a sampler wrote; more are padding
        end += len(tail) == 1 and tail[0] in ends.stops
    else:
        end += next((i + 1 for i, token in enumerate(tail) if token in ends.stops), 0)
    if end < len(ids):
        cuts["what follows the end of completion_ids"] += 1
    return ids[begin:end], None if logprobs is None else logprobs[begin:end]


def _run(ids: list[int], token: int | None) -> int:
    """How many of the first ids are `token`."""
    return next((i for i, other in enumerate(ids) if other != token), len(ids))


def at_once(items: list[Some]) -> Iterator[list[Some]]:
    """Texts, or their indices, as many as are tokenised together."""
    return (items[begin : begin + AT_ONCE] for begin in range(0, len(items), AT_ONCE))


class Continuation:
    """Tokenises texts as they continue a prompt: without the space that sentencepiece puts before a text's first word."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.added = set(tokenizer.added_tokens_decoder)
        self.backend, self.everywhere = _without_prefix(tokenizer)

    def __call__(
        self, texts: list[str], last: list[int | None], offsets: bool
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character spans (where `offsets`) of texts; `last` are the last ids of their prompts."""
        found: list = [None] * len(texts)
        plain = [i for i in range(len(texts)) if self.backend is None or (self.everywhere and last[i] in self.added)]
        for some in at_once(plain):
            encoded = self.tokenizer(
                [texts[i] for i in some], add_special_tokens=False, return_offsets_mapping=offsets, **IDS_ALONE
            )
            spans = encoded["offset_mapping"] if offsets else [[]] * len(some)
            for i, ids, span in zip(some, encoded["input_ids"], spans):
                found[i] = (list(ids), span)
        for some in at_once(sorted(set(range(len(texts))) - set(plain))):
            encode = self.backend.encode_batch if offsets else self.backend.encode_batch_fast
            for i, encoding in zip(some, encode([texts[i] for i in some], add_special_tokens=False)):
                found[i] = (encoding.ids, encoding.offsets if offsets else [])
        return found


def _without_prefix(tokenizer) -> tuple[Any, bool]:
    """A tokenizers.Tokenizer like the tokenizer's own that puts no space before a text, None when that puts none either; and
    whether the tokenizer puts one after every added token too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    first = (tokenizer.tokenize(text)[:1] for text in ("a", "1"))
    if backend is None or not any(piece.startswith(_PREFIXES) for pieces in first for piece in pieces):
        return None, False
    from tokenizers import Tokenizer

    described = json.loads(backend.to_str())
    schemes: set[str] = set()
    for part in ("normalizer", "pre_tokenizer"):
        described[part] = _never(described[part], schemes)
    copy = Tokenizer.from_str(json.dumps(described))
    copy.no_padding()
    copy.no_truncation()
    return copy, "always" in schemes


def _never(part: Any, schemes: set[str]) -> Any:
    """The description of a tokenizer's part without what puts a space first; `schemes` gets how it did."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        name = next(key for key in part if key != "type")
        inner = [_never(member, schemes) for member in part[name]]
        return {**part, name: [member for member in inner if member is not None]}
    if part["type"] == "Prepend":
        schemes.add("always")
        return None
    if part["type"] == "Metaspace":
        schemes.add(part.get("prepend_scheme", "always"))
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and part["add_prefix_space"]:
        schemes.add("always")
        return {**part, "add_prefix_space": False}
    return part


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds to the one before it: alone, some tokenizers' tokens lose their leading space."""
    texts = []
    for i, token in enumerate(ids):
        before = tokenizer.decode(ids[i - 1 : i]) if i else ""
        both = tokenizer.decode(ids[max(i - 1, 0) : i + 1])
        texts.append(both[len(before) :] if both.startswith(before) else tokenizer.decode([token]))
    return texts
