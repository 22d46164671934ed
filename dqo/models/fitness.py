"""Whether model, tokenizer and rows fit each other: from the configuration alone, and by trying the loaded model on a few tokens.

A model that is refused here would be trained wrongly without a sign of it, or die after work was done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dqo.data.episode import Episode
from dqo.data.rows import Row
from dqo.data.selection import EpisodeColumns
from dqo.data.stored import column
from dqo.errors import UserError, is_out_of_memory
from dqo.models.attention import unpacked
from dqo.models.policy import head_stats

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


@torch.no_grad()
def check_model(model: PreTrainedModel, ids: list[int], pad_id: int) -> None:
    """Refuses a model that cannot be trained here, by running it on `ids`, two tokens at least: what `check_trunk` refuses, and
    one that does more to its logits than a head."""
    check_trunk(model, ids, pad_id)
    check_head(model, ids)


@torch.no_grad()
def check_trunk(model: PreTrainedModel, ids: list[int], pad_id: int) -> None:
    """Refuses a model that differs from itself, changes its own weights, sees tokens to the right or another row of its batch, or
    has no gradient."""
    name, n = type(model).__name__, len(ids) // 2
    versions = [parameter._version for parameter in model.parameters()]
    with _readable_failure(name), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        whole = _hidden(model, [ids])[0]
        torch.manual_seed(1)
        again = _hidden(model, [ids])[0]
        alone = _hidden(model, [ids[:n]])[0]
        padded = _hidden(model, [ids, ids[:n] + [pad_id] * (len(ids) - n)])
    if [parameter._version for parameter in model.parameters()] != versions:
        raise UserError(f"{name} changes its own weights in a forward pass; it is not supported")
    # rounding between batches of other shapes, and between two equal ones
    shapes, equals = (1e-3, 1e-5) if model.dtype == torch.float32 else (0.1, 0.02)
    if (found := _apart(again, whole)) > equals:
        raise UserError(
            f"{name} gives one row two results (hidden states differ by {found:.2g}, relatively): it draws random numbers even "
            "in evaluation mode, and a policy that differs from itself cannot be trained"
        )
    if (found := _apart(whole[:n], alone)) > shapes:
        cure = "; set is_decoder in its config.json" if getattr(model.config, "is_decoder", True) is False else ""
        raise UserError(
            f"{name} is not causal: its hidden states change with the tokens to their right (by {found:.2g}, relatively), so it "
            f"says nothing about the next token{cure}"
        )
    if (found := max(_apart(padded[0], whole), _apart(padded[1, :n], alone))) > shapes:
        raise UserError(
            f"{name} gives a row other hidden states in a padded batch than alone (by {found:.2g}, relatively); it is not "
            "supported"
        )
    _check_backward(model, ids)


@torch.enable_grad()
def _check_backward(model: PreTrainedModel, ids: list[int]) -> None:
    """Refuses a model that has no gradient in evaluation mode, in which models are trained here. The gradient is that of the
    embedded tokens: it passes through every layer, and takes no memory of the size of the weights."""
    embedded: list[Tensor] = []

    def note(_module: torch.nn.Module, _inputs: tuple, output: Tensor) -> None:
        if isinstance(output, Tensor):
            embedded.append(output if output.requires_grad else output.requires_grad_())

    hook = model.get_input_embeddings().register_forward_hook(note)
    try:
        with _readable_failure(type(model).__name__, " in evaluation mode, without dropout; it is not supported"):
            hidden = _hidden(model, [ids])
            if embedded and hidden.requires_grad:
                torch.autograd.grad(hidden.sum(), embedded, allow_unused=True)
    finally:
        hook.remove()


@torch.no_grad()
def check_adapter(model: PreTrainedModel, ids: list[int]) -> None:
    """Refuses a model that cannot be run with the adapters that it has: layers of its own kind look like linear ones to peft."""
    failure = _readable_failure(f"{type(model).__name__} with adapters", "; name other layers by --lora_target_modules")
    with failure, unpacked(model):
        _hidden(model, [ids])


def _hidden(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """(B, L, D)."""
    inputs = torch.tensor(rows, device=model.device)
    return model.base_model(input_ids=inputs, use_cache=False).last_hidden_state


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest relative distance of two hidden states of a position; in half precision the median, because there a router may
    choose another expert now and then."""
    distances = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-12)
    distances = distances.nan_to_num(torch.inf)
    return (distances.max() if found.dtype == torch.float32 else distances.median()).item()


_FAILURES = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def _readable_failure(name: str, cure: str = "; it is not supported") -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} cannot be run on token ids alone ({reason}){cure}") from error


@torch.no_grad()
def check_head(policy: PreTrainedModel, ids: list[int]) -> None:
    """Refuses a model whose logits are not softcap(factor * head(hidden)): its statistics would be silently wrong. `ids` are a
    few tokens, two at least: the logits of all of them are made, which nothing else does."""
    inputs = torch.tensor([ids], device=policy.device)
    with _readable_failure(type(policy).__name__):
        logits, actions = policy(input_ids=inputs, use_cache=False).logits[0, :-1], inputs[0, 1:]
        found = head_stats(policy, _hidden(policy, [ids])[0, :-1], actions).logprobs
    expected = logits.float().log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    difference = (found - expected).abs().max().item()
    rounding = 2 * torch.finfo(policy.dtype).eps * logits.abs().max().item()
    if not difference < 1e-3 + rounding:
        raise UserError(
            f"{type(policy).__name__} does more to its logits than a linear head, a factor and a softcap (log-probabilities "
            f"differ by {difference:.3g}); it is not supported"
        )
