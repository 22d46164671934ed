"""Without a GPU the GPU's kernels run on the CPU: Triton's in its interpreter, which has to be asked for before triton is
imported, those in CUDA C++ emulated (kernels/cuda_emulated.py)."""

import os
import signal

import pytest

from dqo.errors import UserError
from dqo.requirements import check_packages

try:
    check_packages(["test"])
except UserError as error:
    pytest.exit(f"{error} (all that the tests need: pip install -e '.[test]')", returncode=2)

import torch

# Names that are nowhere are not looked for in the network, whether there is one or not.
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell starts what runs in the background without it, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests.kernels import cuda_emulated

    if cuda_emulated.missing() is None:
        cuda_emulated.install()


def pytest_collection_modifyitems(items):
    for item in items:
        if torch.cuda.is_available():
            if item.path.name.startswith(("test_gpu", "test_triton")):  # these run on the GPU then
                item.add_marker("gpu")
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use; there is none here"))
