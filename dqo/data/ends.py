"""The tokens that end a response: the one that is trained, and all at which sampling stops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dqo.errors import UserError

_CONTENT = "dqoanswer"  # of an assistant's message, to find what a template writes after it


@dataclass(frozen=True)
class Ends:
    trained: int  # appended to responses that ended
    stops: frozenset[int]  # any of them ends a response; `trained` is one


def ends_of(tokenizer, stop_ids: Iterable[int] = (), messages: bool = False) -> Ends:
    """The ends of a model's responses.

    Args:
        stop_ids: those of the model's generation_config, see `dqo.models.named.stop_ids`.
        messages: whether prompts are messages. Then the end that is trained is the one that the chat template writes after an
            assistant's message; of strings, and where a template writes none, it is the tokenizer's EOS.

    Raises:
        UserError: when there is no end to train.
    """
    written = template_end(tokenizer)
    trained = written if messages and written is not None else tokenizer.eos_token_id
    if trained is None:
        raise UserError("the tokenizer has no eos_token; a response could never end")
    stops = {trained, tokenizer.eos_token_id, written, *stop_ids} - {None}
    return Ends(trained, frozenset(stops))


def template_end(tokenizer) -> int | None:
    """The first added token that the chat template writes after an assistant's message: Gemma's <end_of_turn>, ChatML's
    <|im_end|>. None when there is no template, or it writes none."""
    if not tokenizer.chat_template:
        return None
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception:  # a template may raise anything; rows that it refuses are named where they are rendered
        return None
    _, found, after = text.rpartition(_CONTENT)
    if not found:
        return None
    added = {token: text for token, text in tokenizer.added_tokens_decoder.items() if text.content in after}
    return next((token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in added), None)
