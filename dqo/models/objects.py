"""Models that a Python caller hands over: what cannot be trained is refused before any work."""

from __future__ import annotations

from typing import Any

from dqo.errors import UserError

FULL = (
    "; load it without quantization_config (adapters keep its frozen weights in bfloat16: use_peft with dtype bfloat16)"
)


def check_model_object(name: str, model: Any) -> None:
    """Refuses a model with quantised weights, or with adapters of its own. `name` is the argument's."""
    if hasattr(model, "merge_and_unload"):
        raise UserError(
            f"{name} is a {type(model).__name__}, a model in peft's wrapper: give {name}.merge_and_unload(), or the adapter's "
            "directory"
        )
    if any(hasattr(part, "get_base_layer") for part in model.modules()):
        raise UserError(f"{name} has adapters already: give the model without them, and peft_config or use_peft")
    described = getattr(model.config, "quantization_config", None)
    if getattr(model, "is_quantized", False) or described is not None:
        raise UserError(f"{name} is quantised ({quantization_method(described, model)}), which cannot be trained{FULL}")
    other = next((n for n, p in model.named_parameters() if not p.is_floating_point()), None)
    if other is not None:
        raise UserError(f"{name} is quantised: {other} is not of floating point numbers{FULL}")


def check_objects(model: Any, ref_model: Any, tokenizer: Any, adapters: bool) -> None:
    """Refuses objects that a caller hands over, None where he does not, which cannot be trained, or not together. `adapters`:
    whether adapters are trained."""
    from transformers import PreTrainedTokenizerBase

    for name, given in (("model", model), ("ref_model", ref_model)):
        if given is not None:
            check_model_object(name, given)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase)
        cure = "processing_class.tokenizer" if inner else "AutoTokenizer.from_pretrained(...)"
        raise UserError(f"processing_class is a {type(tokenizer).__name__}; give a tokenizer: {cure}")
    if model is None:
        return
    if not adapters and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "no parameter of model requires a gradient, so nothing would be trained: model.requires_grad_(True), or train "
            "adapters by use_peft"
        )
    if ref_model is not None and {id(p) for p in model.parameters()} & {id(p) for p in ref_model.parameters()}:
        raise UserError(
            "ref_model has parameters of model, which is trained in place: leave ref_model out (the reference is model as it is "
            "before training), or give a copy"
        )


def check_not_quantised(path: str, config: Any) -> None:
    """Refuses a model at `path` whose configuration says that its files are quantised."""
    described = getattr(config, "quantization_config", None)
    if described is not None:
        raise UserError(
            f"{path!r} is quantised ({quantization_method(described)}), which cannot be trained; give a model whose files are "
            "in bfloat16 or float32"
        )


def quantization_method(described: Any, model: Any = None) -> str:
    told = described.get("quant_method") if isinstance(described, dict) else getattr(described, "quant_method", None)
    told = told or getattr(model, "quantization_method", None) or "an unnamed method"
    return str(getattr(told, "value", told))
