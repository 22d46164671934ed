"""Without a GPU the GPU's kernels run on the CPU: Triton's in its interpreter, which has to be asked for before triton is
imported (kernels/triton_interpreter.py), those in CUDA C++ emulated (kernels/cuda_emulated.py)."""

import os
import signal

import pytest

from dqo.errors import UserError
from dqo.requirements import check_packages
from tests import figures

try:
    check_packages(["test"])
except UserError as error:
    pytest.exit(f"{error} (all that the tests need: pip install -e '.[test]')", returncode=2)

# Each worker of pytest-xdist, and what it starts, has one core; more threads wait for each other, and sums round otherwise.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Names that are nowhere are not looked for in the network, whether there is one or not.
os.environ["HF_HUB_OFFLINE"] = "1"
# What it adds shows after a loss of power alone; a short run waits for it forty times, as long as it computes.
os.fsync = os.fstat
# A shell starts what runs in the background without it, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests.kernels import cuda_emulated, triton_interpreter

    triton_interpreter.install()
    if cuda_emulated.missing() is None:
        cuda_emulated.install()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For `-n`: neighbours stay in one worker, which makes the fixtures of their module once; who is done takes of the others."""
    if config.getoption("dist") == "load":
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the test
def pytest_runtest_setup(item):
    figures.render(wanted=not figures.LOOKED_AT.isdisjoint(item.path.parts))


# Files of long tests and fixtures; the others that have a slow test come next. Last of all, one of them would keep one worker at
# work while the others have none.
LONGEST = [
    "test_sanitizers.py", "test_run.py", "test_parallel.py", "test_vocab_parallel.py", "test_docs_commands.py",
    "test_examples.py", "test_wheel.py", "test_signals.py", "test_library.py",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (order.get(item.path.name, len(order)), item.path not in slow))
    for item in items:
        if torch.cuda.is_available():
            if item.path.name.startswith(("test_gpu", "test_triton")):  # these run on the GPU then
                item.add_marker("gpu")
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use; there is none here"))
