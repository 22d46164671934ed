"""Makes Triton's interpreter faster: every call of a kernel, and of a function inside one, searches all of triton.language for
what it replaces, which is a third of a small kernel's time. Here it searches once."""

import importlib.util
import inspect
import os
import types


def install() -> None:
    """From now on in this process, where Triton is, and its interpreter is asked for."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    parts = [tl, tl.core, tl.math, *(value for value in vars(tl.core).values() if inspect.isclass(value))]
    builtins = {part: [name for name, value in inspect.getmembers(part) if tl.core.is_builtin(value)] for part in parts}

    def getmembers(part, *predicate):
        if part not in builtins or predicate:
            return inspect.getmembers(part, *predicate)
        return [(name, getattr(part, name)) for name in builtins[part]]

    interpreter.inspect = types.SimpleNamespace(**vars(inspect) | {"getmembers": getmembers})
