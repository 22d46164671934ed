"""What nvcc made of the CUDA kernels, read from the built extension: registers, stack, spills. It needs no GPU.

    python -m benchmarks.gpu.cuda_resources         (writes benchmarks/results/cuda-resources.json, which benchmarks.report shows)

For Hopper it is read from the machine code; for other devices the PTX in the extension is compiled by ptxas first.
"""

from __future__ import annotations

import collections
import importlib.machinery
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import environment

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "cuda-resources.json"
# Kernels by name, and how many instances: dtypes, softcap, models, and for gradients which statistics are differentiated.
KERNELS = {
    "token_stats_forward_kernel": 3 * 2 * 2,
    "token_stats_merge_kernel": 3 * 2 * 2,
    "token_stats_backward_kernel": 4 * 2 * 4,
    "lambda_return_forward_kernel": 1,
    "lambda_return_backward_kernel": 1,
    "soft_bellman_forward_kernel": 1,
    "soft_bellman_backward_residual_kernel": 1,
    "one_pass_kernel": 3 * 2 * 3,
    "reset_kernel": 1,
    "rescale_kernel": 3,
}
TARGETS = ("sm_80", "sm_100")  # beside Hopper
ONE_PASS = ((32000, "bfloat16"), (128256, "bfloat16"), (151936, "bfloat16"), (151936, "float32"))


def extension() -> Path | None:
    """The built dqo_kernels._cuda, or None."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return next((path for end in suffixes if (path := ROOT / "dqo_kernels" / f"_cuda{end}").exists()), None)


def tool(name: str) -> str | None:
    """Of the toolkit, or of the package triton, which carries it."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton else Path()
    return str(path) if path.is_file() else None


def output_of(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, **options)


def kernel_name(mangled: str) -> str:
    return next((name for name in KERNELS if f"{len(name)}{name}" in mangled), mangled)


def read_machine_code(report: str) -> dict[str, list[dict[str, int]]]:
    """{kernel: [{"registers", "stack", "local", "shared"} of each instance]} of what cuobjdump says."""
    found = collections.defaultdict(list)
    for function, usage in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", report):
        said = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        found[kernel_name(function)].append(
            {"registers": said["REG"], "stack": said["STACK"], "local": said["LOCAL"], "shared": said["SHARED"]}
        )
    return found


def read_ptxas(report: str) -> dict[str, list[dict[str, int]]]:
    """The same of what ptxas -v says, without shared memory; "local" are the bytes that it spilled."""
    found = collections.defaultdict(list)
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    )
    for function, stack, spilled, registers in re.findall(pattern, report, re.S):
        usage = {"registers": int(registers), "stack": int(stack), "local": int(spilled)}
        found[kernel_name(function)].append(usage)
    return found


def machine_code(path: Path) -> dict[str, list[dict[str, int]]]:
    return read_machine_code(output_of(tool("cuobjdump"), "--dump-resource-usage", str(path)).stdout)


def compiled_for(path: Path, target: str) -> dict[str, list[dict[str, int]]]:
    """Of the PTX that a device of this kind would compile."""
    with tempfile.TemporaryDirectory() as folder:
        output_of(tool("cuobjdump"), "-xptx", "all", str(path.resolve()), cwd=folder)
        sources = sorted(Path(folder).glob("*.ptx"))
        if int(target[3:]) < 90:
            sources = [source for source in sources if ".sm_80." in source.name]

        def compile_one(source: Path) -> str:
            return output_of(tool("ptxas"), f"-arch={target}", "-v", str(source), "-o", f"{source}.cubin").stderr

        with ThreadPoolExecutor(2) as pool:
            return read_ptxas("\n".join(pool.map(compile_one, sources)))


def one_pass_shapes() -> list[dict]:
    """How the one-pass kernel divides rows, by vocabulary and dtype."""
    import dqo_kernels._cuda as _cuda
    import torch

    from dqo_kernels.core.addresses import DTYPES

    rows = []
    for vocab, dtype in ONE_PASS:
        for models in (1, 2):
            cluster, columns, shared = _cuda.one_pass_shape(vocab, DTYPES[getattr(torch, dtype)], models == 2)
            rows.append(
                {
                    "vocab": vocab,
                    "dtype": dtype,
                    "models": models,
                    "cluster": cluster,
                    "columns": columns,
                    "bytes": shared,
                }
            )
    return rows


def main() -> int:
    path = extension()
    missing = [name for name in ("cuobjdump", "ptxas") if tool(name) is None]
    if path is None or missing:
        print(
            f"cuda_resources: {'dqo_kernels._cuda is not built' if path is None else f'no {missing[0]}'}",
            file=sys.stderr,
        )
        return 1
    by_target = {"sm_90a": machine_code(path)} | {target: compiled_for(path, target) for target in TARGETS}
    version = re.search(r"release ([\d.]+)", output_of(tool("nvcc") or "nvcc", "--version").stdout)[1]
    head = {"nvcc": version, "commit": environment.commit(), "date": environment.today()}
    RESULTS.write_text(json.dumps(head | {"kernels": by_target, "one_pass": one_pass_shapes()}, indent=1) + "\n")
    print("\n".join(section(json.loads(RESULTS.read_text()))))
    return 0


def section(results: dict) -> list[str]:
    """Markdown."""
    targets = list(results["kernels"])
    lines = ["### Resources of the CUDA kernels", ""]
    lines += [
        f"By nvcc {results['nvcc']}, {results['date']}, commit {results['commit']}: `python -m benchmarks.gpu.cuda_resources`. "
        "Registers of a thread are the most over a kernel's instances; no kernel may have a stack frame or a spill.",
        "",
        "| kernel | instances | "
        + " | ".join(f"registers {target}" for target in targets)
        + " | stack and spilled bytes |",
        "| --- | " + "---: | " * (len(targets) + 2),
    ]
    for name, instances in results["kernels"]["sm_90a"].items():
        of = [results["kernels"][target].get(name, []) for target in targets]
        most = [str(max(x["registers"] for x in found)) if found else "needs clusters" for found in of]
        bytes_of = sum(x["stack"] + x["local"] for found in of for x in found)
        lines.append(f"| {name.removesuffix('_kernel')} | {len(instances)} | {' | '.join(most)} | {bytes_of} |")
    lines += ["", "How the one-pass kernel divides a row, of one model or two, among the blocks of a cluster:", ""]
    lines += [
        "| V | dtype | models | blocks | columns a block | shared KB a block |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in results["one_pass"]:
        cells = [
            *(row[key] for key in ("vocab", "dtype", "models", "cluster", "columns")),
            f"{row['bytes'] / 1024:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
