"""Turns rows into token ids, and finds the tokens that end their steps and turns.

Prompt and completion are tokenised apart and joined as ids, so that no token straddles the boundary; stored ids are used as
they are, without padding. A response that ended has exactly one end token. Completions of several turns: dqo.data.trajectory.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dqo.data.chat import Completion, completion_after, opening, prompt_text, unread_rows
from dqo.data.ends import Ends
from dqo.data.ids import IDS_ALONE, Continuation, Specials, at_once, clean_completion, clean_prompt
from dqo.data.rows import Row, prompt_key, report
from dqo.data.sources import BadRow
from dqo.data.trajectory import TAG, Pieces, Trajectory, encoded, is_trajectory, of_stored_ids, pieces_of
from dqo.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tokens:
    """A row on tokens, before rewards and cuts."""

    row: Row
    prompt: list[int]
    completion: list[int]
    step_ends: list[int]  # among the tokens of the model, as turn_ends
    logprobs: list[float] | None  # one for each of completion
    truncated: bool
    turn_ends: list[int]  # the last token of each turn
    open_end: bool = False  # the last turn was cut before its end
    env_mask: list[int] | None = None  # 1 where the model wrote the token; None: everywhere

    @property
    def first_action(self) -> int:
        """The index of the first token of the completion that the model wrote."""
        return 0 if self.env_mask is None else self.env_mask.index(1)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


class Cuts(Counter[str]):
    """Counts what is cut off, and remembers of which rows. `row`: the index of the one at work."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.rows = 0, dict[str, list[int]]()

    def __setitem__(self, what: str, count: int) -> None:
        super().__setitem__(what, count)
        self.rows.setdefault(what, []).append(self.row)


@dataclass
class Remarks:
    """What is to be said of rows on tokens: indices of the rows, for each thing that is said."""

    cuts: dict[str, list[int]] = field(default_factory=dict)  # what was cut off
    unread: dict[str, list[int]] = field(default_factory=dict)  # keys that the chat template does not read
    stopped: list[int] = field(default_factory=list)  # stored ids whose finish_reason is "stop"
    ended: list[int] = field(default_factory=list)  # those of them that end in an end token or in padding


@dataclass
class Chunk:
    """Some rows on tokens. Indices count from the first of them."""

    found: list[tuple[int, Tokens]]
    problems: list[BadRow]
    remarks: Remarks


def tokenize_rows(
    rows: list[Row], tokenizer, ends: Ends, vocab_size: int, max_length: int, skip_bad_rows: bool = False
) -> list[Tokens]:
    """Each row on tokens; see `dqo.data.episodes.make_episodes`.

    Raises:
        UserError: naming the rows that cannot be placed on tokens; with `skip_bad_rows` only when none can.
    """
    chunk = tokenize_chunk(rows, tokenizer, ends, vocab_size)
    found = []
    for index, tokens in chunk.found:
        if (problem := too_long(tokens, max_length)) is None:
            found.append(tokens)
        else:
            chunk.problems.append(BadRow(index, tokens.row.source, problem))
    refuse_rows(chunk.problems, len(rows), len(found), skip_bad_rows)
    remarks = chunk.remarks
    say_remarks(
        {what: len(of) for what, of in remarks.cuts.items()},
        {key: len(of) for key, of in remarks.unread.items()},
        len(remarks.stopped),
        len(remarks.ended),
        ends,
    )
    return found


def tokenize_chunk(rows: Sequence[Row], tokenizer, ends: Ends, vocab_size: int) -> Chunk:
    """Rows on tokens, whatever their length, and what is to be said of them."""
    problems: list[BadRow] = []
    cuts, specials = Cuts(), Specials.of(tokenizer)
    found = []
    for index, row, prompt, completion, encoding in _encoded(rows, tokenizer, ends, specials, cuts, problems):
        cuts.row = index
        try:
            found.append(
                (index, _tokens(row, prompt, completion, encoding, tokenizer, ends, specials, cuts, vocab_size))
            )
        except UserError as error:
            problems.append(BadRow(index, row.source, str(error)))
    remarks = Remarks(cuts.rows, unread_rows(tokenizer, rows))
    for i, row in enumerate(rows):
        if row.completion_ids is not None and row.finish_reason == "stop":
            remarks.stopped.append(i)
            if row.completion_ids[-1] in ends.stops or row.completion_ids[-1] == tokenizer.pad_token_id:
                remarks.ended.append(i)
    return Chunk(found, problems, remarks)


def refuse_rows(problems: list[BadRow], total: int, fit: int, skip_bad_rows: bool) -> None:
    """Raises for rows that cannot be placed on tokens, or says that they are dropped."""
    if not problems:
        return
    message = report("the data", problems, total)
    if not skip_bad_rows or not fit:
        raise UserError(message)
    logger.warning("%s\nThey are dropped; %d rows are left", message, fit)


def too_long(tokens: Tokens, max_length: int) -> str | None:
    """Why a row has no action among its first tokens; None where it has."""
    if len(tokens.prompt) >= max_length:
        return f"prompt has {len(tokens.prompt)} tokens, max_length is {max_length}; raise --max_length or drop the row"
    first = len(tokens.prompt) + tokens.first_action
    if first >= max_length:
        return (
            f"the model's first token comes after {first} others, max_length is {max_length}; raise --max_length or drop "
            "the row"
        )
    return None


def prompt_ids(tokenizer, texts: list[str], of_template: list[bool]) -> list[list[int]]:
    """Ids of the texts of prompts. A template has written the special tokens; around strings the tokenizer puts its own."""
    found: dict[tuple[bool, str], list[int]] = {}
    for templated in (False, True):
        for some in at_once(list({text: None for text, own in zip(texts, of_template) if own == templated})):
            encoded = tokenizer(some, add_special_tokens=not templated, **IDS_ALONE)["input_ids"]
            found |= {(templated, text): list(ids) for text, ids in zip(some, encoded)}
    return [found[templated, text] for text, templated in zip(texts, of_template)]


def state_ids(tokenizer, texts: list[str], of_template: list[bool]) -> list[list[int]]:
    """Ids of the texts of prompts, the same as in training."""
    specials = Specials.of(tokenizer)
    found = prompt_ids(tokenizer, texts, of_template)
    return [clean_prompt(ids, False, own, specials, Counter()) for ids, own in zip(found, of_template)]


def string_prompt_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of prompts that are strings, the same as in training."""
    return state_ids(tokenizer, texts, [False] * len(texts))


def _encoded(rows: Sequence[Row], tokenizer, ends: Ends, specials: Specials, cuts: Cuts, problems: list[BadRow]):
    """(index, row, ids of the prompt, its completion's text, that text's ids and spans) of every row that can be written. Of
    several turns the text is None, and a Trajectory stands in the place of ids and spans."""
    end = tokenizer.convert_ids_to_tokens(ends.trained)
    prompts: dict[str, str] = {}  # the template writes each once
    kept: list[tuple[int, Row, str | None, Completion | Pieces | None]] = []
    for i, row in enumerate(rows):
        cuts.row = i
        needs_text = row.completion_ids is None or row.steps is not None
        prompt: str | None
        try:
            if row.prompt_ids is not None:
                prompt = tokenizer.decode(row.prompt_ids) if needs_text else None
            else:
                key = prompt_key(row)
                if key not in prompts:
                    prompts[key] = prompt_text(tokenizer, row)
                prompt = prompts[key]
            text: Completion | Pieces | None = None
            if needs_text and prompt is not None:
                several = is_trajectory(row)
                text = (
                    pieces_of(tokenizer, row, prompt, end, cuts)
                    if several
                    else completion_after(tokenizer, row, prompt, end)
                )
            kept.append((i, row, prompt, text))
        except UserError as error:
            problems.append(BadRow(i, row.source, str(error)))
    written = [(prompt, not isinstance(row.prompt, str)) for _, row, prompt, _ in kept if row.prompt_ids is None]
    made = iter(prompt_ids(tokenizer, *map(list, zip(*written))) if written else [])
    ids = []
    for cuts.row, row, _, _ in kept:
        found = list(next(made) if row.prompt_ids is None else row.prompt_ids)
        ids.append(clean_prompt(found, row.prompt_ids is not None, not isinstance(row.prompt, str), specials, cuts))
    texts = {i: text for i, (*_, text) in enumerate(kept) if isinstance(text, Completion)}
    pieces = {i: text for i, (*_, text) in enumerate(kept) if isinstance(text, Pieces)}
    continuation = Continuation(tokenizer)

    def last(members) -> list[int | None]:
        return [ids[i][-1] if ids[i] else None for i in members]

    spans = any(kept[i][1].steps for i in texts)
    encodings: dict = dict(zip(texts, continuation([text.text for text in texts.values()], last(texts), offsets=spans)))
    encodings |= dict(zip(pieces, encoded(continuation, list(pieces.values()), last(pieces))))
    for i, (index, row, *_) in enumerate(kept):
        yield index, row, ids[i], texts.get(i), encodings.get(i)


def _tokens(
    row: Row,
    prompt: list[int],
    completion: Completion | None,
    encoding: tuple | Trajectory | None,
    tokenizer,
    ends: Ends,
    specials: Specials,
    cuts: Counter,
    vocab_size: int,
) -> Tokens:
    logprobs, truncated = row.logprobs, row.finish_reason == "length"
    trajectory, (ids, spans) = (
        (encoding, (encoding.ids, [])) if isinstance(encoding, Trajectory) else (None, encoding or ([], []))
    )
    step_ends = [] if row.steps is None or completion is None else _step_ends(row.steps, completion.shift, spans)
    if row.completion_ids is not None:
        if row.env_mask is None:
            stored, logprobs = clean_completion(row.completion_ids, logprobs, truncated, ends, specials, cuts)
        else:
            trajectory, logprobs = of_stored_ids(row, ends, specials, cuts)
            stored = trajectory.ids
        if trajectory is None or trajectory.env_mask[0]:
            whole = len(stored)
            stored, logprobs = _opened_once(prompt, stored, logprobs, tokenizer, cuts)
            if trajectory is not None:
                trajectory.begin_at(whole - len(stored))
        if row.steps is not None and (stored[: len(ids)] != ids or len(stored) > len(ids) + 1):
            assert completion is not None  # it was written for the sake of the steps
            step_ends = _stored_step_ends(row, completion, stored, ends, tokenizer)
        ids = stored
    elif completion is not None and completion.shift < 0:
        cuts[TAG] += 1
    answered = trajectory is not None and trajectory.answered
    if not truncated and not answered and (not ids or ids[-1] not in ends.stops):
        if logprobs is not None:
            raise UserError(
                f"completion_ids do not end in EOS ({ends.trained}) although finish_reason is not 'length', and "
                "logprobs has no value for it; store the EOS and its log-probability, or set finish_reason"
            )
        if trajectory is not None:
            trajectory.end_with(ends.trained)
        ids = [*ids, ends.trained] if trajectory is None else trajectory.ids
    if not prompt:
        raise UserError("prompt has no tokens; the first action needs a state before it")
    if not ids:
        raise UserError("completion has no tokens")
    if max(prompt + ids) >= vocab_size:
        raise UserError(f"token id {max(prompt + ids)} >= vocabulary {vocab_size}: sampled with a different tokenizer?")
    turn_ends = [len(ids) - 1] if trajectory is None else trajectory.turn_ends
    if trajectory is not None and (empty := trajectory.empty_turn()) is not None:
        raise UserError(f"turn {empty} of the model has no tokens; drop the row")
    return Tokens(
        row,
        prompt,
        ids,
        step_ends if row.turn_rewards is None else turn_ends,
        logprobs,
        truncated,
        turn_ends,
        open_end=truncated and not answered and ids[-1] not in ends.stops,
        env_mask=None if trajectory is None else trajectory.env_mask,
    )


def _stored_step_ends(row: Row, completion: Completion, stored: list[int], ends: Ends, tokenizer) -> list[int]:
    """The last token of each step among stored ids that split the text otherwise than the tokenizer does."""
    assert row.steps is not None and row.completion_ids is not None
    written = stored[:-1] if stored[-1] in ends.stops else stored
    uncut = row.completion_ids if row.completion_ids[: len(written)] == written else written
    spelled = next((ids for ids in (written, uncut) if tokenizer.decode(ids) == completion.text), None)
    if spelled is None:
        raise UserError(
            "steps are character spans, but completion_ids are the ids of another text, so steps cannot be placed on tokens; "
            "drop steps and step_rewards, or drop completion_ids"
        )
    spans = decoded_spans(tokenizer, spelled)
    return [min(end, len(written) - 1) for end in _step_ends(row.steps, completion.shift, spans)]


def _step_ends(steps: list[tuple[int, int]], shift: int, spans: list[tuple[int, int]]) -> list[int]:
    """The last token that begins inside each step. A step that was cut off with the prompt's tag gets the first token."""
    ends, token = [], 0
    for _, end in steps:
        while token < len(spans) and spans[token][0] < end + shift:
            token += 1
        ends.append(max(token - 1, 0))
    return ends


def decoded_spans(tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """Character spans of ids in the text that they decode to, whether or not a tokenizer would write it so: a model samples
    other splits too. Tokens that are parts of one character have its span."""
    spans: list[tuple[int, int]] = []
    first, since, position = (
        0,
        0,
        0,
    )  # a window before the tokens whose text is not known yet: texts of ids depend on it
    for end in range(1, len(ids) + 1):
        known = tokenizer.decode(ids[first:since])
        text = tokenizer.decode(ids[first:end])
        if text.endswith("\ufffd") and end < len(ids):  # a part of a character
            continue
        after = position + len(text) - len(known)
        spans += [(position, after)] * (end - since)
        first, since, position = since, end, after
    return spans


def _opened_once(
    prompt: list[int], ids: list[int], logprobs: list[float] | None, tokenizer, cuts: Counter
) -> tuple[list[int], list[float] | None]:
    """Stored ids without a tag, such as <think>, that already ends the prompt, and without the white space after it."""
    before = tokenizer.decode(prompt[-8:])
    tag = opening(before)
    if tag is None:
        return ids, logprobs
    own = tokenizer(tag, add_special_tokens=False)["input_ids"]
    if ids[: len(own)] != own:
        return ids, logprobs
    cuts[TAG] += 1
    begin = len(own)
    gap = tokenizer(before[len(before.rstrip()) :], add_special_tokens=False)["input_ids"]
    if gap and ids[begin : begin + len(gap)] == gap:
        begin += len(gap)
    return ids[begin:], None if logprobs is None else logprobs[begin:]


def say_remarks(cuts: dict[str, int], unread: dict[str, int], stopped: int, ended: int, ends: Ends) -> None:
    """Warnings, by the numbers of rows."""
    if stopped and not ended:
        logger.warning(
            '0 of %d completions end in EOS (%d) although finish_reason is "stop"; it is added to each. Keep it in '
            "completion_ids, or sample with this tokenizer's EOS",
            stopped,
            ends.trained,
        )
    if cuts:
        logger.warning("cut off: %s", ", ".join(f"{what} ({count:,} rows)" for what, count in cuts.items()))
    if unread:
        named = ", ".join(f"{key!r} ({count:,} rows)" for key, count in sorted(unread.items()))
        what = "keys of messages, tools or chat_template_kwargs that the chat template does not read"
        logger.warning("not used: %s: %s", what, named)
