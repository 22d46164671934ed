"""Safetensors files of sharded tensors, whose rows are sent and written in pieces: no process holds more than one of them.

The files are those that transformers and safetensors write, so a checkpoint is read by any number of processes, each by slices.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dqo.models.critic import (
    DIRECTION,
    backbone,
    load_critic,
    names_beside,
    read_beside,
    save_beside,
    save_value_model,
)
from dqo.models.on_disk import Weights, read_into, weight_files
from dqo.processes import Processes
from dqo.train.parallel import load_whole_state, pieces, whole_state

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def kept_exact(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether the model's class keeps a weight in float32 whatever the others are in."""
    exact = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    exact += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return not tensor.is_floating_point() or any(part in name.split(".") for part in exact)


def in_dtype(model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A state dict with its numbers in `dtype`, but for what the model's class keeps in float32; tied tensors stay one."""
    if dtype is None:
        return state
    cast: dict[int, Tensor] = {}
    for name, tensor in state.items():
        cast.setdefault(id(tensor), tensor if kept_exact(model, name, tensor) else tensor.to(dtype))
    return {name: cast[id(tensor)] for name, tensor in state.items()}


def write_tensors(
    path: Path, tensors: dict[str, Tensor], processes: Processes, dtypes: dict[str, torch.dtype] | None = None
) -> None:
    """Writes a safetensors file of tensors, sharded or not, in the dtypes that `dtypes` names or their own. All processes must
    call it; the first writes, and each sends its rows."""
    kinds = {name: (dtypes or {}).get(name, tensor.dtype) for name, tensor in tensors.items()}
    names = sorted(
        tensors, key=lambda name: (-kinds[name].itemsize, name)
    )  # so that each begins at a multiple of its size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": _NAMES[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = path.open("wb") if processes.main else None
    try:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in pieces(tensors[name].detach(), processes):
                if file is not None:
                    content = part.to("cpu", kinds[name]).contiguous()
                    file.write(content.flatten().view(torch.uint8).numpy().data)
    finally:
        if file is not None:
            file.close()


def save_streamed(
    model: PreTrainedModel,
    directory: Path,
    processes: Processes,
    dtype: torch.dtype | None,
    without: tuple[str, ...] = (),
) -> None:
    """As transformers' save_pretrained, of a model whose weights have in memory the names that they have in files."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in without and id(tensor) not in seen:
            tensors[name] = tensor
            seen.add(id(tensor))
    kinds = {name: dtype for name, x in tensors.items() if dtype is not None and not kept_exact(model, name, x)}
    if processes.main:
        directory.mkdir(parents=True, exist_ok=True)
        described = copy.deepcopy(model.config)
        described.architectures, described.dtype = [type(model).__name__], dtype or torch.float32
        described.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
    write_tensors(directory / "model.safetensors", tensors, processes, kinds)


def load_streamed(model: nn.Module, directory: Path) -> None:
    """Reads this process's share of what `save_streamed`, or transformers, wrote."""
    found = weight_files(str(directory))
    if found is None:
        raise FileNotFoundError(2, "no such file", str(directory / "model.safetensors"))
    read_into(model, Weights(found))


def save_sharded_value_model(
    value_model: nn.Module, directory: Path, processes: Processes, dtype: torch.dtype | None
) -> None:
    """As `save_value_model`; its trunk tensor by tensor, where it was loaded by slices."""
    trunk = backbone(value_model)
    if trunk is None or not hasattr(trunk, "on_disk"):  # a head, or one that was loaded whole
        state = in_dtype(value_model, whole_state(value_model), dtype)
        if processes.main:
            save_value_model(value_model, state, directory)
        return
    save_streamed(trunk, directory, processes, dtype, without=(DIRECTION,))
    small = whole_state(value_model, names_beside(value_model))
    if processes.main:
        save_beside(value_model, in_dtype(value_model, small, dtype), directory)


def load_model(model: nn.Module, directory: Path, saved: Callable[[], nn.Module]) -> None:
    """By slices where the model was loaded so."""
    if hasattr(model, "on_disk"):
        load_streamed(model, directory)
    else:
        load_whole_state(model, saved().state_dict())


def load_value_model(value_model: nn.Module, directory: Path) -> None:
    trunk = backbone(value_model)
    if trunk is None or not hasattr(trunk, "on_disk"):
        load_whole_state(value_model, load_critic(directory).state_dict())
        return
    load_streamed(trunk, directory)
    load_whole_state(value_model, read_beside(value_model, directory), names_beside(value_model))


def load_tensors(model: nn.Module, path: Path) -> None:
    """Reads this process's share of a file that has every tensor of the state dict under its name."""
    read_into(model, Weights({name: (path, name) for name in model.state_dict()}))
