"""A response on its tokens, as training sees it: for a terminal with colours, or as plain text.

The prompt is dim, tokens of the response alternate in colour (plain: "│" between them), "║" ends a step, "{+0.5}" is what the
token before it is paid, "⟦ ⟧" hold what the environment wrote, which is read and is no action, a line break is shown as \\n too,
control characters as \\x1b. Long prompts and responses are cut in the middle.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from dqo.data.episode import Episode
from dqo.data.ids import token_texts
from dqo.errors import printable

_PROMPT, _HEAD, _TAIL = 60, 140, 60  # tokens shown: the prompt's last, the response's first and last
_DIM, _STEP, _PAID, _FINED, _OFF = "\x1b[2m", "\x1b[33;1m", "\x1b[32;1m", "\x1b[31;1m", "\x1b[0m"
_TOKENS = ("\x1b[36m", "\x1b[34m")
_EOS = "\x1b[7m"


def view(episode: Episode, tokenizer, colour: bool) -> str:
    """The prompt's end, and the response with step ends and the reward of every token that has one."""
    paint = _painted if colour else _plain
    ids, count = episode.completion_ids, len(episode.completion_ids)
    texts = [printable(text) for text in token_texts(tokenizer, ids)]
    ended = not episode.truncated
    of_model = [True] * count if episode.env_mask is None else episode.env_mask.tolist()
    ends = set(episode.actions[episode.step_ends].tolist())
    paid = np.zeros(count)
    paid[episode.actions] = episode.rewards
    parts, cut_out = [], count > _HEAD + _TAIL
    for i, text in enumerate(texts):
        if cut_out and _HEAD <= i < count - _TAIL:
            if i == _HEAD:
                hidden = paid[_HEAD : count - _TAIL].sum()
                parts.append(f"\n... {count - _HEAD - _TAIL:,} tokens, paid {hidden:+.4g} ...\n")
            continue
        style = _EOS if ended and i == count - 1 else _TOKENS[i % 2]
        separator = "│" if not colour and i + 1 < count and i not in ends and of_model[i + 1] else ""
        if not of_model[i]:  # one pair of brackets around all that lies between two turns
            style, separator = _DIM, ""
            first = i == 0 or of_model[i - 1] or (cut_out and i == count - _TAIL)
            last = of_model[i + 1] or (cut_out and i + 1 == _HEAD)  # the last token of all is the model's
            text = f"{'⟦' * first}{text}{'⟧' * last}"
        reward = paid[i]
        line_ends = text.endswith("\n")  # what the token is paid stands on its own line
        parts += [
            paint(text.removesuffix("\n").replace("\n", "\\n\n") + "\\n" * line_ends, style),
            paint(f"{{{reward:+.4g}}}", _PAID if reward > 0 else _FINED) if reward else "",
            paint("║", _STEP) if i in ends else separator,
            "\n" * line_ends,
        ]
    before = episode.prompt_ids[-_PROMPT:]
    cut = "... " if len(before) < len(episode.prompt_ids) else ""
    prompt = paint(cut + printable("".join(token_texts(tokenizer, before))), _DIM)
    last = "EOS" if ids[-1] == tokenizer.eos_token_id else texts[-1]
    end = f"ends in {last}" if ended else "does not end" + ("" if episode.terminated else ", bootstrapped")
    header = (
        f"{printable(episode.source)}: {'right' if episode.label else 'wrong'}, reward {episode.reward:g}, "
        f"{len(episode.prompt_ids):,} + {count:,} tokens{_turns(of_model)}, {end}; "
        f"tokens are paid {episode.rewards.sum():+.4g} together"
    )
    return f"{header}\n[prompt] {prompt}\n[response] {''.join(parts)}"


def _turns(of_model: list[bool]) -> str:
    if all(of_model):
        return ""
    turns = sum(own for own, _ in groupby(of_model))
    return f" in {turns} turn{'s' * (turns > 1)}, {of_model.count(False):,} of them the environment's"


def _painted(text: str, style: str) -> str:
    # line by line, so that a pager or a cut line leaves no colour behind
    return "\n".join(f"{style}{line}{_OFF}" if line else "" for line in text.split("\n"))


def _plain(text: str, style: str) -> str:
    return text
