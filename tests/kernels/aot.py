"""Compiles Triton launches for a target ahead of time, without a device, and says what each needs.

    python -m tests.kernels.aot TARGET [everything]        # one JSON object a line

A process of its own: in one that has TRITON_INTERPRET set there is no compiler. Results are kept in Triton's cache.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LIMITS = {  # bytes of shared memory of a program; registers of a thread, so that 3 programs of 128 threads share 65536 (512)
    "sm_80": (163 * 1024, 168),
    "sm_90": (227 * 1024, 168),
    "sm_100": (227 * 1024, 168),
    "gfx942": (64 * 1024, 168),
}


def specialise(kernel, arguments: dict, options: dict, target: str) -> ASTSource:
    """What Triton's own launcher would compile for these arguments on this target."""
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(**arguments, **options)
    signature, constants, attributes = {}, {}, {}
    for i, (name, (kind, detail)) in enumerate(zip(bound, specialisation, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = bound[name]
        elif detail is not None:
            attributes[(i,)] = backend.parse_attr(detail)
    return ASTSource(kernel, signature, constants, attributes)


def nvidia_usage(cubin: bytes) -> dict:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}


def amd_usage(assembly: str) -> dict:
    """Scalar registers that spill go to lanes of vector registers, which is free of memory traffic: not counted."""
    used = {key: int(value) for key, value in re.findall(r"\.(vgpr_(?:spill_)?count):\s*(\d+)", assembly)}
    return {"registers": used["vgpr_count"], "spilled": used["vgpr_spill_count"]}


def compile_launch(launch, target: str) -> dict:
    kernel, _, arguments, options = launch
    source = specialise(kernel, arguments, options, target)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    usage = amd_usage(compiled.asm["amdgcn"]) if target == "gfx942" else nvidia_usage(compiled.asm["cubin"])
    return {
        "kernel": kernel.__name__, "warps": options["num_warps"], "shared": compiled.metadata.shared, **usage,
        "specialisation": f"{source.signature} {source.constants} {source.attrs}",
    }  # fmt: skip


def launches(everything: bool):
    from dqo_kernels import lambda_return_triton, soft_bellman_triton, token_stats_triton

    dtypes = [torch.bfloat16, torch.float32] + ([torch.float16] if everything else [])
    vocabs = [151936] + ([257, 32000, 50257] if everything else [])
    yield from token_stats_triton.specialisations(dtypes, vocabs, everything)
    yield from lambda_return_triton.specialisations()
    yield from soft_bellman_triton.specialisations(everything)


def main(target: str, everything: bool) -> None:
    seen = set()
    for launch in launches(everything):
        result = compile_launch(launch, target)
        if result["specialisation"] not in seen:
            seen.add(result["specialisation"])
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "everything" in sys.argv[2:])
