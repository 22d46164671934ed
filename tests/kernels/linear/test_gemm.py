"""The products of the linear forms, in every mixture of dtypes, against float64."""

import pytest
import torch

from dqo_kernels.linear import gemm

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
N, D, V = 37, 19, 211


@pytest.fixture(params=["blocks", "whole"])
def blocks(request, monkeypatch):
    """Casts of 64 rows at a time, which is the least; or of everything."""
    monkeypatch.setattr(gemm, "BLOCK_BYTES", 1 if request.param == "blocks" else 2**20)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def within(got, want, bound):
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("w_dtype", FLOATS)
def test_logits_are_not_rounded_below_float32(blocks, x_dtype, w_dtype):
    x, w, low, b = normal(0, N, D, dtype=x_dtype), normal(1, V, D, dtype=w_dtype), normal(2, N, 3), normal(3, V, 3)
    room = torch.full((N + 2, V), torch.nan)  # of a workspace only the first rows are used
    out = gemm.Products().project(x, w, room[:N])
    want, size = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    assert out.data_ptr() == room.data_ptr()
    within(out, want, D * 2**-24 * size)
    gemm.Products().add_projection(low, b.to(w_dtype), out)
    more = low.float().double() @ b.to(w_dtype).double().t()
    within(out, want + more, 2 * D * 2**-24 * (size + more.abs() + 10))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("w_dtype", FLOATS)
def test_gradients_are_sums_in_float32(blocks, x_dtype, w_dtype):
    x, w = normal(0, N, D, dtype=x_dtype), normal(1, V, D, dtype=w_dtype)
    dtype = gemm.gradient_dtype(x, w, torch.float32)
    both = x_dtype == w_dtype == torch.bfloat16
    assert dtype == (torch.bfloat16 if both and gemm.fast_bfloat16(x.device) else torch.float32)
    dz = normal(2, N, V, dtype=dtype)
    rounding = torch.finfo(dtype).eps / 2  # of a result in the dtype of dz
    out = torch.full((N, D), torch.nan, dtype=dtype)
    gemm.Products().back(dz, w, out)
    want, size = dz.double() @ w.double(), dz.double().abs() @ w.double().abs()
    within(out, want, V * 2**-24 * size + rounding * want.abs())
    for sum_dtype in {dtype, torch.float32}:
        total = torch.full((V, D), torch.nan, dtype=sum_dtype)
        gemm.Products().accumulate(dz, x, total, first=True)
        want, size = dz.double().t() @ x.double(), dz.double().abs().t() @ x.double().abs()
        within(total, want, N * 2**-24 * size + rounding * want.abs())
        gemm.Products().accumulate(dz, x, total, first=False)
        within(total, 2 * want, 2 * N * 2**-24 * size + 4 * rounding * want.abs())


def test_a_sum_over_many_workspaces_is_not_kept_in_bfloat16():
    dz, x = torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(1, 4, dtype=torch.bfloat16)
    total = torch.empty(64, 4)
    for i in range(1000):  # bfloat16 would stop at 256
        gemm.Products().accumulate(dz, x, total, first=i == 0)
    assert (total == 1000).all()


@pytest.mark.gpu
def test_a_gpu_gives_float32_logits_and_sums_of_bfloat16_factors():
    x, w, dz = (normal(i, *shape, dtype=torch.bfloat16).cuda() for i, shape in enumerate(((N, D), (V, D), (N, V))))
    out = gemm.Products().project(x, w, torch.empty(N, V, device="cuda"))
    want = x.double() @ w.double().t()
    within(out, want, D * 2**-23 * (x.double().abs() @ w.double().abs().t()))
    total = torch.full((V, D), torch.nan, device="cuda")
    for i in range(2):
        gemm.Products().accumulate(dz, x, total, first=i == 0)
    want = 2 * dz.double().t() @ x.double()
    within(total, want, N * 2**-22 * (dz.double().abs().t() @ x.double().abs()))
