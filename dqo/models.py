"""The policy and its forward pass on packed rows; real transformers classes throughout."""

from __future__ import annotations

import hashlib
import json
import logging

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from dqo.batches import Batch
from dqo.errors import UserError
from dqo_kernels import TokenStats, linear_token_stats

transformers_logging.disable_progress_bar()
logger = logging.getLogger(__name__)


def load_tokenizer(path: str):
    """A fast tokenizer with an EOS; padding uses EOS where there is no pad token (masks come from lengths)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path {path!r} has no tokenizer: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path!r} has no eos_token; a response could never end")
    if tokenizer.pad_token_id is None:
        logger.warning("the tokenizer of %s has no pad token: EOS pads, and masks come from lengths", path)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_ids(source: str | PreTrainedModel) -> list[int]:
    """End tokens of the generation_config of a model or of its directory or hub name; of one that transformers made from the
    model's config, none: there an id is often a class's default, and means nothing in the tokenizer."""
    if isinstance(source, str):
        try:
            config = GenerationConfig.from_pretrained(source)
        except (OSError, ValueError):  # most small models have none
            return []
    else:
        config = getattr(source, "generation_config", None)
    found = None if config is None or config._from_model_config else config.eos_token_id
    return [found] if isinstance(found, int) else list(found or ())


def vocabulary_size(path: str) -> int:
    """Rows of the model's head, from its config alone."""
    try:
        return AutoConfig.from_pretrained(path).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path {path!r} has no model config: {error}") from error


def load_policy(
    path: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal language model, dropout off: a policy that differs from itself has no log-ratio of 0."""
    try:
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attn_implementation)
    except (OSError, ValueError, ImportError) as error:  # the last: an attention whose package is missing
        raise UserError(f"{path!r} cannot be loaded as a causal language model: {error}") from error
    return ready(policy, device)


def ready(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Dropout off, and parameters in memory of their own: a file's mapping is not aligned, matrix kernels round differently on
    unaligned memory, and a continued run must equal an unbroken one bit for bit."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return disable_dropout(model).to(device)


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing. It is a matter of training mode; dropout is off in it too."""
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name that will stay
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    model.train()


def final_softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)


def hidden_positions(model: PreTrainedModel, batch: Batch, bf16: bool = False) -> Tensor:
    """(P, D): last hidden states of all positions of a batch, flattened; bfloat16 where `bf16`, from products in bfloat16."""
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=bf16):
        output = model.base_model(input_ids=batch.input_ids, use_cache=False, **batch.model_inputs)
    hidden = output.last_hidden_state.flatten(0, 1)
    return hidden.bfloat16() if bf16 else hidden


def head_of(model: PreTrainedModel, dtype: torch.dtype) -> dict:
    """weight, bias and softcap of the head in `dtype`, as the arguments of `dqo_kernels`' linear operations."""
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.to(dtype)
    return {"weight": head.weight.to(dtype), "bias": bias, "softcap": final_softcap(model)}


def _head_stats(policy: PreTrainedModel, hidden: Tensor, actions: Tensor) -> TokenStats:
    head = head_of(policy, hidden.dtype)
    return linear_token_stats(hidden, head.pop("weight"), actions, **head)


def policy_stats(policy: PreTrainedModel, batch: Batch, bf16: bool = False) -> TokenStats:
    """(N,) statistics of the rows; the head is applied to no other position."""
    return _head_stats(policy, hidden_positions(policy, batch, bf16)[batch.states], batch.actions)


@torch.no_grad()
def check_head(policy: PreTrainedModel, ids: list[int]) -> None:
    """Refuses a model whose logits are not softcap(head(hidden)): its statistics would be silently wrong. `ids` are a few tokens,
    two at least: the logits of all of them are made, which nothing else does."""
    inputs = torch.tensor([ids], device=policy.device)
    logits, actions = policy(input_ids=inputs, use_cache=False).logits[0, :-1].float(), inputs[0, 1:]
    expected = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    hidden = policy.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0, :-1]
    difference = (_head_stats(policy, hidden, actions).logprobs - expected).abs().max().item()
    if not difference < 1e-3:
        raise UserError(
            f"{type(policy).__name__} does more to its logits than a linear head and a softcap (log-probabilities differ by "
            f"{difference:.3g}); it is not supported"
        )


def weights_hash(model: PreTrainedModel) -> str:
    """sha256 of the parameters' names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def architecture_hash(model: PreTrainedModel) -> str:
    """sha256 of the configuration, without names and versions: the weights alone do not say how they are used."""
    told = model.config.to_dict()
    described = {k: v for k, v in told.items() if not k.startswith("_") and k not in ("transformers_version", "dtype")}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
