"""Tokenizer, configuration and end tokens of a model by its directory or hub name: what is known of it without its weights.

It imports no class of models, which takes seconds: `dqo check` needs none.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from dqo.errors import UserError
from dqo.models.adapters import adapter_base
from dqo.models.objects import check_not_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

transformers_logging.disable_progress_bar()
logger = logging.getLogger(__name__)


def load_tokenizer(path: str):
    """A fast tokenizer with an EOS; padding uses EOS where there is no pad token (masks come from lengths)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        if base := adapter_base(path):
            return load_tokenizer(base)
        raise UserError(f"model_name_or_path {path!r} has no tokenizer: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:  # JSON, but of another form
        raise UserError(
            f"model_name_or_path {path!r} has a damaged tokenizer ({type(error).__name__}: {error}); fetch its files again"
        ) from error
    return _with_ends(tokenizer, f"the tokenizer of {path!r}")


def tokenizer_of(path: str | None, given=None):
    """The tokenizer that a Python caller gave; without one that of `path`."""
    if given is not None:
        return _with_ends(given, "processing_class")
    assert path is not None  # a model object without a tokenizer is refused
    return load_tokenizer(path)


def _with_ends(tokenizer, name: str):
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name} has no eos_token; a response could never end")
    if tokenizer.pad_token_id is None:
        logger.warning("%s has no pad token: EOS pads, and masks come from lengths", name)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(path: str) -> PreTrainedConfig:
    """The configuration of a model, or of an adapter's base."""
    base = adapter_base(path)
    if base is not None:
        try:
            return load_config(base)
        except UserError as error:
            raise UserError(f"{path!r} is an adapter of {base!r}, which cannot be loaded: {error}") from error
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path!r} has no model config: {error}") from error
    if config.is_encoder_decoder:
        raise UserError(
            f"{path!r} is an encoder and a decoder ({config.model_type}); only causal language models are trained"
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{path!r} ({config.model_type}) is no causal language model; transformers has no AutoModelForCausalLM of it"
        )
    check_not_quantised(path, config)
    return config


def stop_ids(source: str | PreTrainedModel) -> list[int]:
    """End tokens of the generation_config of a model or of its directory or hub name; of one that transformers made from the
    model's config, none: there an id is often a class's default, and means nothing in the tokenizer."""
    config: GenerationConfig | None
    if isinstance(source, str):
        try:
            config = GenerationConfig.from_pretrained(adapter_base(source) or source)
        except (OSError, ValueError):  # most small models have none
            return []
    else:
        config = getattr(source, "generation_config", None)
    found = None if config is None or config._from_model_config else config.eos_token_id
    return [found] if isinstance(found, int) else list(found or ())
