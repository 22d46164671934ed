"""A small, randomly initialised model of every causal language model class of transformers, from its configuration alone."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 24
PARAMETERS = 2_000_000  # a model of more was not made small

# The names that configurations have for a size, and the size.
SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size backbone_vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_seq_length max_target_positions context_length "
    "rel_extent num_centroids original_max_position_embeddings keep_window_size",
    32: "hidden_size d_model n_embd embed_dim emb_dim dim embedding_size input_embedding_size output_embedding_size "
    "backbone_hidden_size hidden_dim model_dim lru_width pronunciation_embed_dim shape_embed_dim",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff dim_ff feed_forward_size "
    "ffn_hidden_size intermediate_size_mlp dense_intermediate_size",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_intermediate_size "
    "linear_head_dim mamba_head_dim mamba_d_head ssm_state_size mamba_d_state state_size index_head_dim "
    "q_lora_rank kv_lora_rank o_lora_rank head_dim dim_head kv_channels attention_head_size v_head_dim swa_head_dim "
    "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input laurel_rank d_rel loop_gate_rank "
    "global_head_dim gated_norm_rank prompt_mid_dim image_size dim_model_base hc_lowrank time_step_rank "
    "block_multiple_of qk_head_dim swa_v_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim chunk_size mamba_chunk_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts linear_num_heads linear_num_value_heads mamba_n_heads mamba_num_heads index_n_heads "
    "swa_num_attention_heads n_mamba_heads num_global_attention_heads zero_expert_num index_topk",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads num_experts_per_tok moe_topk moe_k moe_top_k swa_num_key_value_heads "
    "linear_num_key_heads linear_num_key_value_heads attn_layer_period topk_group n_group num_memory_blocks "
    "n_groups mamba_n_groups centroid_intermediate_top_k num_block_cntr type_vocab_size num_selected_experts",
    1: "first_k_dense_replace attn_layer_offset num_dense_layers n_shared_experts num_shared_experts "
    "moe_num_shared_experts expand mamba_expand",
    0: "num_kv_shared_layers num_mtp_layers num_nextn_predict_layers",
}
SIZE = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
}

# What a class needs besides: its sizes depend on each other, or its layers on their number.
PARTICULAR: dict[str, dict] = {
    name: {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2} for name in ("bamba", "granitemoehybrid")
} | {
    "axk2": {"num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", "num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "gemma3": {"vision_config": SIGLIP},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "helium": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "minicpm3": {"num_key_value_heads": 4},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_expand": 2},
    "zaya": {"num_experts_per_tok": 1},
}


def config_classes() -> dict[str, type[PreTrainedConfig]]:
    """The configurations of causal language models by model type, each class once."""
    return {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}


def small_config(model_type: str, **changes) -> PreTrainedConfig:
    """The configuration of this type with its sizes made small."""
    cls = config_classes()[model_type]
    names = inspect.signature(cls.__init__).parameters
    sub = {
        name: small_part(getattr(cls, "sub_configs", {})[name])
        for name in getattr(cls, "sub_configs", {})
        if name in names
    }
    return cls(**_sizes(cls) | sub | PARTICULAR.get(model_type, {}) | changes)


def small_part(cls: type[PreTrainedConfig]):
    return _sizes(cls) | PARTICULAR.get(cls.model_type, {}) if cls.__name__ != "AutoConfig" else None


def _sizes(cls: type[PreTrainedConfig]) -> dict:
    parameters = inspect.signature(cls.__init__).parameters
    found = {name: SIZE[name] for name in parameters if name in SIZE and parameters[name].default is not None}
    found |= {name: SIZE[name] for name in ("head_dim",) if name in parameters}
    return found | {name: value for name, value in TOKENS.items() if name in parameters}


def small_model(model_type: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A causal language model of this type, random, in transformers' own mode for new models: training, with its dropout.

    Raises:
        ValueError: when it has more than PARAMETERS parameters.
    """
    config = small_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)
