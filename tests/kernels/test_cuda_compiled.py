"""What nvcc made of csrc/cuda: resources of every kernel, wide accesses in flight, and a module that loads without a driver."""

import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import cuda_resources
from benchmarks.gpu.cuda_resources import KERNELS, kernel_name, output_of, tool

BUILT = cuda_resources.extension()
WITHOUT = "dqo_kernels._cuda is not built: no nvcc, or DQO_KERNELS_CUDA=0" if BUILT is None else "there is no cuobjdump"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BUILT is None or tool("cuobjdump") is None, reason=WITHOUT)]
ROW_REGISTERS = 128  # two blocks of 256 threads on a multiprocessor
SCAN_REGISTERS = 64  # a block of 1024


def assert_fits(found: dict[str, list[dict[str, int]]]):
    for name, instances in found.items():
        for used in instances:
            assert used["stack"] == 0 and used["local"] == 0, (name, used)
            is_scan = name.startswith(("lambda_return", "soft_bellman"))
            assert used["registers"] <= (SCAN_REGISTERS if is_scan else ROW_REGISTERS), (name, used)


def test_every_kernel_fits_and_spills_nothing():
    found = cuda_resources.machine_code(BUILT)
    assert {name: len(instances) for name, instances in found.items()} == KERNELS
    assert_fits(found)
    # Only what the device reserves of each block: launches ask for the rest.
    assert {used["shared"] for instances in found.values() for used in instances} == {1024}
    for row in cuda_resources.one_pass_shapes():
        assert 1 <= row["cluster"] <= 8 and row["columns"] * row["cluster"] >= row["vocab"]
        assert row["bytes"] + 1024 <= (228 * 1024 // 2 if row["bytes"] < 2**17 else 228 * 1024)  # of a multiprocessor


def test_it_holds_code_for_hopper_and_ptx_for_other_devices():
    listed = output_of(tool("cuobjdump"), "-lelf", "-lptx", str(BUILT)).stdout
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
    return instructions(output_of(tool("cuobjdump"), "-sass", str(BUILT)).stdout)


WIDE = "LDG.E.NA.128"  # 16 bytes, not kept in the first-level cache
COPY = "LDGSTS.E.BYPASS.128"  # the same, to shared memory while the thread goes on


def test_kernels_of_rows_read_and_write_16_bytes_several_at_a_time(sass):
    for name, code in sass.items():
        if kernel_name(name) not in ("token_stats_forward_kernel", "token_stats_backward_kernel"):
            continue
        at = [i for i, (text, *_) in enumerate(code) if WIDE in text]
        assert at and len(at) % 4 == 0, name
        for group in range(0, len(at), 4):
            first, last = at[group], at[group + 3]
            assert last - first < 40, name
            barriers = {code[i][1] for i in at[group : group + 4]}
            waits = [wait for _, _, wait in code[first + 1 : last + 1]]
            assert not any(wait >> barrier & 1 for wait in waits for barrier in barriers), name
        assert "forward" in kernel_name(name) or any("STG.E.128" in text for text, *_ in code), name


def test_the_one_pass_kernel_copies_the_next_row_while_it_writes_a_gradient(sass):
    for name, code in sass.items():
        if kernel_name(name) == "one_pass_kernel":
            texts = [text for text, *_ in code]
            copies = [i for i, text in enumerate(texts) if COPY in text]
            models = 1 if "RefE0" in name else 2
            assert len(copies) == 2 * models, name  # of the first row, and of the next one in the gradient's loop
            written = [i for i, text in enumerate(texts) if "STG.E.128" in text]
            assert any(copies[0] < i < copies[-1] for i in written), name


def test_no_kernel_uses_local_memory_or_sums_by_atomics(sass):
    assert len(sass) == sum(KERNELS.values())
    for name, code in sass.items():
        operations = {re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text, *_ in code}
        assert not [x for x in operations if x.startswith(("LDL", "STL"))], name
        atomics = [x for x in operations if x.startswith(("RED", "ATOM"))]
        assert not any("F32" in x or "F64" in x or "F16" in x for x in atomics), name
        assert not atomics or kernel_name(name) == "one_pass_kernel", name  # its tickets


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so there is a driver")
def test_it_loads_without_a_driver_and_says_why_it_cannot_run():
    script = (
        "import dqo_kernels, torch; from dqo_kernels.core import dispatch; print(dispatch.unavailable('cuda', 'cuda'))"
    )
    script += "; dqo_kernels.token_stats(torch.zeros(1, 2), torch.tensor([0]), backend='cuda')"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, env=environment)
    assert "the CUDA runtime finds no usable device" in done.stdout, done.stdout + done.stderr
    assert "RuntimeError: backend 'cuda' has no token_stats for device 'cpu'" in done.stderr


@pytest.mark.aot
@pytest.mark.skipif(tool("ptxas") is None, reason="there is no ptxas")
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_ptx_compiles_for_other_devices_without_spills(target):
    found = cuda_resources.compiled_for(BUILT, target)
    clusters = ("one_pass_kernel", "reset_kernel", "rescale_kernel") if int(target[3:]) < 90 else ()
    assert {name: len(instances) for name, instances in found.items()} == {
        name: count for name, count in KERNELS.items() if name not in clusters
    }
    assert_fits(found)
