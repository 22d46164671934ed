"""When memory runs out: the same work again in smaller batches, on which its result does not depend."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dqo.errors import UserError, is_out_of_memory

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

LESS = "--gradient_checkpointing, --bf16 and --use_peft save memory, and so does a shorter --max_length"


def peak_gb() -> float:
    """Of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def ran_out(device: Any, tokens: int) -> str:
    """What happened, for a message."""
    return f"out of memory on {device} (peak {peak_gb():.1f} GB) with micro-batches of up to {tokens:,} tokens"


def in_memory(
    work: Callable[[int], Found],
    tokens: int,
    smaller: Callable[[int], int | None],
    what: str,
    device: Any,
    remark: str = "the result does not depend on their size",
) -> Found:
    """`work(tokens)`; where memory runs out, again from the same random state with fewer tokens in a micro-batch.

    Args:
        tokens: the most that a micro-batch has. smaller: the next number, None where every micro-batch is as small as it can be.
        what: names the work in messages. remark: what the new size changes.

    Raises:
        UserError: one line with the cure, where nothing smaller is left.
    """
    first, message, random = tokens, "", _random_state()
    while True:
        try:
            found = work(tokens)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = message or ran_out(device, tokens)
        # here, where no traceback holds the tensors of what failed
        less = smaller(tokens)
        if less is None:
            alone = "although each holds one response, or those that stay together"
            raise UserError(f"{what}: {ran_out(device, tokens)}, {alone}. {LESS}")
        tokens = less
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _set_random_state(random)
    if tokens != first:
        logger.warning(
            "%s: %s. It was done again with up to %s, as all that follows; %s. Begin with --max_batch_tokens %d",
            what,
            message,
            f"{tokens:,}",
            remark,
            tokens,
        )
    return found


def _random_state() -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
