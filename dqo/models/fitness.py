"""Whether model, tokenizer and rows fit each other: from the configuration alone, and by trying the loaded model on a few tokens.

A model that is refused here would be trained wrongly without a sign of it, or die after work was done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dqo.errors import UserError, is_out_of_memory
from dqo.models.attention import unpacked
from dqo.models.policy import head_stats

logger = logging.getLogger(__name__)


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
