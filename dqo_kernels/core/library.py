"""Registration with torch.library, and the way from an operation to the kernels of one backend.

Every native operation is `torch.ops.dqo_kernels.<name>`: functional, with a fake implementation (so that torch.compile and
FakeTensor see shapes) and an autograd formula. Its last argument names the backend, which `dispatch.choose` has picked.

Eager calls on plain tensors do not pass through the registered operation but through an autograd.Function of the same formula:
torch.library's Python layer costs 10 us a call, and 100 us where it records a gradient of an operation with many arguments.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dqo_kernels.core import checks

LIBRARY = torch.library.Library("dqo_kernels", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)


class _Once(torch.autograd.Function):
    """Passes gradients on; differentiating them again is refused instead of giving nothing in silence."""

    @staticmethod
    def forward(ctx, name, *gradients):
        ctx.name = name
        return tuple(x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"dqo_kernels::{ctx.name} has no second derivative; backend='reference' has one")


def once_differentiable(name: str):
    """For the backward of an autograd.Function. torch's decorator of this name refuses a second derivative only where what
    arrives can be differentiated: after `loss.backward(create_graph=True)` there would be none, in silence."""

    def decorate(backward: Callable):
        @functools.wraps(backward)
        def wrapped(ctx, *arriving):
            again = torch.is_grad_enabled() and torch._C._len_torch_dispatch_stack() == 0
            with torch.no_grad():
                made = backward(ctx, *arriving)
            if not again:
                return made
            present = [x.detach().requires_grad_() for x in made if x is not None]
            passed = iter(_Once.apply(name, *present) if present else ())
            return tuple(x if x is None else next(passed) for x in made)

        return wrapped

    return decorate


class Operation:
    """An operation by its schema; the same implementation serves every device, because it is told its backend."""

    def __init__(self, schema: str, implementation: Callable, fake: Callable):
        self.name = schema.partition("(")[0]
        self.implementation = implementation
        self.function: Any = None  # an autograd.Function, once it is differentiable
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dqo_kernels::{self.name}", fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.dqo_kernels, self.name).default
        self._no_gradients: dict[str, Any] = dict.fromkeys(x.name for x in self.registered._schema.arguments)

    def differentiable(self, save: Callable, gradient: Callable) -> None:
        """Autograd: save(ctx, inputs, output), then gradient(ctx, *gradients). Gradients that are absent arrive as None."""

        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def forward(ctx, *inputs):
            output = self.implementation(*inputs)
            setup_context(ctx, inputs, output)
            return output

        gradient = once_differentiable(self.name)(gradient)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
        self.function = type(self.name, (torch.autograd.Function,), methods)
        torch.library.register_autograd(self.registered.name(), gradient, setup_context=setup_context, lib=LIBRARY)

    def named(self, inputs: tuple) -> dict[str, Any]:
        """The arguments of a call by their names."""
        return dict(zip(self._no_gradients, inputs, strict=True))

    def gradients(self, **present: Tensor | None) -> tuple:
        """What a backward returns: a gradient for each argument by its name, None for the others."""
        found = self._no_gradients | present
        if len(found) != len(self._no_gradients):
            raise TypeError(
                f"dqo_kernels::{self.name} has no argument {', '.join(present.keys() - self._no_gradients)}"
            )
        return tuple(found.values())

    def differentiable_once(self) -> None:
        """For an operation of a backward: differentiating it again is refused instead of giving nothing in silence."""

        def gradient(ctx, *gradients):
            raise RuntimeError(f"dqo_kernels::{self.name} has no second derivative; backend='reference' has one")

        self.differentiable(lambda ctx, inputs, output: None, gradient)

    def __call__(self, *arguments):
        if traced(arguments):
            return self.registered(*arguments)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return self.function.apply(*arguments)
        return self.implementation(*arguments)


def traced(arguments: tuple) -> bool:
    """Whether something between us and the kernel wants to see the operation: a compiler, a mode, a transform, a subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in arguments)
    )


def outside_graphs(name: str) -> None:
    """A compiler stops its graph here: what follows works in place, in memory that it holds from forward to backward."""
    if torch.compiler.is_compiling():
        cure = "leave fullgraph out; or backend='reference', or the logits form, which can be compiled"
        torch._dynamo.graph_break(
            msg=f"dqo_kernels.{name} is no part of a compiled graph in the native backends: {cure}"
        )


def in_memory(op: str, arguments: tuple) -> tuple:
    """The arguments as kernels read them, which see nothing but memory: it is there, and holds the numbers themselves."""
    found = []
    for x in arguments:
        if isinstance(x, Tensor):
            checks.stored(f"a tensor of {op}", x)
            x = x.resolve_neg() if x.is_neg() else x
        found.append(x)
    return tuple(found)


def run(op: str, direction: str, backend: str, *arguments, **options):
    """`direction` (fwd, bwd, ...) of `dqo_kernels/<op>_<backend>.py`, on the device of the first argument."""
    function = getattr(importlib.import_module(f"dqo_kernels.{op}_{backend}"), direction)
    arguments = in_memory(op, arguments)
    device = arguments[0].device
    if device.type != "cuda":
        return function(*arguments, **options)
    with torch.cuda.device(device):
        return function(*arguments, **options)
