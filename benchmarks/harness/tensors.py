"""Memory of tensors by their storages, without what an allocator keeps: what is alive, its greatest sum, where it was made."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_PLACES = {  # functions of FSDP2 and of autograd that make what is not the user's, for `parts`
    "foreach_all_gather": "gathered, on its way",
    "init_all_gather_outputs": "gathered parameters",
    "foreach_reduce": "gradients on their way to their shards",
    "fill": "shards of weights",
    "_single_tensor_adamw": "AdamW",
    "_init_group": "averages of AdamW",
    "objective_sums": "activations",
}


class Tensors(TorchDispatchMode):
    """While it is entered, sums the storages of the tensors that operations return. Storages of one process, on any device;
    what C++ code of a backend allocates for itself is not seen.

    `most` is the greatest sum in bytes since the last `take`, and `parts` what it was made of, by where it was made.
    """

    def __init__(self, parts: bool = False):
        super().__init__()
        self._storages: dict[int, tuple[weakref.ref, str]] = {}
        self._with_parts, self._new = parts, False
        self.most, self.parts = 0, Counter()

    def note(self, *tensors: Tensor) -> None:
        """Counts tensors that were there before."""
        for tensor in tensors:
            self._see(tensor, "there before")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, Tensor):
                self._see(value, None)
        if self._new or function.namespace in ("fsdp", "c10d"):  # FSDP2 enlarges storages, and then fills them
            self._new = False
            self._sum()
        return found

    def take(self) -> int:
        found, self.most = self.most, 0
        self._sum()
        return found

    def alive(self) -> int:
        """Bytes now."""
        total = 0
        for key, (reference, _) in list(self._storages.items()):
            storage = reference()
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()  # FSDP2 gives memory back by a size of 0
        return total

    def _see(self, tensor: Tensor, origin: str | None) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is None or known[0]() is None:
            self._new = True
            self._storages[key] = weakref.ref(storage), origin or (_origin() if self._with_parts else "")

    def _sum(self) -> None:
        total = self.alive()
        if total > self.most:
            self.most = total
            if self._with_parts:
                self.parts = Counter()
                for reference, origin in self._storages.values():
                    if (storage := reference()) is not None:
                        self.parts[origin] += storage.nbytes()


def _origin() -> str:
    """Of the function that made a tensor: the innermost one that `_PLACES` knows, or that is of dqo."""
    frame, of_dqo = sys._getframe(3), ""
    for _ in range(60):
        if frame is None:
            break
        name = frame.f_code.co_name
        if name in _PLACES:
            return _PLACES[name]
        if not of_dqo and "/dqo" in frame.f_code.co_filename:
            of_dqo = f"{frame.f_code.co_filename.rpartition('/')[2]}:{name}"
        if name == "backward" and "/_tensor.py" in frame.f_code.co_filename:
            return f"backward {of_dqo}"
        frame = frame.f_back
    return of_dqo or "elsewhere"
