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
