"""Makes Triton's interpreter faster: every call of a kernel, and of a function inside one, searches all of triton.language for
what it replaces, and replaces it, which is half of a small kernel's time. Here it searches once, and a function inside a kernel
finds what the kernel has replaced."""

import functools
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
    np_dtype, of_scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: of_scalar(dtype) if type(dtype) is tl.dtype else np_dtype(dtype)
    if hasattr(interpreter, "_LangPatchScope"):  # of the version that restores what it replaced
        patch = interpreter._patch_lang

        @functools.cache
        def languages(function):
            return [part for part in function.__globals__.values() if part is tl or part is tl.core]

        def patch_lang(function):
            new = any(tl.core.is_builtin(part.load) for part in languages(function))
            return patch(function) if new else interpreter._LangPatchScope()

        interpreter._patch_lang = patch_lang
