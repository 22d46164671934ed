"""token_stats in C++ and the process around it: far addresses, memory that must not be read, forks."""

import gc
import mmap
import multiprocessing
from ctypes import CDLL, c_int, c_size_t, c_void_p

import numpy as np
import pytest
import torch

from dqo_kernels.core import dispatch
from dqo_kernels.core.row_stats import RowStats
from tests.kernels.stats_cases import make

_cpu = pytest.importorskip("dqo_kernels._cpu", reason=dispatch.unavailable("cpp"))
from dqo_kernels import token_stats_cpp  # noqa: E402


@pytest.fixture(params=_cpu.instruction_sets())
def isa(request):
    before = _cpu.instruction_set()
    _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(before)


def directly(z, actions, z_ref, mask, upstream):
    """Both directions without autograd, whose threads do not survive a fork."""
    arguments = (z, actions, z_ref, mask, None, 1.0, 0.0)
    out = token_stats_cpp.fwd(*arguments)
    return *out, token_stats_cpp.bwd(*arguments, *out.saved(), *upstream.to(out[0].dtype).unbind())


def test_rows_may_lie_more_than_two_to_the_31_elements_apart():
    # Untouched virtual memory costs nothing; only the four rows are ever written.
    step = 2**30 + 12_345
    z, z_ref, actions, upstream = make(5, 4, 1000, torch.float16)
    try:
        far = torch.empty(3 * step + 1000, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    want = directly(z, actions, z_ref, None, upstream)
    mirrored = directly(z_ref, actions, z, None, upstream)
    for shape, stride in (((4, 1000), (step, 1)), ((2, 2, 1000), (2 * step, step, 1))):
        view = far.as_strided(shape, stride)
        view.copy_(z.view(shape))
        got = directly(view, actions, z_ref.view(shape), None, upstream)
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(got, want, strict=True))
        got = directly(z_ref.view(shape), actions, view, None, upstream)
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(got, mirrored, strict=True))
    del view, far
    gc.collect()


def in_a_fork(function):
    """Its exit status; a child that hangs is a failure."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(600)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs, "the forked child hangs"
    return child.exitcode


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs mprotect")
def test_rows_under_the_mask_are_not_read(isa):
    vocab = mmap.PAGESIZE // 4
    _, z_ref, actions, upstream = make(6, 6, vocab, torch.float32)
    memory = mmap.mmap(-1, 6 * mmap.PAGESIZE)
    z = torch.frombuffer(memory, dtype=torch.float32).view(6, vocab).copy_(z_ref.flip(0))
    mask = torch.tensor([True, False, True, False, False, True])
    masked = (~mask).numpy()
    libc = CDLL(None)
    libc.mprotect.argtypes = (c_void_p, c_size_t, c_int)

    def child():  # where reading such a row is a segmentation fault; numpy, because torch's threads do not survive a fork
        for row in masked.nonzero()[0].tolist():
            assert libc.mprotect(z[row].data_ptr(), mmap.PAGESIZE, 0) == 0
        out = [x.numpy() for x in directly(z, actions, z_ref, mask, upstream)]
        assert all(not x[masked].any() and np.isfinite(x[~masked]).all() for x in out)

    assert in_a_fork(child) == 0


def test_a_forked_child_computes_what_its_parent_did():
    z, z_ref, actions, upstream = make(7, 70, 17_001, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    before = directly(z, actions, z_ref, None, upstream)

    def child():
        after = directly(z, actions, z_ref, None, upstream)
        assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(before, after, strict=True))

    def parent_itself():
        child()
        assert in_a_fork(child) == 0

    assert in_a_fork(parent_itself) == 0
    torch.set_num_threads(threads)


def test_an_action_out_of_range_is_nan_in_its_row_and_nothing_else(isa):
    z, z_ref, actions, upstream = make(9, 6, 37, torch.float32)
    clean = directly(z, actions, z_ref, None, upstream)
    wrong = actions.clone()
    wrong[[1, 2, 4]] = torch.tensor([-1, 37, 2**62])
    got, rows = directly(z, wrong, z_ref, None, upstream), torch.tensor([0, 3, 5])
    assert all(torch.equal(a[rows], b[rows]) for a, b in zip(got, clean, strict=True))
    assert all(got[i][[1, 2, 4]].isnan().all() for i in (0, 5, 10))  # logprobs, ref_logprobs, gradient
    assert all(torch.equal(got[i], clean[i]) for i in range(10) if i not in (0, 5))
    arguments = (z, wrong, z_ref, None, None, 1.0, 0.0)
    stats = RowStats(*got[:10]).saved()
    assert token_stats_cpp.bwd(*arguments, *stats, None, *upstream[1:].float().unbind()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [5, 1050], ids=["ordinary", "streamed"])  # 8 MiB and more go past the caches
def test_the_gradient_may_take_the_place_of_the_logits(isa, dtype, rows):
    z, z_ref, actions, upstream = make(10, 5, 4099, dtype)
    copies = (rows // 5, 1), (rows // 5, 1), (rows // 5,), (1, rows // 5)
    z, z_ref, actions, upstream = (x.repeat(*n) for x, n in zip((z, z_ref, actions, upstream), copies, strict=True))
    *out, want = directly(z, actions, z_ref, None, upstream)
    stats = RowStats(*out).saved()
    arguments = (z, actions, z_ref, None, None, 1.0, 0.0, *stats, *upstream.float().unbind())
    got = token_stats_cpp.bwd(*arguments, out=z)
    assert got.data_ptr() == z.data_ptr() and torch.equal(got, want)


@pytest.mark.parametrize("rows", [5, 1050, 2100], ids=["ordinary", "streamed in float32", "streamed in both"])
def test_the_gradient_of_floats_may_be_bfloat16(isa, rows):
    z, z_ref, actions, upstream = make(11, 5, 4099, torch.float32)
    copies = (rows // 5, 1), (rows // 5, 1), (rows // 5,), (1, rows // 5)
    z, z_ref, actions, upstream = (x.repeat(*n) for x, n in zip((z, z_ref, actions, upstream), copies, strict=True))
    mask = torch.arange(rows) % 7 != 3
    *out, want = directly(z, actions, z_ref, mask, upstream)
    stats = RowStats(*out).saved()
    arguments = (z, actions, z_ref, mask, None, 1.0, 0.0, *stats, *upstream.float().unbind())
    room = torch.full((rows * 4099 + 1,), torch.nan, dtype=torch.bfloat16)
    for odd in (0, 1):  # an address that is no multiple of a vector
        got = token_stats_cpp.bwd(*arguments, out=room[odd : odd + rows * 4099].view(rows, 4099))
        assert torch.equal(got, want.bfloat16())
