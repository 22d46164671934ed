"""Rows on tokens as packed arrays: tokenised once, in batches, by the tokenizers library's own threads.

A table holds what no option of a training changes but tokenizer and template: ids, where steps and turns end, stored
log-probabilities. Rewards stay with the rows, and what a response is paid is computed when it is read. It lies beside the table
of its rows (dqo.data.stored), a segment of tokens for each segment of rows, so that a preparation that was killed goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from typing import Any

import numpy as np

from dqo.data.chat import clock_at, reads_clock, template_text
from dqo.data.ends import Ends
from dqo.data.joined import JoinedSegments
from dqo.data.mixed import MixedRows
from dqo.data.rows import Row
from dqo.data.segments import Arrays, Segments, table_directory
from dqo.data.sources import BadRow
from dqo.data.stored import ROWS, StoredRows, hashes
from dqo.data.tokens import Chunk, Tokens, say_remarks, tokenize_chunk

FORMAT = 2  # of a segment, and of how rows become tokens


class TokenTable:
    """The n rows of a table of rows that could be placed on tokens, in their order, and why others could not.

    Args:
        row_begins: int64, the row of that table with which each segment begins.
    """

    def __init__(self, segments: Segments | JoinedSegments, row_begins: np.ndarray, ends: Ends):
        self.segments, self.row_begins, self.ends = segments, row_begins.tolist(), ends
        counts = [len(segment.arrays["row"]) for segment in segments]
        self._begins = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._begins[-1])

    def column(self, name: str) -> np.ndarray:
        """(n,) row (of the table of rows), prompt_length, length (both together), actions, first_action, truncated, prompt and
        response (hashes of the ids)."""
        if name != "row":
            return self.segments.column(name)
        parts = [segment.arrays["row"] + begin for begin, segment in zip(self.row_begins, self.segments)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def counts(self, name: str) -> np.ndarray:
        """int64 (n,): the lengths of lists: ids (two parts together), step_ends, turn_ends, logprobs, mask."""
        parts = [np.diff(segment.arrays[f"{name}_end"], prepend=0) for segment in self.segments]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def place(self, entry: int) -> tuple[Arrays, int]:
        """The segment that has an entry, and where in it."""
        number = int(np.searchsorted(self._begins, entry, "right")) - 1
        return self.segments[number].arrays, entry - int(self._begins[number])

    def tokens(self, entry: int, row: Row) -> Tokens:
        """An entry as it was made. `row`: its row, which may have the rewards of another."""
        arrays, i = self.place(entry)
        ids, prompt = piece(arrays, "ids", i).tolist(), int(arrays["prompt_length"][i])
        logprobs, mask = piece(arrays, "logprobs", i), piece(arrays, "mask", i)
        return Tokens(
            row,
            ids[:prompt],
            ids[prompt:],
            piece(arrays, "step_ends", i).tolist(),
            logprobs.tolist() if len(logprobs) else None,
            bool(arrays["truncated"][i]),
            piece(arrays, "turn_ends", i).tolist(),
            bool(arrays["open_end"][i]),
            mask.tolist() if len(mask) else None,
        )

    def problems(self, place_of: np.ndarray, rows: Sequence[Row]) -> list[BadRow]:
        """The rows that could not be placed on tokens. `place_of`: where each row of the table is among `rows`, -1: nowhere."""
        found = []
        for begin, segment in zip(self.row_begins, self.segments):
            for index, message in segment.header["problems"]:
                if (place := int(place_of[begin + index])) >= 0:
                    found.append(BadRow(place, rows[place].source, message))
        return found

    def say_remarks(self, place_of: np.ndarray) -> None:
        """Warns of what was cut off of some rows, and what was not read; `place_of` as in `problems`."""
        counts: dict[str, Counter[str]] = {"cuts": Counter(), "unread": Counter()}
        stopped = ended = 0
        for begin, segment in zip(self.row_begins, self.segments):
            chosen, remarks = place_of[begin : begin + ROWS] >= 0, segment.header["remarks"]
            for kind, found in counts.items():
                for what, of in remarks[kind].items():
                    found[what] += int(chosen[of].sum())
            stopped += int(chosen[remarks["stopped"]].sum()) if remarks["stopped"] else 0
            ended += int(chosen[remarks["ended"]].sum()) if remarks["ended"] else 0
        say_remarks(+counts["cuts"], +counts["unread"], stopped, ended, self.ends)


def piece(arrays: Arrays, name: str, i: int) -> np.ndarray:
    """The i-th of the lists that are packed under a name."""
    ends = arrays[f"{name}_end"]
    return arrays[name][ends[i - 1] if i else 0 : ends[i]]


def token_table(
    rows: StoredRows, tokenizer, ends: Ends, vocab_size: int, template_time: datetime.datetime | None = None
) -> TokenTable:
    """All rows of the table that `rows` are of on tokens, from the disk where they are.

    Raises:
        UserError: when the disk is full.
    """
    if isinstance(rows, MixedRows):
        tables = [token_table(table, tokenizer, ends, vocab_size, template_time) for table in rows.tables]
        return TokenTable(JoinedSegments(*(table.segments for table in tables)), rows.segment_begins, ends)
    directory = None
    if rows.root is not None and (told := _described(tokenizer, template_time)) is not None:
        depends = [FORMAT, rows.segments.directory and rows.segments.directory.name, told, ends.trained]
        directory = table_directory(rows.root, "tokens", *depends, sorted(ends.stops), vocab_size)
    segments, whole = Segments(directory), StoredRows(rows.segments, rows.total)
    if segments.whole() is None:
        with segments.alone():
            if segments.whole() is None:  # another process may have written it meanwhile
                with clock_at(template_time):
                    for number, begin in enumerate(range(0, rows.total, ROWS)):
                        if segments.find(number) is None:
                            with uncollected():
                                chunk = tokenize_chunk(whole[begin : begin + ROWS], tokenizer, ends, vocab_size)
                                segments.put(number, *_packed(chunk))
                segments.finish({})
    return TokenTable(segments, rows.segment_begins, ends)


def _described(tokenizer, template_time: datetime.datetime | None) -> Any:
    """What ids depend on; None for a tokenizer that cannot be told from another, and a template that reads the clock."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or (template_time is None and reads_clock(tokenizer)):
        return None
    described = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return [
        type(tokenizer).__name__,
        hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest(),
        template_text(tokenizer),
        {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        bool(getattr(tokenizer, "split_special_tokens", False)),
        None if template_time is None else template_time.isoformat(),
        version("tokenizers"),
        version("transformers"),
    ]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, which looks at all that was imported whenever some thousand lists of ids are made."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def response_bytes(completion: list[int] | np.ndarray, env_mask: Sequence[Any] | np.ndarray | None) -> bytes:
    """Equal for equal completions in which the model wrote the same tokens."""
    mask = b"" if env_mask is None else np.asarray(env_mask, np.bool_).tobytes()
    return np.asarray(completion, np.int32).tobytes() + mask


def _packed(chunk: Chunk) -> tuple[Arrays, dict[str, Any]]:
    made = [tokens for _, tokens in chunk.found]
    ids = _ragged("ids", [part for t in made for part in (t.prompt, t.completion)], np.int32, 2)
    prompts, responses = [], []
    for tokens, end in zip(made, ids["ids_end"].tolist()):
        begin = end - len(tokens.completion)
        prompts.append(ids["ids"][end - tokens.length : begin].tobytes())
        responses.append(response_bytes(ids["ids"][begin:end], tokens.env_mask))
    arrays = {
        "row": np.array([index for index, _ in chunk.found], np.int32),
        "prompt_length": np.array([len(tokens.prompt) for tokens in made], np.int32),
        "length": np.array([tokens.length for tokens in made], np.int32),
        "actions": np.array([len(t.completion) if t.env_mask is None else sum(t.env_mask) for t in made], np.int32),
        "first_action": np.array([tokens.first_action for tokens in made], np.int32),
        "truncated": np.array([tokens.truncated for tokens in made], np.bool_),
        "open_end": np.array([tokens.open_end for tokens in made], np.bool_),
        "prompt": hashes(prompts),
        "response": hashes(responses),
        **ids,
        **_ragged("step_ends", [tokens.step_ends for tokens in made], np.int32),
        **_ragged("turn_ends", [tokens.turn_ends for tokens in made], np.int32),
        **_ragged("logprobs", [tokens.logprobs or [] for tokens in made], np.float32),
        **_ragged("mask", [tokens.env_mask or [] for tokens in made], np.uint8),
    }
    problems = [[problem.index, problem.message] for problem in chunk.problems]
    return arrays, {"problems": problems, "remarks": asdict(chunk.remarks)}


def _ragged(name: str, lists: list, dtype: Any, together: int = 1) -> Arrays:
    """Lists one behind the other, and where each ends; `together`: so many make one."""
    ends = np.cumsum([len(part) for part in lists], dtype=np.int64)[together - 1 :: together]
    return {name: np.fromiter(chain.from_iterable(lists), dtype), f"{name}_end": ends}
