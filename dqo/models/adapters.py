"""Saved adapters as models: an adapter's directory or hub name stands for its base model with the adapter merged."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import find_adapter_config_file

from dqo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"


def adapter_base(path: str) -> str | None:
    """The base model that `path` names, a directory or hub name, when it holds an adapter; None when it holds a model.

    Raises:
        UserError: when it holds both, or does not name its base.
    """
    try:
        found = find_adapter_config_file(path)
    except (OSError, ValueError):  # what loads the model says what is wrong with its name
        return None
    if found is None:
        return None
    if (Path(path) / "config.json").exists():
        raise UserError(f"{path} holds both a model (config.json) and an adapter ({CONFIG}); remove one of these files")
    try:
        base = json.loads(Path(found).read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not base or not isinstance(base, str):
        raise UserError(f"{path} is an adapter whose base is unknown; name it: base_model_name_or_path in its {CONFIG}")
    return base


def attach(model: PreTrainedModel, path: str, base: str) -> Any:
    """`model`, which was loaded from `base`, with the adapter at `path` switched on: a peft.PeftModel around it."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"{path} is an adapter, which needs the package peft: pip install 'dqo[peft]'") from error
    with _mergeable(path, base), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")  # those would be random
        return PeftModel.from_pretrained(model, path).eval()


def merged(attached: Any, path: str, base: str) -> PreTrainedModel:
    """The model of `attach` with the adapter added to its weights, in place."""
    with _mergeable(path, base):
        found = attached.merge_and_unload()
    if hasattr(found, "peft_config"):  # peft 0.18 leaves it
        del found.peft_config
    found.name_or_path = ""  # these weights lie in no directory
    return found.requires_grad_(True)


@contextlib.contextmanager
def _mergeable(path: str, base: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(f"the adapter {path} cannot be merged into its base {base}: {error}") from error


def merge(model: PreTrainedModel, path: str, base: str) -> PreTrainedModel:
    """`model`, which was loaded from `base`, with the adapter at `path` added to its weights."""
    return merged(attach(model, path, base), path, base)
