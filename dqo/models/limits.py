"""Whether rows and prompts fit a model: its tokenizer, its vocabulary and its positions, by its configuration alone.

It imports no class of models, which takes seconds: `dqo check` needs none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedConfig

from dqo.data.episode import Episode
from dqo.data.rows import Row
from dqo.data.selection import EpisodeColumns
from dqo.data.stored import column
from dqo.errors import UserError

logger = logging.getLogger(__name__)

# No rotary positions and no table of them either: nothing ends at the number that their configurations give.
ENDLESS = {"inkling_text", "inkling2_text", "inkling2_loop_text", "jamba", "kimi_linear", "nemotron_h", "rwkv", "xglm"}
# The table's first rows are the pad token's and those before it.
AFTER_PAD = {"camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm", "xlm-roberta"}
AFTER_PAD |= {"xlm-roberta-xl", "xmod"}
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


def check_tokenizer(tokenizer, rows: Sequence[Row], config: PreTrainedConfig) -> None:
    """Refuses a tokenizer whose special tokens have no embedding, or which cannot place the rows' steps on tokens."""
    size = config.get_text_config().vocab_size
    for name in ("pad", "eos"):
        token, index = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        if index is not None and index >= size:
            raise UserError(
                f"the tokenizer's {name}_token {token!r} has id {index}, and the model has embeddings for ids below {size}: "
                "use the model's own tokenizer, choose one of its tokens, or enlarge the model by resize_token_embeddings"
            )
    stepped = [] if tokenizer.is_fast else np.flatnonzero(column(rows, "steps") >= 0).tolist()
    if stepped:
        raise UserError(
            f"{rows[stepped[0]].source}: steps are placed on tokens by their characters, which {type(tokenizer).__name__} does "
            "not report; use a fast tokenizer, or leave out steps and step_rewards"
        )


def position_limit(config: PreTrainedConfig) -> tuple[int | None, bool]:
    """How many positions the model was made for, None where its configuration has no such number; and whether it can be run on
    no more: learned and tabled positions end there, rotary ones, linear biases and recurrences do not."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in POSITIONS]
    limit = next((number for number in found if isinstance(number, int) and number > 0), None)  # XLNet says -1
    if limit is None:
        return None, False
    if text.model_type in AFTER_PAD:
        limit -= text.pad_token_id + 1 + (text.model_type == "prophetnet")  # which looks one position ahead
    rotary = getattr(text, "rope_parameters", None) is not None
    return limit, not (rotary or getattr(text, "alibi", False) or text.model_type in ENDLESS)


def check_positions(config: PreTrainedConfig, episodes: Sequence[Episode], cure: str | None = None) -> None:
    """Refuses episodes with more tokens than the model has positions; warns of more than it was trained on. `cure`: for the
    message; None: training's."""
    limit, hard = position_limit(config)
    lengths = EpisodeColumns(episodes).tokens
    longer = [] if limit is None else np.flatnonzero(lengths > limit).tolist()
    if not longer:
        return
    first = f"{episodes[longer[0]].source}: {lengths[longer[0]]:,} tokens of prompt and completion"
    if hard:
        cure = cure or f"drop the rows, or cut them: --max_length {limit} --allow_truncation"
        raise UserError(
            f"{first}, and the model has {limit:,} positions ({len(longer):,} of {len(episodes):,} responses are longer); {cure}"
        )
    logger.warning(
        "%s; the model was made for %s positions, and %s of %s responses are longer",
        first,
        f"{limit:,}",
        f"{len(longer):,}",
        f"{len(episodes):,}",
    )


def check_vocabulary(config: PreTrainedConfig, sources: list[str], states: list[list[int]]) -> None:
    """Refuses prompts, on tokens, that have one which the model does not have. `sources`: where each stands, for messages."""
    size = config.get_text_config().vocab_size
    for source, ids in zip(sources, states):
        if max(ids) >= size:
            raise UserError(
                f"{source}: the tokenizer writes it with token {max(ids):,}, and the model has {size:,}: they do not belong "
                "together, or the model was not resized after tokens were added"
            )


def check_room(
    config: PreTrainedConfig, sources: list[str], lengths: list[int], max_completion_length: int, hard: bool = False
) -> None:
    """Refuses prompts whose responses would need more positions than the model has; warns of more than it was trained on.

    Args:
        sources: where each prompt stands, for messages.
        lengths: tokens of each prompt.
        hard: whatever generates ends at the limit, also where the model could go on.
    """
    limit, ends = position_limit(config)
    if limit is None:
        return
    hard = hard or ends
    whole = [(s, n) for s, n in zip(sources, lengths) if n + max_completion_length > limit]
    refused = whole if hard else [(s, n) for s, n in whole if n >= limit]
    several = f" (the same of {len(refused) - 1:,} more)" if len(refused) > 1 else ""
    if refused:
        source, length = refused[0]
        left = limit - max(lengths)
        cure = f"--max_completion_length {left}" if left > 0 else "drop the prompts that are as long as that"
        raise UserError(
            f"{source}: {length:,} tokens of prompt and {max_completion_length:,} of the response (max_completion_length), and "
            f"the model has {limit:,} positions{several}; {cure}"
        )
    if whole:
        logger.warning(
            "%s: %s tokens of prompt and %s of the response (max_completion_length) are more than the %s positions that the "
            "model was made for (so are %s of %s prompts): what it writes beyond them may be poor",
            whole[0][0],
            f"{whole[0][1]:,}",
            f"{max_completion_length:,}",
            f"{limit:,}",
            f"{len(whole):,}",
            f"{len(lengths):,}",
        )
