"""Models whose weights stay in their files until each process reads its own share: built without memory, filled by slices.

A model of `empty_model` has parameters on the meta device and real buffers, and knows where each weight lies (`Weights`). When it
is sharded, `fill` gives it memory for this process's shards and reads them, so that no process ever holds a whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from dqo.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Weights:
    """Where the weights of a model lie.

    Args:
        files: {name in the model: (file, name in the file)}.
        dtype: what they are rounded to when they are read.
    """

    def __init__(self, files: dict[str, tuple[Path, str]], dtype: torch.dtype = torch.float32):
        self.files, self.dtype = files, dtype

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows `begin` to `end` of a weight, or a scalar."""
        path, key = self.files[name]
        try:
            with safe_open(path, "pt") as file:
                found = file.get_tensor(key) if not file.get_slice(key).get_shape() else file.get_slice(key)[begin:end]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); fetch or copy it again") from error
        return found.to(self.dtype) if found.is_floating_point() else found

    def under(self, names: dict[str, str]) -> Weights:
        """The same weights under other names, {new name: name}."""
        return Weights({new: self.files[old] for new, old in names.items() if old in self.files}, self.dtype)


def weight_files(path: str) -> dict[str, tuple[Path, str]] | None:
    """{name: (file, name)} of the safetensors files of a directory or hub name; None where it has others.

    Raises:
        UserError: where one of several files is missing, or what names them is damaged.
    """
    single, index = (_file(path, name) for name in (SINGLE, INDEX))
    if index is None:
        if single is None:
            return None
        try:
            with safe_open(single, "pt") as file:
                return {name: (single, name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        except SafetensorError as error:
            raise UserError(
                f"{path!r} has a file of weights that is cut or altered ({error}); fetch it again"
            ) from error
    try:
        places: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path!r} has a damaged {INDEX} ({type(error).__name__}: {error}); fetch it again") from error
    found = {name: _file(path, name) for name in sorted(set(places.values()))}
    if missing := [name for name, file in found.items() if file is None]:
        raise UserError(
            f"{path!r} lacks {missing[0]}, which its {INDEX} names ({len(missing)} of {len(found)} files are missing); fetch or "
            "copy it again"
        )
    return {name: (file, name) for name, place in places.items() if (file := found[place]) is not None}


def _file(path: str, name: str) -> Path | None:
    if Path(path).is_dir():
        return Path(path, name) if Path(path, name).is_file() else None
    try:
        found = cached_file(path, name)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


@contextmanager
def without_memory() -> Iterator[None]:
    """Models that are made inside have their parameters on the meta device, and real buffers."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def empty_model(path: str, dtype: torch.dtype, attn_implementation: str | None, config: Any) -> PreTrainedModel | None:
    """A causal language model without memory, whose weights will be rounded to `dtype` and kept in float32; None where the files
    have other names than the model's weights, which transformers translates.

    Raises:
        UserError: where a file is missing.
    """
    files = weight_files(path)
    if files is None:
        return None
    with without_memory():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
    model.tie_weights()
    places: dict[int, tuple[Path, str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        found = next((n for n in _spellings(name, model) if n in files), None)
        if found is not None:
            places.setdefault(id(tensor), files[found])
    if not all(id(tensor) in places for tensor in state.values()):
        return None
    model.on_disk = Weights({name: places[id(tensor)] for name, tensor in state.items()}, dtype)
    with suppress(OSError, ValueError, AttributeError):  # most small models have none
        model.generation_config = type(model.generation_config).from_pretrained(path)
    model.name_or_path = path
    return model


def _spellings(name: str, model: PreTrainedModel) -> tuple[str, ...]:
    """Files of a trunk alone have no prefix."""
    return name, name.removeprefix(f"{model.base_model_prefix}.")


def is_empty(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def home(model: PreTrainedModel) -> torch.device:
    """Where small new parts of a model are made."""
    return torch.device("cpu") if is_empty(model) else model.device


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the state dict, sorted by name, one at a time: of a model without memory from its files, of a sharded one
    gathered, which all processes must do."""
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            yield name, model.on_disk.read(name)  # type: ignore[operator, union-attr]
        else:
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Gives memory on `device` to the parameters without any, and reads them: of a sharded one this process's share. What no file
    has is 0."""
    sources: list[tuple[nn.Module, Any]] = [
        (part, part.on_disk) for part in module.modules() if hasattr(part, "on_disk")
    ]
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old.is_meta:
                if old not in made:
                    made[old] = nn.Parameter(torch.zeros_like(old, device=device), old.requires_grad)
                part._parameters[name] = made[old]
    for part, weights in sources:
        read_into(part, weights)


@torch.no_grad()
def read_into(model: nn.Module, weights: Weights) -> None:
    """Copies the weights of `weights` into the model's own, each process its share."""
    done = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in weights.files or id(tensor) in done:
            continue
        done.add(id(tensor))
        if isinstance(tensor, DTensor):
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            local = tensor.to_local()
            if local.numel():
                local.copy_(weights.read(name, offset[0], offset[0] + shape[0]))
        else:
            tensor.detach().copy_(weights.read(name))
