"""Completions of several turns on tokens: which of them the model wrote, and where its turns end.

The text is cut where a turn begins and where it ends, and the pieces are tokenised apart and joined as ids, as a sampler joins
them; stored ids are used as they are. What follows the last turn is cut off: no return needs it.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

from dqo.data.chat import Completion, opened_once, rendered
from dqo.data.ends import Ends
from dqo.data.ids import Continuation, Specials, clean_completion
from dqo.data.rows import Row
from dqo.errors import UserError

_CURE = "store the ids that the sampler saw: prompt_ids, completion_ids and env_mask"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
TAG = "a tag that opens the reasoning and ends the prompt already"
ANSWERED = "what the environment wrote after the last turn of the model"


class Piece(NamedTuple):
    text: str
    of_model: bool


@dataclass(slots=True)
class Pieces:
    pieces: list[Piece]  # the last is the model's
    answered: bool  # the environment had the last word, which is cut off: nothing is missing behind the last turn


@dataclass(slots=True)
class Trajectory:
    ids: list[int]  # the last is the model's
    env_mask: list[int]  # 1 where the model wrote the token
    turn_ends: list[int]  # of each turn the index of its last token among those of the model
    answered: bool

    def end_with(self, token: int) -> None:
        """One more token of the last turn."""
        self.ids.append(token)
        self.env_mask.append(1)
        self.turn_ends[-1] += 1

    def begin_at(self, position: int) -> None:
        """Cuts off the first tokens of the first turn."""
        del self.ids[:position], self.env_mask[:position]
        self.turn_ends = [end - position for end in self.turn_ends]

    def empty_turn(self) -> int | None:
        """The number of the first turn without a token, from 1."""
        lengths = (end - before for before, end in pairwise([-1, *self.turn_ends]))
        return next((number for number, length in enumerate(lengths, 1) if length <= 0), None)


def is_trajectory(row: Row) -> bool:
    """Whether some of the completion's tokens are the environment's."""
    several = isinstance(row.completion, list) and len(row.completion) > 1
    return row.env_mask is not None or (row.completion_ids is None and (several or row.turn_spans is not None))


def pieces_of(tokenizer, row: Row, prompt: str, end: str, cuts: Counter) -> Pieces:
    """The row's text after that of the prompt, cut between the model and its environment.

    Args:
        end: the text of the end token that is trained; the chat template ends a turn with it.
        cuts: counts what is cut off.

    Raises:
        UserError: when the template's text does not tell what the model wrote.
    """
    if row.turn_spans is not None:
        assert isinstance(row.completion, str)  # has been checked
        found = _cut(row.completion, row.turn_spans)
        begun = opened_once(prompt, Completion(found.pieces[0].text))
        if found.pieces[0].of_model and begun.shift:
            cuts[TAG] += 1
            found.pieces[0] = Piece(begun.text, True)
    else:
        text, spans = _turns_of_messages(tokenizer, row, prompt, end)
        found = _cut(text[len(prompt) :], [(begin - len(prompt), stop - len(prompt)) for begin, stop in spans])
        assert isinstance(row.completion, list)
        found.answered = row.completion[-1]["role"] != "assistant"  # what templates write after a turn is no answer
        last = found.pieces[-1].text
        if row.finish_reason == "length" and not found.answered and last.endswith(end):
            found.pieces[-1] = Piece(last.removesuffix(end), True)  # the template's; the response did not end
    if found.answered:
        cuts[ANSWERED] += 1
    for number, piece in enumerate((piece for piece in found.pieces if piece.of_model), 1):
        if not piece.text:
            raise UserError(f"turn {number} of the model has no text, as it is written; drop the row, or {_CURE}")
    return found


def _cut(text: str, spans: list[tuple[int, int]]) -> Pieces:
    pieces, position = [], 0
    for begin, stop in spans:
        if begin > position:
            pieces.append(Piece(text[position:begin], False))
        pieces.append(Piece(text[begin:stop], True))
        position = stop
    return Pieces(pieces, answered=bool(text[position:].strip()))


def _turns_of_messages(tokenizer, row: Row, prompt: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """All that the template writes, and the spans of the completion's turns in it, each with its end token."""
    assert isinstance(row.prompt, list) and isinstance(row.completion, list)  # has been checked
    first, messages = len(row.prompt), [*row.prompt, *row.completion]
    if messages[first - 1]["role"] == "assistant":
        raise UserError(
            "prompt ends in a message of assistant, and completion has several messages: where one goes over into the other "
            f"cannot be told; move that message into completion, or {_CURE}"
        )
    template = tokenizer.get_chat_template(None, row.tools)
    if _MARKS.search(template):
        text, spans = _marked(tokenizer, row, messages, template)
        spans = [(max(begin, len(prompt)), stop) for begin, stop in spans if stop > len(prompt)]
        turns = sum(message["role"] == "assistant" for message in messages[first:])
        if len(spans) != turns:
            raise UserError(
                f"the chat template marks {len(spans)} pieces as generated in the completion, which has {turns} messages of "
                f"assistant; {_CURE}"
            )
        heads = [prompt]
    else:
        text, spans, heads = rendered(tokenizer, row, messages), [], []
        for i in range(first, len(messages)):
            if messages[i]["role"] == "assistant":
                head = rendered(tokenizer, row, messages[:i], add_generation_prompt=True)
                whole = rendered(tokenizer, row, messages[: i + 1])
                if end in whole[len(head) :]:
                    whole = whole[: whole.rindex(end) + len(end)]
                else:  # white space that the template puts there is not the model's
                    content, kept = messages[i].get("content", ""), whole.rstrip()
                    spaces = content[len(content.rstrip()) :]
                    whole = kept + spaces if whole.startswith(kept + spaces) else kept
                spans.append((len(head), len(whole)))
                heads += [head, whole]
    for i, head in enumerate(heads):
        if not text.startswith(head):
            raise UserError(
                f"turn {i // 2 + 1} of the assistant: what the chat template writes up to it is not the beginning of what it "
                f"writes for the whole conversation, so its tokens are not those that the sampler saw; {_CURE}"
            )
    spans = [_with_end(text, begin, stop, end) for begin, stop in spans]
    own = (message for message in messages[first:] if message["role"] == "assistant")
    for turn, (message, (begin, stop)) in enumerate(zip(own, spans), 1):
        if message.get("content", "").strip() not in text[begin:stop]:
            raise UserError(f"the chat template changes the content of turn {turn} of the assistant; {_CURE}")
    return text, spans


def _with_end(text: str, begin: int, stop: int, end: str) -> tuple[int, int]:
    """The span up to its end token, which the marks may leave out, or go beyond."""
    if end in text[begin:stop]:
        return begin, text.rindex(end, begin, stop) + len(end)
    return begin, stop + len(end) if text.startswith(end, stop) else stop


def _marked(tokenizer, row: Row, messages: list[dict], template: str) -> tuple[str, list[tuple[int, int]]]:
    """What the template writes, and the character spans between its {% generation %} and {% endgeneration %}."""
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template  # its types leave out the spans
    names = {**tokenizer.special_tokens_map, **(row.chat_template_kwargs or {})}
    try:
        (text,), (spans,) = render(
            [messages], tools=row.tools, chat_template=template, return_assistant_tokens_mask=True, **names
        )
    except Exception as error:  # a template may raise anything
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the chat template refuses the messages: {what}") from error
    return text, spans


def encoded(continuation: Continuation, rows: list[Pieces], last: list[int | None]) -> list[Trajectory]:
    """The pieces of each row on tokens; `last` are the last ids of their prompts."""
    made = [Trajectory([], [], [], row.answered) for row in rows]
    for round_ in range(max((len(row.pieces) for row in rows), default=0)):
        open_ = [i for i, row in enumerate(rows) if len(row.pieces) > round_]
        before = [made[i].ids[-1] if made[i].ids else last[i] for i in open_]
        for i, (ids, _) in zip(
            open_, continuation([rows[i].pieces[round_].text for i in open_], before, offsets=False)
        ):
            of_model = rows[i].pieces[round_].of_model
            made[i].ids += ids
            made[i].env_mask += [int(of_model)] * len(ids)
            if of_model:
                made[i].turn_ends.append(sum(made[i].env_mask) - 1)
    return made


def of_stored_ids(row: Row, ends: Ends, specials: Specials, cuts: Counter) -> tuple[Trajectory, list[float] | None]:
    """Stored ids and their log-probabilities up to the end of the last turn. `cuts` counts what is cut off.

    Raises:
        UserError: when a turn goes on after an end token.
    """
    ids, mask = row.completion_ids, row.env_mask
    assert ids is not None and mask is not None  # the caller has looked
    runs = [(of_model, len(list(run))) for of_model, run in groupby(mask)]
    stops = list(accumulate(length for _, length in runs))
    turns = [(stop - length, stop) for (of_model, length), stop in zip(runs, stops) if of_model]
    for begin, stop in turns[:-1]:
        _refuse_end(ids, begin, stop - 1, ends)
    begin, stop = turns[-1]
    tail = set(ids[stop:])
    answered = bool(tail - ends.stops - {specials.pad})
    if tail:
        cuts[ANSWERED if answered else "what follows the end of completion_ids"] += 1
    logprobs = None if row.logprobs is None else row.logprobs[begin:stop]
    own = dataclasses.replace(specials, adds_bos=False)
    turn, logprobs = clean_completion(ids[begin:stop], logprobs, row.finish_reason == "length", ends, own, cuts, begin)
    if not turn:
        raise UserError("the last turn that env_mask marks in completion_ids is padding alone; give it zeros there")
    mask = [*mask[:begin], *[1] * len(turn)]
    turn_ends = [sum(mask[:stop]) - 1 for _, stop in turns]
    logprobs = None if row.logprobs is None or logprobs is None else [*row.logprobs[:begin], *logprobs]
    return Trajectory([*ids[:begin], *turn], mask, turn_ends, answered), logprobs


def _refuse_end(ids: list[int], begin: int, stop: int, ends: Ends) -> None:
    """Refuses an end token among the tokens of a turn but its last."""
    for i in range(begin, stop):
        if ids[i] in ends.stops:
            raise UserError(
                f"completion_ids has the end token {ids[i]} at position {i}, and the turn goes on after it; cut it there, give "
                "the rest zeros in env_mask, or drop the row"
            )
