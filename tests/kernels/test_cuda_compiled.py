"""What nvcc made of csrc/cuda: resources of every kernel, wide accesses in flight, and a module that loads without a driver."""

import collections
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import dqo_kernels

PACKAGE = Path(dqo_kernels.__file__).parent
BUILT = next(iter(PACKAGE.glob("_cuda.*")), None)
pytestmark = pytest.mark.skipif(BUILT is None, reason="dqo_kernels._cuda is not built: no nvcc, or DQO_KERNELS_CUDA=0")
REGISTERS = {"token_stats": 128, "one_pass": 128, "rescale": 128, "reset": 128}  # two blocks of 256 on a multiprocessor
SCAN_REGISTERS = 64  # a block of 1024
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


def tool(name: str) -> str:
    """Of the toolkit, or of the package triton, which carries it."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton")
        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if not found.exists():
            pytest.skip(f"{name} is neither on PATH nor in triton")
    return str(found)


def output_of(*command, **options) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, **options).stdout


def plain(mangled: str) -> str:
    """The kernel's name."""
    return next((name for name in KERNELS if f"{len(name)}{name}" in mangled), mangled)


def resources(report: str) -> dict[str, list[dict[str, int]]]:
    """{kernel: [{"REG": ..., "STACK": ..., "LOCAL": ...} of each instance]}"""
    found = collections.defaultdict(list)
    for function, usage in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", report):
        found[plain(function)].append({key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)})
    return found


def test_every_kernel_fits_and_spills_nothing():
    found = resources(output_of(tool("cuobjdump"), "--dump-resource-usage", str(BUILT)))
    assert {name: len(instances) for name, instances in found.items()} == KERNELS
    for name, instances in found.items():
        most = next((limit for prefix, limit in REGISTERS.items() if name.startswith(prefix)), SCAN_REGISTERS)
        for used in instances:
            assert used["STACK"] == 0 and used["LOCAL"] == 0, (name, used)
            assert used["REG"] <= most, (name, used)


def test_it_holds_code_for_hopper_and_ptx_for_other_devices():
    listed = output_of(tool("cuobjdump"), "-lelf", "-lptx", str(BUILT))
    assert set(re.findall(r"\.(sm_\w+)\.cubin", listed)) == {"sm_90a"}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listed)) == {"sm_80", "sm_90"}


def instructions(sass: str) -> dict[str, list[tuple[str, int, int]]]:
    """{mangled name: [(instruction, barrier that it sets or 7, mask of barriers that it waits for)]}"""
    found = {}
    for part in sass.split("Function : ")[1:]:
        words = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/", part)
        control = [(text, int(upper, 16) >> 41) for text, upper in words]  # Volta's and later encoding
        found[part.split()[0]] = [(text, bits >> 5 & 7, bits >> 11 & 63) for text, bits in control]
    return found


@pytest.fixture(scope="module")
def sass():
    return instructions(output_of(tool("cuobjdump"), "-sass", str(BUILT)))


WIDE = "LDG.E.NA.128"  # 16 bytes, not kept in the first-level cache


def test_kernels_of_rows_read_and_write_16_bytes_several_at_a_time(sass):
    models = {"token_stats_forward_kernel": [1, 2], "token_stats_backward_kernel": [1, 2], "one_pass_kernel": [1, 2]}
    for name, code in sass.items():
        if plain(name) not in models:
            continue
        at = [i for i, (text, *_) in enumerate(code) if WIDE in text]
        assert len(at) % 4 == 0 and len(at) // 4 in (1, 2, 4), name  # 4: two models of float logits, bfloat16 gradient
        for group in range(0, len(at), 4):
            first, last = at[group], at[group + 3]
            assert last - first < 40, name
            barriers = {code[i][1] for i in at[group : group + 4]}
            waits = [wait for _, _, wait in code[first + 1 : last + 1]]
            assert not any(wait >> barrier & 1 for wait in waits for barrier in barriers), name
        if "forward" not in plain(name):
            assert any("STG.E.128" in text for text, *_ in code), name


def test_no_kernel_uses_local_memory_or_sums_by_atomics(sass):
    assert len(sass) == sum(KERNELS.values())
    for name, code in sass.items():
        operations = {re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text, *_ in code}
        assert not [x for x in operations if x.startswith(("LDL", "STL"))], name
        atomics = [x for x in operations if x.startswith(("RED", "ATOM"))]
        assert not any("F32" in x or "F64" in x or "F16" in x for x in atomics), name
        assert not atomics or plain(name) == "one_pass_kernel", name  # its tickets


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so there is a driver")
def test_it_loads_without_a_driver_and_says_why_it_cannot_run():
    script = "import dqo_kernels, torch; from dqo_kernels import dispatch; print(dispatch.unavailable('cuda', 'cuda'))"
    script += "; dqo_kernels.token_stats(torch.zeros(1, 2), torch.tensor([0]), backend='cuda')"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert "the CUDA runtime finds no usable device" in done.stdout, done.stdout + done.stderr
    assert "RuntimeError: backend 'cuda' has no token_stats for device 'cpu'" in done.stderr


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_ptx_compiles_for_other_devices_without_spills(tmp_path, target):
    output_of(tool("cuobjdump"), "-xptx", "all", str(BUILT.resolve()), cwd=tmp_path)
    sources = sorted(tmp_path.glob("*.ptx"))
    assert sources
    if int(target[3:]) < 90:
        sources = [path for path in sources if ".sm_80." in path.name]

    def compile_one(path):
        command = [tool("ptxas"), f"-arch={target}", "-v", str(path), "-o", os.devnull]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stderr

    with ThreadPoolExecutor(2) as pool:
        for said in pool.map(compile_one, sources):
            assert not re.search(r"[1-9]\d* bytes (stack frame|spill)", said), said
