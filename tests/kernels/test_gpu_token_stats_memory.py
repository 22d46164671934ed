"""Which memory the launchers of token_stats in Triton and CUDA write to and read from, on a GPU or as gpu_backends.py says."""

import itertools
import mmap
import multiprocessing
from ctypes import CDLL, c_int, c_size_t, c_void_p

import numpy as np
import pytest
import torch

from dqo_kernels.core import dispatch
from dqo_kernels.core.row_stats import RowStats
from tests.kernels.gpu_backends import BACKENDS, DEVICE, launchers, on_device
from tests.kernels.stats_cases import make

SPLIT = 32768  # columns of a forward program, in both
PLAIN = (None, None, 1.0, 0.0)  # no mask, no temperatures; temperature, softcap
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(params=BACKENDS)
def kernels(request):
    return launchers("token_stats", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_is_written_where_it_is_asked_for(kernels, dtype):
    # The linear forms ask for bfloat16 of float32 logits, and go on with what is returned.
    if dtype == torch.float16 and kernels.__name__.endswith("cuda"):
        return  # takes float32 and bfloat16
    z, z_ref, actions, upstream = on_device(*make(4, 3, 200, torch.float32))
    given = (z, actions, z_ref, *PLAIN)
    given = (*given, *kernels.fwd(*given).saved(), *upstream.float().unbind())
    room = torch.full(z.shape, torch.nan, dtype=dtype, device=DEVICE)
    grad = kernels.bwd(*given, out=room)
    assert grad is room
    assert torch.equal(grad, kernels.bwd(*given).to(dtype))


@pytest.mark.skipif(DEVICE == "cuda", reason="compute-sanitizer sees that there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [13, 1029, SPLIT + 61])
def test_no_word_lies_across_the_end_of_an_array(kernels, vocab, dtype):
    emulated = getattr(dispatch._cuda, "end_arrays", None)
    if kernels.__name__.endswith("triton") or emulated is None:
        pytest.skip("of the emulation of CUDA")
    z, z_ref, actions, upstream = make(vocab, 3, vocab, dtype)
    grad = torch.empty_like(z)
    emulated([x.data_ptr() + x.nbytes for x in (z, z_ref, grad)])
    try:
        given = (z, actions, z_ref, *PLAIN)
        kernels.bwd(*given, *kernels.fwd(*given).saved(), *upstream.float().unbind(), out=grad)
    finally:
        emulated([])


@pytest.mark.skipif(DEVICE == "cuda", reason="protects pages of the CPU's memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_beside_the_rows_is_touched(kernels, dtype):
    # Rows at the very beginning or end of pages whose neighbours cannot be read; in a child, because that is the end of it.
    libc, page = CDLL(None), mmap.PAGESIZE
    libc.mprotect.argtypes = (c_void_p, c_size_t, c_int)
    kept = []

    def guarded(x, at_end):
        pages = -(-x.numel() * x.itemsize // page)
        kept.append(memory := mmap.mmap(-1, (pages + 2) * page))
        room = torch.frombuffer(memory, dtype=x.dtype)
        first = (pages + 1) * page // x.itemsize - x.numel() if at_end else page // x.itemsize
        for guard in (0, (pages + 1) * page):
            assert libc.mprotect(room.data_ptr() + guard, page, 0) == 0
        return room[first : first + x.numel()].view(x.shape).copy_(x)

    cases = []
    for vocab, at_end in itertools.product([1, 3, 8, 61, 1029], [False, True]):
        z, z_ref, actions, upstream = make(vocab, 3, vocab, dtype)
        want = kernels.fwd(z, actions, z_ref, *PLAIN)
        grad = guarded(torch.zeros_like(z), not at_end)
        given = (guarded(z, at_end), actions, guarded(z_ref, not at_end), *PLAIN)
        cases.append((given, want.saved(), upstream.float().unbind(), grad, want))

    def child():
        for given, saved, upstream, grad, want in cases:
            got = kernels.fwd(*given)
            assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(got, want, strict=True))
            kernels.bwd(*given, *saved, *upstream, out=grad)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(600)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.parametrize("vocab", [5, 1029, 8192, 8195])  # 8192: whole tiles, where the first begins with the row
def test_the_gradient_takes_the_place_of_the_logits_or_is_rounded_beside_them(kernels, vocab):
    z, z_ref, actions, upstream = on_device(*make(vocab, 4, vocab, torch.float32))
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    inputs = (actions, z_ref, mask, None, 1.0, 0.0)
    rest = (*inputs, *kernels.fwd(z, *inputs).saved(), *upstream.float().unbind())
    want = kernels.bwd(z, *rest)
    room = torch.full((z.numel() + 2,), 7.0, dtype=torch.bfloat16, device=DEVICE)
    for odd in (0, 1):  # an address that is no multiple of 16 bytes
        out = room[odd : odd + z.numel()].view(z.shape)
        assert torch.equal(kernels.bwd(z, *rest, out=out), want.bfloat16())
        assert room[-1] == 7.0
    copy = z.clone()
    assert kernels.bwd(copy, *rest, out=copy) is copy
    assert torch.equal(copy, want)


def test_no_field_beyond_the_rows_is_written(kernels, monkeypatch):
    fields = []

    def with_room(logits, n, with_reference):
        sizes = [n] * 5 + [n * with_reference] * 5
        fields[:] = [torch.full((size + 1,), 7.0, device=logits.device) for size in sizes]
        return RowStats(*(x[:-1] for x in fields))

    monkeypatch.setattr(RowStats, "empty", with_room)
    for vocab in (5, SPLIT + 5):
        z, z_ref, actions, _ = on_device(*make(14, 3, vocab, torch.float32))
        kernels.fwd(z, actions, z_ref, *PLAIN)
        assert len(fields) == 10 and all(x[-1] == 7.0 for x in fields)
