"""The policy and its forward pass on packed rows; real transformers classes throughout."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from dqo.data.batches import Batch
from dqo.errors import UserError
from dqo.models.adapters import adapter_base, merge
from dqo.models.architecture import disable_dropout, name_trunk
from dqo.models.named import load_config
from dqo.models.on_disk import empty_model, named_tensors, weight_files
from dqo_kernels import TokenStats, linear_token_stats

logger = logging.getLogger(__name__)

WITH_WEIGHTS = "with_weights"  # a method of a head that is sharded alone: calls a function while its weights are whole


def load_policy(
    path: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    four_bits: torch.dtype | None = None,
) -> PreTrainedModel:
    """A causal language model with nothing random in it: a policy must not differ from itself. An adapter is merged in.

    Args:
        four_bits: linear layers of the trunk are quantised to 4 bits, and compute in this type.

    Raises:
        UserError: for what cannot be loaded, and an adapter in 4 bits.
    """
    load_config(path)  # refuses what should not be loaded
    base = adapter_base(path)
    if base is not None:
        if four_bits is not None:
            raise UserError(f"{path} is an adapter of {base}, which load_in_4bit cannot merge: `dqo export` it first")
        logger.warning("%s is an adapter of %s: it is merged into it", path, base)
        return merge(load_policy(base, device, dtype, attn_implementation), path, base)
    weight_files(path)  # refuses a model that lacks one of several files
    more: dict[str, Any] = {}
    if four_bits is not None:
        as_qlora = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": four_bits,
        }
        more = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **as_qlora), "device_map": {"": device}}
    try:
        policy = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, **more
        )
    except SafetensorError as error:
        raise UserError(f"{path!r} has a file of weights that is cut or altered ({error}); fetch it again") from error
    except (OSError, ValueError, ImportError) as error:  # the last: an attention whose package is missing
        raise UserError(f"{path!r} cannot be loaded as a causal language model: {error}") from error
    return ready(policy, device)


def load_empty(path: str, dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel | None:
    """As `load_policy`, without memory: see models/on_disk.py. None where the files cannot be read by slices."""
    config = load_config(path)
    if adapter_base(path) is not None:
        return None
    model = empty_model(path, dtype, attn_implementation, config)
    return None if model is None else disable_dropout(name_trunk(model))


def ready(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Nothing random in it, its trunk known, parameters in memory of their own: a file's mapping is not aligned, kernels round
    differently on unaligned memory, and a continued run must equal an unbroken one bit for bit."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return disable_dropout(name_trunk(model)).to(device)  # type: ignore[arg-type]  # its wrapper has an untyped self


def final_softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def hidden_positions(model: PreTrainedModel, batch: Batch, bf16: bool = False) -> Tensor:
    """(P, D): last hidden states of all positions of a batch, flattened; bfloat16 where `bf16`, from products in bfloat16."""
    return hidden_and_router(model, batch, bf16, {})[0]


def hidden_and_router(
    model: PreTrainedModel, batch: Batch, bf16: bool, wanted: dict
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The hidden states, see `hidden_positions`, and with `wanted` {"output_router_logits": True} each layer's (P, experts)."""
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=bf16):
        output = model.base_model(input_ids=batch.input_ids, use_cache=False, **batch.model_inputs, **wanted)
    hidden = output.last_hidden_state.flatten(0, 1)
    return hidden.bfloat16() if bf16 else hidden, getattr(output, "router_logits", None)


def with_heads(models: Sequence[PreTrainedModel], work: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """`work(hidden)` where the weights of the models' heads are whole: one that is sharded alone is gathered for it."""
    for model in models:
        work = partial(_with_head(model), work)
    return work(hidden)


def _with_head(model: PreTrainedModel) -> Callable:
    return getattr(model.get_output_embeddings(), WITH_WEIGHTS, lambda work, hidden: work(hidden))


def head_of(model: PreTrainedModel, dtype: torch.dtype) -> dict:
    """weight, bias and softcap of the head in `dtype`, as the arguments of `dqo_kernels`' linear operations; inside of
    `with_heads`."""
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.to(dtype)
    return {"weight": head.weight.to(dtype), "bias": bias, "softcap": final_softcap(model)}


def _logit_factor(config: PreTrainedConfig) -> float:
    """What the model multiplies its logits by; a factor that is not known here is found by `fitness.check_head`."""
    if config.model_type.startswith("cohere"):
        return config.logit_scale
    if config.model_type == "hyperclovax":
        return config.logits_scaling
    # Granite and its kin, Falcon-H1; 1 in others
    return getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)


def head_inputs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Hidden states as the head wants them: times what the model multiplies its logits by."""
    factor = _logit_factor(model.config.get_text_config())
    return hidden if factor == 1 else hidden * factor


def reference_head(reference: PreTrainedModel, hidden: Tensor) -> dict[str, Tensor | None]:
    """ref_hidden, ref_weight and ref_bias of a reference's (N, D) hidden states, for the linear operations."""
    head = head_of(reference, hidden.dtype)
    return {"ref_hidden": head_inputs(reference, hidden), "ref_weight": head["weight"], "ref_bias": head["bias"]}


def head_stats(policy: PreTrainedModel, hidden: Tensor, actions: Tensor) -> TokenStats:
    """(N, D) hidden states and (N,) tokens -> (N,) statistics."""

    def work(hidden: Tensor) -> TokenStats:
        head = head_of(policy, hidden.dtype)
        return linear_token_stats(head_inputs(policy, hidden), head.pop("weight"), actions, **head)

    return with_heads([policy], work, hidden)


def policy_stats(policy: PreTrainedModel, batch: Batch, bf16: bool = False) -> TokenStats:
    """(N,) statistics of the rows; the head is applied to no other position."""
    return head_stats(policy, hidden_positions(policy, batch, bf16)[batch.states], batch.actions)


def weights_hash(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """sha256 of the parameters' names and bytes, in `dtype` where it is given; all processes must call it for shards."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model):
        digest.update(name.encode())
        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_USUAL = set(PreTrainedConfig().to_dict()) | {"use_cache"}


def architecture(config: PreTrainedConfig) -> dict:
    """How a model of this configuration computes with its weights, as JSON gives it back: without what every class has."""

    def told(values: dict) -> dict:
        kept = {name: value for name, value in values.items() if name not in _USUAL and not name.startswith("_")}
        return {name: told(value) if isinstance(value, dict) else value for name, value in kept.items()}

    return json.loads(json.dumps(told(config.to_dict()), default=str))


def architecture_hash(model: PreTrainedModel) -> str:
    """sha256 of the configuration, without names and versions: the weights alone do not say how they are used."""
    told = model.config.to_dict()
    described = {k: v for k, v in told.items() if not k.startswith("_") and k not in ("transformers_version", "dtype")}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
