"""Tiny models of several families, and what a test of packed sequences compares."""

from __future__ import annotations

import copy

import torch
import transformers

from dqo.models import attention
from dqo.models.critic import value_model_from
from dqo.objectives import DQO

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 3  # shorter than most of the test's sequences
GEMMA = {"head_dim": 6, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
BOTH = ["sliding_attention", "full_attention"]

FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen2 with a window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": BOTH},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA | {"layer_types": BOTH}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA | {"attn_logit_softcapping": 1.0}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4, "head_dim": 8, "layer_types": BOTH}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {}),
    "bart": ("BartForCausalLM", "BartConfig", {}),
}
PACKED = ["llama", "qwen2", "qwen2 with a window", "qwen3", "mistral", "gemma3", "mixtral", "gpt2"]
WITH_VALUES = [name for name in PACKED if name not in ("gemma3", "mixtral")]  # classes that transformers has


def model(name: str, seed: int = 0):
    """Weights large enough that attention shapes the result: at transformers' own 0.02 a leak would be hard to see."""
    torch.manual_seed(seed)
    cls, config, changes = FAMILIES[name]
    made = getattr(transformers, cls)(getattr(transformers, config)(**(SIZES | changes))).eval()
    made.requires_grad_(False)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3)
    return made.requires_grad_(True)


def packing(made):
    """A copy that is set to packed sequences."""
    copied = copy.deepcopy(made)
    attention.enable(copied)
    return copied


def critic_of(made):
    critic = value_model_from(made)
    torch.manual_seed(1)
    head = [m for m in critic.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1][-1]
    torch.nn.init.normal_(head.weight)
    return critic


def objective_and_critic(name: str, made):
    if name in WITH_VALUES:
        return DQO(is_level="suffix", lam=0.9), critic_of(made)
    return DQO(value_model="none", is_level="suffix", lam=0.9), None
