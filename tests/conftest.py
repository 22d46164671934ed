"""Without a CUDA device Triton kernels run in Triton's interpreter, which has to be asked for before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    for item in items:
        if torch.cuda.is_available():
            if item.path.name.startswith("test_triton"):  # these run on the GPU then, not in the interpreter
                item.add_marker("gpu")
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use; there is none here"))
