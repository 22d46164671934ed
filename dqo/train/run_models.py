"""The models of a run: the policy with its adapter, the value model, the reference and what it says of the rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dqo.config.options import Options, TrainConfig
from dqo.data.batches import Batch, Batching
from dqo.data.episode import Episode
from dqo.data.episodes import totals
from dqo.errors import UserError
from dqo.models import attention
from dqo.models.architecture import recompute_activations
from dqo.models.critic import add_own_adapter, backbone, keep_outputs, make_value_model
from dqo.models.implicit_value import implicit_value_from
from dqo.models.lora import adapter_off, add_adapter, lora_config, with_fields
from dqo.models.named import load_config
from dqo.models.policy import load_empty, load_policy, policy_stats, ready, weights_hash
from dqo.models.q_model import q_model_from
from dqo.objectives.base import IMPLICIT_BETA, Objective
from dqo.processes import Processes
from dqo.reference.cache import ReferenceCache, reference_id
from dqo.reference.columns import check_agreement, fill, reference_entries
from dqo.train.inputs import Given
from dqo.train.learner import Learner
from dqo.train.resume import adapter_fields, stored_derived
from dqo.train.returns import ValueStart
from dqo_kernels import TokenStats


def shards_from_files(config: TrainConfig, processes: Processes) -> bool:
    """Whether each process reads its own shards; adapters are added to whole models."""
    return processes.fsdp and not config.use_peft


def load_initial(config: TrainConfig, processes: Processes) -> PreTrainedModel:
    """The model that model_name_or_path names, as the run begins with it; without memory where it will be sharded."""
    dtype, device = getattr(torch, config.dtype), processes.device
    if shards_from_files(config, processes):
        if (empty := load_empty(config.model_path, dtype, config.attn_implementation)) is not None:
            return empty
        processes.say(
            f"{config.model_path}: its files cannot be read by slices (no safetensors, or names that transformers translates), "
            "so that each process loads it whole before it keeps its shards"
        )
    products = torch.bfloat16 if config.bf16 else dtype
    four_bits = products if config.load_in_4bit else None
    return load_policy(config.model_path, device, dtype, config.attn_implementation, four_bits)


def reference_config(config: TrainConfig, given: Given, vocab_size: int) -> PreTrainedConfig | None:
    """Of the reference policy, when it is not the initial policy; refused when it has other tokens."""
    path = config.ref_model_name_or_path
    if given.ref_model is not None:
        its_config = given.ref_model.config
    elif path is not None:
        its_config = load_config(path)
    else:
        return None
    if (found := its_config.get_text_config().vocab_size) != vocab_size:
        raise UserError(
            f"the reference model {path or ''} has a vocabulary of {found}, the policy of {vocab_size}; a reference policy "
            "shares the policy's tokens"
        )
    return its_config


def explicit_reference(config: TrainConfig, given: Given, processes: Processes) -> PreTrainedModel | None:
    """The reference policy, when it is not the initial policy."""
    device, path = processes.device, config.ref_model_name_or_path
    if given.ref_model is not None:
        return ready(given.ref_model, device)
    if path is not None and shards_from_files(config, processes):
        return load_initial(replace(config, model_name_or_path=path), processes)
    dtype = torch.float32 if config.use_peft else getattr(torch, config.dtype)
    return None if path is None else load_policy(path, device, dtype)


def reference_columns(
    config: TrainConfig,
    episodes: Sequence[Episode],
    policy: PreTrainedModel,
    explicit: PreTrainedModel | None,
    batching: Batching,
    identity: dict,
    processes: Processes,
    resuming: bool,
    sharded: nn.Module | None = None,
) -> None:
    """ref_logprobs and ref_lse of every episode, from the cache where it has them; checked where they can be. `sharded`: what
    wraps the reference over the processes, which then compute together. Episodes that are made when they are read have them from
    then on."""
    model = policy if explicit is None else explicit
    in_16_bits = config.bf16 or (sharded is not None and config.dtype == "bfloat16")
    numbers = reference_id(model, identity["reference"], in_16_bits)
    name = config.ref_model_name_or_path or config.model_name_or_path or type(model).__name__
    cache = ReferenceCache(config.ref_cache_dir or Path(config.output_dir) / "ref_cache", numbers, name)

    def stats_of(batch: Batch) -> TokenStats:
        with adapter_off(model):
            if sharded is not None:
                return sharded(lambda _: policy_stats(model, batch, config.bf16))
            return policy_stats(model, batch, config.bf16)

    batching = replace(batching, packed=attention.packs(model))
    entries, _ = reference_entries(episodes, stats_of, batching, processes, cache, together=sharded is not None)
    fill(episodes, entries)
    if explicit is None and not resuming:
        check_agreement(episodes, stats_of, batching, numbers.dtype, cache)


def bf16_problem(device: torch.device) -> str | None:
    """Why products in bfloat16 are slow there, as one line; None where they are not."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return None
        return "this GPU has no products in bfloat16; they are emulated and take longer than those of float32: leave --bf16 out"
    supported = getattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True
    )  # older and other builds do not tell
    if device.type != "cpu" or supported():
        return None
    return (
        "this CPU has no instructions for bfloat16: products took 90 to 200 times as long as in float32 where it was measured "
        "(AVX2, matrices of 256 and 1,024); leave --bf16 and --dtype bfloat16 out"
    )


def make_learner(
    options: Options,
    given: Given,
    policy: PreTrainedModel,
    explicit: PreTrainedModel | None,
    begin: ValueStart,
    episodes: Sequence[Episode],
    fitted: nn.Module | None = None,
) -> Learner:
    """The policy, with an adapter where one was asked for, and what the objective needs beside it. `begin`: a new value model;
    `episodes` are those that are trained on; `fitted`: the value model that the run begins with."""
    config, objective = options.train, options.objective
    peft_config = given.peft_config
    if config.use_peft and peft_config is None:
        peft_config = lora_config(config.lora_r, config.lora_alpha, config.lora_target_modules)
        peft_config = with_fields(peft_config, adapter_fields(config))
    torch.manual_seed(config.seed)  # of new heads and adapters, in every process and when a run goes on
    value_model = reference = target = None
    if objective.needs_values and not objective.implied_from:
        if fitted is None:
            value_model = _new_value_model(objective, policy, peft_config, explicit or policy, begin, episodes)
        else:
            value_model = fitted.to(policy.dtype) if peft_config is None else fitted
            if config.freeze_value_model:
                value_model.requires_grad_(False)
            elif peft_config is not None:
                add_own_adapter(value_model, peft_config)
        if peft_config is None:
            keep_outputs(value_model)
        if objective.values_decay is not None:
            target = copy.deepcopy(value_model)
    if objective.needs_kl and objective.kl_to == "reference":  # with an adapter the policy is its own reference
        reference = copy.deepcopy(policy) if explicit is None and peft_config is None else explicit
    if peft_config is not None:
        add_adapter(policy, peft_config, str(base_of(policy, config)))
    # a caller's model may have transformers' own, which works in training mode only
    asked = any(getattr(part, "gradient_checkpointing", False) for part in policy.modules())
    if config.gradient_checkpointing or asked:
        for model in filter(None, (policy, backbone(value_model))):
            recompute_activations(model)
    return Learner(policy, value_model, reference, target, config.bf16, config.router_aux_loss_coef)


def _new_value_model(
    objective: Objective,
    policy: PreTrainedModel,
    peft_config: Any,
    reference: PreTrainedModel,
    begin: ValueStart,
    episodes: Sequence[Episode],
) -> nn.Module:
    if objective.value_kind == "q_model":
        q_model = q_model_from(policy, getattr(objective, "beta", 1.0), weights_hash(reference, torch.float32))
        if peft_config is not None:
            add_own_adapter(q_model, peft_config)
        return q_model
    if objective.value_kind != "implicit":
        return make_value_model(objective.value_kind, policy, peft_config, begin.form, begin.value)
    outcomes = totals(episodes)
    beta = getattr(objective, "implicit_beta", IMPLICIT_BETA)
    value_model = implicit_value_from(policy, outcomes, beta, weights_hash(reference, torch.float32))
    if peft_config is not None:
        add_own_adapter(value_model, peft_config)
    return value_model


def save_dtype_of(options: Options, given: Given) -> torch.dtype | None:
    """Of the final models: the option's, or that of the model's files; None (as trained) where adapters are trained. A run that
    goes on keeps what its files had."""
    config = options.train
    then = stored_derived(config)
    if "save_dtype" in then and "save_dtype" not in options.sources:
        return None if then["save_dtype"] is None else getattr(torch, then["save_dtype"])
    told: Any = config.save_dtype
    if told is None and not config.use_peft and given.peft_config is None:
        told = load_config(config.model_path).dtype if given.model is None else given.model.dtype
    return None if told is None else getattr(torch, str(told).removeprefix("torch."))


def base_of(policy: PreTrainedModel, config: TrainConfig) -> Path | str:
    """Where the adapter's base lies: a hub name, or a directory by its whole path, so that it holds anywhere. Weights
    that lie nowhere (made in Python, or merged from an adapter) get a directory in output_dir."""
    name = policy.name_or_path or Path(config.output_dir) / "base_model"
    return Path(name).resolve() if Path(name).is_dir() or not policy.name_or_path else name
