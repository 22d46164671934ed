"""Checkpoints: transformers' layout plus optimizer states and counters, safetensors and JSON, written aside and renamed.

checkpoint-600/  config.json model.safetensors tokenizer*     the policy
                 critic/                                      the value model, AutoModelForTokenClassification
                 optimizer.safetensors                        AdamW states of both
                 dqo_state.json                               step, counters, metrics position, hashes, options
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dqo.errors import UserError

STATE_FILE = "dqo_state.json"


def optimizer_tensors(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """{"policy/17/exp_avg": ...}: everything an AdamW holds, by parameter number."""
    return {
        f"{name}/{index}/{key}": value.contiguous()
        for name, optimizer in optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, index, field = key.split("/")
            if owner == name:
                state.setdefault(int(index), {})[field] = value.clone()  # out of the file's mapping
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_models(directory: Path, policy: PreTrainedModel, value_model: PreTrainedModel | None, tokenizer) -> None:
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if value_model is not None:
        value_model.save_pretrained(directory / "critic")


def save_checkpoint(
    output_dir: Path,
    step: int,
    policy: PreTrainedModel,
    value_model: PreTrainedModel | None,
    tokenizer,
    optimizers: dict[str, torch.optim.Optimizer],
    state: dict,
    keep: int,
) -> Path:
    """Writes checkpoint-<step> atomically: a directory of that name is whole, whatever happened."""
    final = output_dir / f"checkpoint-{step}"
    aside = output_dir / f".checkpoint-{step}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_models(aside, policy, value_model, tokenizer)
    save_file(optimizer_tensors(optimizers), aside / "optimizer.safetensors")
    (aside / STATE_FILE).write_text(json.dumps(state, indent=1))
    for path in sorted(aside.rglob("*")):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(output_dir)
    for old in checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return final


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
