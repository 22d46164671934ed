"""Registration with torch.library, and the way from an operation to the kernels of one backend.

Every native operation is `torch.ops.dqo_kernels.<name>`: functional, with a fake implementation (so that torch.compile and
FakeTensor see shapes) and an autograd formula. Its last argument names the backend, which `dispatch.choose` has picked.

Eager calls on plain tensors do not pass through the registered operation but through an autograd.Function of the same formula:
torch.library's Python layer costs 10 us a call, and 100 us where it records a gradient of an operation with many arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("dqo_kernels", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)


class Operation:
    """An operation by its schema; the same implementation serves every device, because it is told its backend."""

    def __init__(self, schema: str, implementation: Callable, fake: Callable):
        self.name = schema.partition("(")[0]
        self.implementation = implementation
        self.function: type[torch.autograd.Function] | None = None
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dqo_kernels::{self.name}", fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.dqo_kernels, self.name).default

    def differentiable(self, save: Callable, gradient: Callable) -> None:
        """Autograd: save(ctx, inputs, output), then gradient(ctx, *gradients). Gradients that are absent arrive as None."""

        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def forward(ctx, *inputs):
            output = self.implementation(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
        self.function = type(self.name, (torch.autograd.Function,), methods)
        torch.library.register_autograd(self.registered.name(), gradient, setup_context=setup_context, lib=LIBRARY)

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


def run(op: str, direction: str, backend: str, *arguments, **options):
    """`direction` (fwd, bwd, ...) of `dqo_kernels/<op>_<backend>.py`, on the device of the first argument."""
    function = getattr(importlib.import_module(f"dqo_kernels.{op}_{backend}"), direction)
    device = arguments[0].device
    if device.type != "cuda":
        return function(*arguments, **options)
    with torch.cuda.device(device):
        return function(*arguments, **options)
