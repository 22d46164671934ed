"""What pytest, compute-sanitizer and ncu print, in the forms that benchmarks/gpu/tools.py has to read."""

from benchmarks.gpu.tools import METRICS

PASSED = """\
........................................................................ [ 66%]
......s...s.........................                                     [100%]
=========================== short test summary info ============================
SKIPPED [1] tests/kernels/test_gemm.py:70: needs two GPUs
SKIPPED [2] tests/kernels/test_library.py: torch without gloo: nothing to do
106 passed, 3 skipped, 3329 deselected, 2 warnings in 71.30s (0:01:11)
"""
FAILED = """\
.sFFxE                                                                   [100%]
=================================== FAILURES ===================================
E   assert 1 == 2
ERROR    root:test_x.py:9 a line of a captured log
=========================== short test summary info ============================
FAILED tests/test_x.py::test_c[1] - assert 1 == 2
FAILED tests/test_x.py::test_c[a b] - AssertionError: assert 'a b' == 2
ERROR tests/test_x.py::test_e - ValueError: boom
SKIPPED [1] tests/test_x.py:3: no such
!!!!!!!!!!!!!!!!!!!!!!!!!! stopping after 10 failures !!!!!!!!!!!!!!!!!!!!!!!!!!
2 failed, 1 passed, 1 skipped, 1 xfailed, 1 error in 0.63s
"""

CLEAN = """\
========= COMPUTE-SANITIZER
token_stats        triton   one model, float32                         0.01 / 0.00  ok
small cases: 44 agree, 0 fail, 0 refused
========= ERROR SUMMARY: 0 errors
"""
OUT_OF_BOUNDS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _backward_kernel+0x160 in token_stats_triton_kernels.py:61
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f6510a00001 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx [0x3a1e2c] in libcuda.so.1
=========
========= Invalid __global__ write of size 4 bytes
=========     at void dqo::fold<float, (int)8>(const float *, float *)+0x70 in token_stats.cu:12
=========
========= ERROR SUMMARY: 14 errors
========= ERROR SUMMARY: 4 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
NO_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sumKernel(int *, int *)+0x6a0 in racecheck_demo.cu:17
=========     and Read access at sumKernel(int *, int *)+0x7d0 in racecheck_demo.cu:22 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
WARNED = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n"
UNSUPPORTED = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
========= Program hit cudaErrorUnknown (error 999) due to "unknown error" on CUDA API call to cudaMalloc.
========= ERROR SUMMARY: 2 errors
"""
CRASHED = "========= COMPUTE-SANITIZER\n========= Error: process didn't terminate successfully\n"
COLUMNS = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
    '"Section Name","Metric Name","Metric Unit","Metric Value"'
)


def ncu_rows(launch: int, kernel: str, values: tuple[str, ...]) -> str:
    units = ("ns", "%", "register/thread", "%")
    start = f'"{launch}","912","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(8192, 1, 1)","0","9.0","Command line"'
    return "".join(f'{start},"{m}","{u}","{v}"\n' for m, u, v in zip(METRICS, units, values, strict=True))


NCU = f"""\
==PROF== Connected to process 912 (/opt/torch/bin/python3.12)
==PROF== Profiling "_forward" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 912
{COLUMNS}
{ncu_rows(0, "_forward", ("1,200,000", "91.5", "64", "n/a"))}\
{ncu_rows(1, "_backward(float *, float)", ("1000", "50", "40", "30.5"))}\
{ncu_rows(2, "_backward(float *, float)", ("3000", "90", "48", "30.5"))}"""
