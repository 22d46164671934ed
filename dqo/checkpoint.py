"""Checkpoints: transformers' layout plus optimizer states and counters, safetensors and JSON, written aside and renamed.

checkpoint-600/  config.json model.safetensors tokenizer*     the policy; with LoRA its adapter, in peft's layout
                 critic/                                      the value model, AutoModelForTokenClassification
                 adapters.safetensors                         LoRA: what is trained of policy and value model
                 target.safetensors                           the value model's moving average, where there is one
                 optimizer.safetensors                        AdamW states of both
                 dqo_state.json                               step, counters, metrics position, hashes, options

Tensors are whole, however they were sharded: a run may go on with another number of processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dqo.errors import UserError
from dqo.learner import Learner
from dqo.lora import has_adapter, merged_state
from dqo.models import load_policy
from dqo.parallel import Processes, like, load_whole_state, whole, whole_state
from dqo.value_models import load_critic, save_value_model

STATE_FILE = "dqo_state.json"


def optimizer_tensors(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """{"policy/17/exp_avg": ...}: everything an AdamW holds, by parameter number. All processes must call it."""
    return {
        f"{name}/{index}/{key}": whole(value).contiguous()
        for name, optimizer in optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for name, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, index, field = key.split("/")
            if owner == name:  # cloned: out of the file's mapping
                state.setdefault(int(index), {})[field] = like(value.clone(), parameters[int(index)])
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _trained(learner: Learner) -> dict[str, nn.Parameter]:
    """The parameters that are trained, of a run with adapters."""
    parts = {"policy": learner.policy} | ({} if learner.value_model is None else {"critic": learner.value_model})
    return {
        f"{part}/{name}": parameter
        for part, model in parts.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_models(directory: Path, learner: Learner, tokenizer, processes: Processes, value_model: bool = True) -> None:
    """Policy (or its adapter) and value model (its adapter merged) as transformers loads them. All processes must call it."""
    policy = whole_state(learner.policy)
    critic = None
    if learner.value_model is not None and value_model:
        critic = learner.value_model.state_dict()
        if has_adapter(learner.value_model):
            critic = merged_state(learner.value_model)
        critic = {name: whole(tensor) for name, tensor in critic.items()}
    if processes.main:
        learner.policy.save_pretrained(directory, state_dict=policy)
        tokenizer.save_pretrained(directory)
        if critic is not None:
            save_value_model(learner.value_model, critic, directory / "critic")


def save_checkpoint(
    output_dir: Path,
    step: int,
    learner: Learner,
    tokenizer,
    optimizers: dict[str, torch.optim.Optimizer],
    state: dict,
    keep: int,
    processes: Processes,
) -> Path:
    """Writes checkpoint-<step> atomically: a directory of that name is whole, whatever happened. All processes must call it."""
    final = output_dir / f"checkpoint-{step}"
    aside = output_dir / f".checkpoint-{step}.partial"
    adapters = {}
    if has_adapter(learner.policy):
        adapters = {name: whole(parameter.detach()).contiguous() for name, parameter in _trained(learner).items()}
    target = {} if learner.target is None else whole_state(learner.target)
    optimizer = optimizer_tensors(optimizers)
    if processes.main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    save_models(aside, learner, tokenizer, processes, value_model=not adapters)
    if processes.main:
        for name, tensors in (("adapters", adapters), ("target", target), ("optimizer", optimizer)):
            if tensors:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / f"{name}.safetensors")
        (aside / STATE_FILE).write_text(json.dumps(state, indent=1))
        for path in sorted(aside.rglob("*")):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(output_dir)
        for old in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    processes.barrier()
    return final


def load_models(checkpoint: Path, learner: Learner) -> None:
    """Copies a checkpoint's weights into a learner that is not wrapped yet."""
    if has_adapter(learner.policy):
        saved = load_file(checkpoint / "adapters.safetensors")
        with torch.no_grad():
            for name, parameter in _trained(learner).items():
                parameter.copy_(saved[name])
    else:
        load_whole_state(learner.policy, load_policy(str(checkpoint)).state_dict())
        if learner.value_model is not None:
            load_whole_state(learner.value_model, load_critic(checkpoint / "critic").state_dict())
    if learner.target is not None:
        load_whole_state(learner.target, load_file(checkpoint / "target.safetensors"))


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE_FILE).read_text())


def load_optimizers(checkpoint: Path, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    load_optimizer_tensors(optimizers, load_file(checkpoint / "optimizer.safetensors"))


def check_same_run(checkpoint: Path, identity: dict) -> None:
    """Refuses to go on from a checkpoint of other data, another model or other options, and says what differs."""
    saved = read_state(checkpoint)["identity"]
    differences = []
    for key in sorted(saved.keys() | identity.keys()):
        old, new = saved.get(key), identity.get(key)
        if key == "options":
            names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            differences += [f"option {name}: {old.get(name)!r} then, {new.get(name)!r} now" for name in names]
        elif old != new:
            differences.append(f"{key}: {str(old)[:12]} then, {str(new)[:12]} now")
    if differences:
        raise UserError(
            f"{checkpoint} belongs to another run:\n  "
            + "\n  ".join(differences)
            + "\nChoose another --output_dir, or repeat "
            "the options of that run"
        )
