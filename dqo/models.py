"""Policy, value model and their forward passes on packed rows; real transformers classes throughout."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from dqo.batches import Batch
from dqo.errors import UserError
from dqo_kernels import TokenStats, linear_token_stats

transformers_logging.disable_progress_bar()


def load_tokenizer(path: str):
    """A fast tokenizer with an EOS; padding uses EOS where there is no pad token (masks come from lengths)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path {path!r} has no tokenizer: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path!r} has no eos_token; a response could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(path: str) -> int:
    """Rows of the model's head, from its config alone."""
    try:
        return AutoConfig.from_pretrained(path).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path {path!r} has no model config: {error}") from error


def load_policy(path: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A causal language model in float32, dropout off: a policy that differs from itself has no log-ratio of 0."""
    try:
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path {path!r} cannot be loaded as a causal language model: {error}") from error
    return _ready(policy, device)


def _ready(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
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


def final_softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)


def hidden_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(N, D): last hidden states of the rows; the head has not been applied to any other position."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.states]


def _head_stats(policy: PreTrainedModel, hidden: Tensor, actions: Tensor) -> TokenStats:
    head = policy.get_output_embeddings()
    return linear_token_stats(hidden, head.weight, actions, bias=head.bias, softcap=final_softcap(policy))


def policy_stats(policy: PreTrainedModel, batch: Batch) -> TokenStats:
    return _head_stats(policy, hidden_rows(policy, batch), batch.actions)


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


def value_model_from(policy: PreTrainedModel) -> PreTrainedModel:
    """A separate value model: the policy's trunk, copied, with one zero output a token, so that V = 0 at the start."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.classifier_dropout = 1, 0.0
    config.architectures = None
    try:
        value_model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise UserError(
            f"transformers has no token-classification model for {policy.config.model_type!r}, so it has no separate value "
            "model here; use --value_model none"
        ) from error
    value_model.base_model.load_state_dict(policy.base_model.state_dict())
    score = [m for m in value_model.modules() if isinstance(m, nn.Linear) and m.out_features == 1][-1]
    nn.init.zeros_(score.weight)
    if score.bias is not None:
        nn.init.zeros_(score.bias)
    return _ready(value_model, policy.device)


def value_rows(value_model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """V(s_t) of every row (N,), and V(s_{T+1}) after the last action of every episode (B,)."""
    values = value_model(input_ids=batch.input_ids).logits.flatten().float()
    return values[batch.states], values[batch.end_states]


def weights_hash(model: PreTrainedModel) -> str:
    """sha256 of the parameters' names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_critic(path: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A saved value model; one without its trained head is refused, not re-initialised."""
    value_model, loading = AutoModelForTokenClassification.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise UserError(
            f"{path} has no {', '.join(sorted(loading['missing_keys']))}; refusing to start from a random head"
        )
    return _ready(value_model, device)
