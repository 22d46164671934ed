"""Attention over packed sequences, registered with transformers: causal within each sequence, no padding, no (T, T) mask.

A packed batch is one row of tokens, (1, total), with position ids that start again at 0 and `cu_seq_lens_q`, `max_length_q` and
their twins of the keys, which transformers' models hand from their forward to their attention (its FlashAttentionKwargs).

| where | what runs |
|---|---|
| CUDA, half precision | `flash_attn.flash_attn_varlen_func`, or torch's own `varlen_attn` where flash-attn is not installed |
| anywhere else | `scaled_dot_product_attention`, one call for all sequences of one length |

On a CPU that is slower than padding for a narrow model, whose matrix products cost less than the calls; a wide one saves the
products of the padding.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from dqo.data.batches import packed_inputs
from dqo.errors import UserError

logger = logging.getLogger(__name__)

NAME = "dqo_varlen"
CURE = "use --padding_free False"
WIDE = 512  # dimensions from which packing is faster on a CPU
CAUSAL_LAYERS = {"full_attention", "sliding_attention"}
# What models hand to their attention besides; none of it changes the result of a packed batch.
IGNORED = {"position_ids", "use_cache", "cu_seq_lens_k", "max_length_k", "output_attentions", "output_hidden_states"}
IGNORED |= {"return_dict", "cache_position", "output_router_logits"}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others,
) -> tuple[Tensor, None]:
    """(1, H, total, D) queries, (1, H_kv, total, D) keys and values -> (1, total, H, D_v), as transformers calls it.

    `sliding_window` counts the token itself: W sees the token and the W - 1 before it.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise UserError(
            f"{type(module).__name__} was called without the boundaries of packed sequences (cu_seq_lens_q); the model "
            f"does not hand them to its attention; {CURE}"
        )
    unknown = sorted(name for name in others.keys() - IGNORED if others[name] is not None and others[name] is not False)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if dropout:
        unknown.append("dropout")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unknown.append("is_causal=False")
    if unknown:
        raise UserError(
            f"{type(module).__name__} asks for more than causal attention ({', '.join(unknown)}), which packed sequences "
            f"do not have here; {CURE}"
        )
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in float32 there
        dtype = torch.get_autocast_dtype(query.device.type)
    else:
        dtype = value.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (total, heads, D)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    fused, reason = _fused(q.device, dtype, max(q.shape[-1], v.shape[-1]), softcap)
    if fused is not None:
        return _widened(fused, q, k, v, cu_seq_lens_q, max_length_q, scaling, window, softcap)[None], None
    if softcap:
        raise UserError(f"{type(module).__name__} caps its attention scores, but {reason}; {CURE}")
    return _by_length(q, k, v, cu_seq_lens_q.diff().tolist(), scaling, window)[None], None


def no_mask(*_, attention_mask: Tensor | None = None, use_vmap: bool = False, **__) -> None:
    """In place of transformers' mask: the boundaries say all of it, so a call that says something else is refused, be it a model
    with a mask of its own or a padded batch outside `unpacked`."""
    if attention_mask is not None:
        raise UserError(f"packed sequences have no mask of padding, and the model was called with one; {CURE}")
    if use_vmap:  # transformers' sign of a mask that is causal "or" or "and" something
        raise UserError(f"the model's attention mask is not plain causal, so that sequences cannot be packed; {CURE}")


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, no_mask)


@cache  # Python searches for a missing package every time
def _flash_attn() -> Callable | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError):  # not there, or built for another torch
        return None
    return flash_attn_varlen_func


@cache
def _torch_varlen() -> Callable | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None  # torch 2.10's cannot


@cache
def _takes_groups(varlen_attn: Callable) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.12


def _fused(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None
) -> tuple[Callable | None, str | None]:
    """The kernel that takes packed sequences whole, or None and why there is none."""
    if device.type != "cuda":
        return None, f"there is no attention kernel for packed sequences on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"attention kernels for packed sequences take bfloat16 or float16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None, "attention kernels for packed sequences need a GPU of compute capability 8.0 or later"
    if head_dim > 256:
        return None, f"attention kernels for packed sequences take heads of up to 256 dimensions, not {head_dim}"
    if _flash_attn() is not None:
        return _with_flash_attn, None
    if softcap:
        return None, "a cap on attention scores needs flash-attn, which is not installed"
    if _torch_varlen() is not None:
        return _with_torch, None
    return None, "neither flash-attn nor torch.nn.attention.varlen is installed"


def _widened(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, *arguments) -> Tensor:
    """Kernels want one head dimension, a multiple of 8: zeros change neither scores nor values."""
    width, out = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8, v.shape[-1]
    q, k, v = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return kernel(q, k, v, *arguments)[..., :out]


def _with_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    kernel = _flash_attn()
    assert kernel is not None  # `_fused` found it
    return kernel(
        q,
        k,
        v,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _with_torch(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scaling: float, window: int | None, _: None
) -> Tensor:
    varlen_attn, grouped = _torch_varlen(), {}
    assert varlen_attn is not None  # `_fused` found it
    if q.shape[1] != k.shape[1]:
        if _takes_groups(varlen_attn):
            grouped = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    size = (-1 if window is None else window - 1, 0)
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=size, **grouped)


def _by_length(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scaling: float, window: int | None) -> Tensor:
    """Sequences of one length as one batch; (total, H, D_v). Keys are repeated for their group of queries, because torch's
    memory-saving kernels for float32 and for CPUs take no groups and it would make the (L, L) scores instead."""
    starts: dict[int, list[int]] = {}
    position = 0
    for length in lengths:
        starts.setdefault(length, []).append(position)
        position += length
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if q.shape[1] != x.shape[1] else x for x in (k, v))
    begins = [begin for members in starts.values() for begin in members]
    moved = None  # where they lie in this order, nothing is copied
    if begins != sorted(begins):
        runs = [begin + torch.arange(length, device="cpu") for length, members in starts.items() for begin in members]
        moved = torch.cat(runs).to(q.device)
        q, k, v = (x[moved] for x in (q, k, v))
    sizes = [len(members) * length for length, members in starts.items()]
    outputs = []
    for (length, members), *parts in zip(starts.items(), *(x.split(sizes) for x in (q, k, v))):
        # (sequences, H, L, D)
        queries, keys, values = (x.unflatten(0, (len(members), length)).transpose(1, 2) for x in parts)
        mask = None
        if window is not None and window < length:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        found = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return whole if moved is None else whole[moved.argsort()]


def _inner(model: nn.Module) -> PreTrainedModel:
    """The transformers model under whatever wraps it (adapters, data parallelism)."""
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def packs(model: nn.Module) -> bool:
    """Whether the model's batches have to be packed."""
    return _inner(model).config._attn_implementation == NAME


def unavailable(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why packed sequences would not be faster here, or None. `dtype` is what attention runs in: autocast's, if there is one."""
    text = config.get_text_config()
    if reason := _not_causal(config):
        return reason
    softcap = getattr(text, "attn_logit_softcapping", None)
    if torch.device(device).type == "cpu" and text.hidden_size >= WIDE and not softcap:
        return None
    return _fused(torch.device(device), dtype, _head_dim(text), softcap)[1]


def _head_dim(text: PreTrainedConfig) -> int:
    """The widest of all layers: some models (Gemma 4) have heads of several sizes."""
    layers = [text]
    if getattr(text, "per_layer_config", None):
        layers = [text.per_layer_config[i] for i in range(text.num_hidden_layers)]
    # without attention there is no head to be too wide
    return max(
        getattr(t, "head_dim", None) or t.hidden_size // getattr(t, "num_attention_heads", t.hidden_size)
        for t in layers
    )


def _not_causal(config: PreTrainedConfig) -> str | None:
    others = set(getattr(config.get_text_config(), "layer_types", None) or ()) - CAUSAL_LAYERS
    if others:
        return f"{config.model_type!r} has layers that are not plain causal attention ({', '.join(sorted(others))})"
    return f"{config.model_type!r} is an encoder and a decoder" if config.is_encoder_decoder else None


def enable(model: nn.Module) -> None:
    """Sets a loaded model to packed sequences; from here on its batches must be packed (see `unpacked`)."""
    inner = _inner(model)
    if packs(inner):
        return
    if reason := _not_causal(inner.config):
        raise UserError(f"{reason}, so that sequences cannot be packed; {CURE}")
    before = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    if not packs(inner):
        raise UserError(f"{type(inner).__name__} does not let its attention be chosen; {CURE}")
    inner.attention_before_packing = before


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """The model's own attention for a while: generation, padded batches. Not around a forward pass whose backward comes after."""
    if not packs(model):
        yield
        return
    inner = _inner(model)
    _restore(inner)
    try:
        yield
    finally:
        inner.set_attn_implementation(NAME)


def _restore(inner: PreTrainedModel) -> None:
    # A model made from a config that packs already (a value model from its policy's) had none; eager is what all have.
    inner.set_attn_implementation(getattr(inner, "attention_before_packing", "eager"))


@torch.no_grad()
def check_packing(model: nn.Module, first: list[int], second: list[int]) -> None:
    """Refuses a model whose packed sequences are not what they are alone, or see each other. A few tokens each are enough."""
    inner = _inner(model)

    def hidden(sequences: list[list[int]], packed: bool) -> Tensor:
        ids = torch.tensor([[i for sequence in sequences for i in sequence]], device=inner.device)
        inputs = packed_inputs([len(s) for s in sequences], inner.device) if packed else {}
        return inner.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state[0].float()

    def distance(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()

    name = type(inner).__name__
    try:
        together = hidden([first, second], packed=True)
        with unpacked(inner):
            alone = torch.cat([hidden([first], packed=False), hidden([second], packed=False)])
        changed = hidden([first[::-1], second], packed=True)[len(first) :]
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} does not take packed sequences ({error}); {CURE}") from error
    half = together.new_empty(0, dtype=_attention_dtype(inner)).element_size() == 2
    # Rounding between two attention kernels through a deep model; then, in batches of one shape, of one kernel's.
    bounds = (0.05, 0.008) if half else (1e-3, 1e-5)
    apart, leak = distance(together, alone), distance(changed, together[len(first) :])
    if not (apart <= bounds[0] and leak <= bounds[1]):
        raise UserError(
            f"{name} does not keep packed sequences apart (hidden states differ by {apart:.2g} from those of each alone, and "
            f"by {leak:.2g} when the one before changes, relatively); {CURE}"
        )


def _attention_dtype(model: PreTrainedModel) -> torch.dtype:
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def choose(policy: nn.Module, padding_free: bool | None, ids: list[int]) -> bool:
    """The option `padding_free` applied to a loaded policy, under the autocast it will run in: whether batches are packed.
    None packs where it is faster and possible, and says why not; True insists. `ids` are tokens to try it with, two at least."""
    if padding_free is False:
        return False
    inner = _inner(policy)
    if padding_free is None and (reason := unavailable(inner.config, inner.device, _attention_dtype(inner))):
        logger.info("batches are padded: %s", reason)
        return False
    try:
        enable(policy)
        half = max(1, len(ids) // 2)
        check_packing(policy, ids[:half], ids[half:])
    except UserError as error:
        if padding_free:
            raise
        if packs(policy):
            _restore(inner)
        logger.warning("batches are padded: %s", error)
        return False
    return True
