"""token_stats in C++ beyond what every backend promises: each instruction set, bits that depend on nothing but the row, memory.

Bound of the statistics: 2e-6*(1+|x|) against float64 (float64 logits: 1e-12). The tests of all backends hold the rest.
"""

import threading

import pytest
import torch

from dqo_kernels.core import dispatch
from dqo_kernels.token_stats import statistics
from tests.kernels.stats_cases import all_fields, closed_gradient, make, oracle

_cpu = pytest.importorskip("dqo_kernels._cpu", reason=dispatch.unavailable("cpp"))
from dqo_kernels.core import cpu_threads  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Around the vectors of 4, 8 and 16 lanes, their blocks of four, and the segments of 2048.
VOCABS = (1, 2, 3, 15, 16, 17, 31, 65, 2047, 2048, 2049, 4097, 5000)


@pytest.fixture(params=_cpu.instruction_sets())
def isa(request):
    before = _cpu.instruction_set()
    _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(before)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    cpu_threads.borrow_pool()


def run(z, actions, z_ref, upstream, mask=None, temperature=1.0, softcap=None):
    """Statistics, and the gradient of sum(upstream * (logprobs, lse, entropy, kl))."""
    z = z.detach().requires_grad_()
    stats = statistics(z, actions, z_ref, mask, temperature, softcap, "cpp")
    fields = all_fields(stats)
    (gradient,) = torch.autograd.grad((fields * upstream.to(fields.dtype)).sum(), z)
    return [field.detach() for field in stats], gradient


def same(a, b):
    """Bit for bit, and NaN like NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def all_same(a, b):
    return all(map(same, [*a[0], a[1]], [*b[0], b[1]]))


def awkward(vocab, dtype):
    """Rows that meet every special case, and which of them have an infinite KL; rows 10 and 11 are NaN."""
    z, z_ref, actions, upstream = make(vocab, 15, vocab, torch.float64)
    actions[14] = vocab - 1
    z[1], z_ref[1] = z[1] + 100, z_ref[1] - 100
    z[2], z_ref[2] = z[2] - 100, z_ref[2] + 100
    column = torch.arange(vocab)
    others = column != actions[:, None]
    scattered, early, late = others & (column % 3 != 1), others & (column < 2048), others & (column >= 2048)
    for row, hole in ((3, scattered), (4, early), (5, late), (6, others)):
        z[row, hole[row]] = -torch.inf
    for row, hole in ((3, scattered), (4, early)):  # where the policy cannot go either
        z_ref[row, hole[row]] = -torch.inf
    for row, hole in ((7, scattered), (8, early), (9, late)):  # where it can
        z_ref[row, hole[row]] = -torch.inf
    infinite = torch.zeros(15, dtype=torch.bool)
    infinite[7:10] = torch.stack([scattered[7].any(), early[8].any(), late[9].any()])
    z[10, vocab // 2] = torch.nan
    z_ref[11, vocab - 1] = torch.nan
    z[12] = z[12, 0]  # all equal
    z[13], z_ref[13] = z[13] * 10, z_ref[13] * 10
    z[14] -= 2000.0 * early[14]  # finite, but of probability 0 beside the rest
    z_ref[14, early[14]] = -torch.inf
    return z.to(dtype), z_ref.to(dtype), actions, upstream, infinite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"temperature": True}, {"temperature": True, "softcap": 30.0}], ids=len)
def test_every_instruction_set_computes_the_closed_forms_at_awkward_sizes(isa, dtype, options):
    low = dtype != torch.float64
    softcap = options.get("softcap")
    for vocab in VOCABS:
        z, z_ref, actions, upstream, infinite = awkward(vocab, dtype)
        infinite &= softcap is None  # which makes -inf finite
        temperature = torch.linspace(0.5, 2.0, len(z), dtype=torch.float64) if options else torch.tensor(1.0).double()
        mask = torch.arange(len(z)) != 1 if vocab % 2 else None
        stats, gradient = run(z, actions, z_ref, upstream, mask, temperature, softcap)
        if mask is not None:
            assert not any(field[1] for field in stats) and not gradient[1].any()
        kept = torch.ones(len(z), dtype=torch.bool) if mask is None else mask
        expected, policy, ref = oracle(z, z_ref, actions, temperature, softcap)
        tolerance = 2e-6 if low else 1e-12
        capping = 4 * 2**-24 * softcap if low and softcap else 0.0  # as in test_token_stats.py
        for value, want in zip(stats, expected, strict=True):
            nan, finite = want.isnan(), want.isfinite()
            assert torch.equal(value.isnan() & kept, nan & kept)
            assert torch.equal(value.double()[kept & ~nan & ~finite], want[kept & ~nan & ~finite])
            close = (value.double() - want).abs() <= tolerance * (1 + want.abs()) + capping
            assert close[kept & finite].all(), (vocab, close)
        poisoned = torch.tensor([row in (10, 11) for row in range(len(z))])
        assert gradient[poisoned].isnan().all()
        rows = kept & ~infinite & ~poisoned
        exact = closed_gradient(z, z_ref, actions, upstream, temperature, softcap)[rows]
        storing = exact.abs() * {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0) + 2**-25 * low
        # The terms p*A, p*u, p*u_ref of a gradient may be far larger than their sum.
        p, u, u_ref = (torch.from_numpy(x) for x in (policy.probs, policy.scaled, ref.scaled))
        u, u_ref = u - expected[1][:, None], u_ref - expected[4][:, None]
        factor = expected[2].abs() + expected[5].abs()
        terms = p * (factor[:, None] + u.abs() + u_ref.abs()).masked_fill(p == 0, 0)
        bound = tolerance * (1 + terms.amax(-1)[rows]) / temperature.expand(len(z))[rows]
        error = (gradient[rows].double() - exact).abs()
        worst = ((error - storing).amax(-1) / bound).max().item()
        assert worst <= 1, (vocab, worst)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_each_field_alone_takes_its_own_specialisation_to_the_same_gradient(isa, softcap):
    z, z_ref, actions, upstream = make(1, 6, 2100, torch.float32)
    for fields in ([0], [1], [2], [3], [0, 1], [0, 3], [2, 3]):
        live = z.clone().requires_grad_()
        stats = all_fields(statistics(live, actions, z_ref, None, 0.7, softcap, "cpp"))
        separate = [statistics(live, actions, z_ref, None, 0.7, softcap, "cpp")[(0, 1, 2, 5)[i]] for i in fields]
        (got,) = torch.autograd.grad([x.sum() for x in separate], live)
        only = torch.zeros_like(upstream)
        only[fields] = 1.0
        exact = closed_gradient(z, z_ref, actions, only, 0.7, softcap)
        assert (got.double() - exact).abs().max() <= 4e-6 * (1 + exact.abs().max()), fields
        assert stats.shape == (4, 6)


def test_an_unknown_instruction_set_is_refused_with_those_that_run():
    before = _cpu.instruction_set()
    with pytest.raises(ValueError, match="'mmx' cannot run here; these can: " + ", ".join(_cpu.instruction_sets())):
        _cpu.use_instruction_set("mmx")
    assert _cpu.instruction_set() == before and _cpu.instruction_sets()[-1] == "portable"


@pytest.mark.parametrize("pool", ["borrowed", "own"])
def test_the_number_of_threads_changes_no_bit(isa, pool, restore_threads):
    if pool == "borrowed" and cpu_threads.POOL is None:
        pytest.skip("no OpenMP runtime of torch was found")
    if pool == "own":
        _cpu.use_openmp(0)
    z, z_ref, actions, upstream = make(2, 70, 17_001, torch.float32)  # enough work for more than two threads of its own
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(z, actions, z_ref, upstream))
    concurrent = [None, None]

    def call(i):
        concurrent[i] = run(z, actions, z_ref, upstream)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    [caller.start() for caller in callers], [caller.join() for caller in callers]
    assert all(all_same(other, results[0]) for other in results[1:] + concurrent)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gives_the_same_bits_alone_in_a_batch_at_any_address_and_stride(isa, dtype):
    z, z_ref, actions, upstream = make(3, 6, 4099, dtype)  # odd: every row of the batch starts at another alignment
    batch = run(z, actions, z_ref, upstream, temperature=0.7)
    for row in range(6):
        moved = torch.empty(4099 + row + 3, dtype=dtype)[row + 3 :][None].copy_(z[row])
        alone = run(moved, actions[[row]], z_ref[[row]], upstream[:, [row]], temperature=0.7)
        assert all_same(alone, ([field[[row]] for field in batch[0]], batch[1][[row]]))
    wide, wide_ref = (torch.full((2, 4, 4101), torch.nan, dtype=dtype) for _ in range(2))
    wide[:, :-1, :-2], wide_ref[:, :-1, 1:-1] = z.view(2, 3, 4099), z_ref.view(2, 3, 4099)
    sliced = run(wide[:, :-1, :-2], actions, wide_ref[:, :-1, 1:-1], upstream, temperature=0.7)
    assert sliced[1].shape == (2, 3, 4099) and sliced[1].is_contiguous()
    assert all_same((sliced[0], sliced[1].view(6, 4099)), batch)


@pytest.mark.parametrize(
    ("dtype", "vocab", "megabytes"),
    [
        (torch.float32, 5001, 34),
        (torch.bfloat16, 4099, 9),
        (torch.float16, 333, 9),
        (torch.float32, 19, 9),
        (torch.float16, 3, 9),
    ],
    ids=str,
)
def test_a_large_gradient_past_the_caches_has_the_bits_of_a_small_one(isa, dtype, vocab, megabytes):
    # From 8 MiB on stores bypass the caches, from 32 MiB on the fresh gradient is also advised onto huge pages.
    rows = megabytes * 2**20 // (vocab * dtype.itemsize)
    few = 1 + 2**20 // (vocab * dtype.itemsize)
    z, z_ref, actions, upstream = make(4, few, vocab, dtype)
    once = run(z, actions, z_ref, upstream)[1]
    repeats = rows // few + 1
    big, big_ref = z.repeat(repeats, 1), z_ref.repeat(repeats, 1)
    mask = torch.ones(len(big), dtype=torch.bool)
    mask[5] = False
    got = run(big, actions.repeat(repeats), big_ref, upstream.repeat(1, repeats), mask)[1]
    assert not got[5].any()
    got[5] = once[5 % few]
    assert all(same(part, once) for part in got.split(few))


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_rows_have_no_divergence_and_no_log_probability_is_positive(isa, dtype):
    temperature = torch.tensor([0.3, 0.7, 1.7] * 3, dtype=torch.float64)
    for vocab in (*range(1, 71), 2047, 2048, 2049, 2065, 4099, 6150):
        z, _, actions, _ = make(vocab, 9, vocab, dtype, scale=20.0)
        actions[:6] = z.argmax(-1)[:6]
        for softcap in (None, 15.0):
            stats = statistics(z, actions, z.clone(), None, temperature, softcap, "cpp")
            assert torch.equal(stats.kl, torch.zeros_like(stats.kl)), (vocab, softcap)
            assert torch.equal(stats.logprobs, stats.ref_logprobs) and torch.equal(stats.lse, stats.ref_lse)
            assert (stats.logprobs <= 0).all(), (vocab, softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_the_float32_ones_rounded_as_torch_rounds(isa, dtype):
    rows = 80
    z, z_ref, actions, upstream = make(8, rows, 515, dtype)
    upstream *= (
        torch.logspace(-12, 8, rows, dtype=torch.float64) if dtype == torch.float16 else torch.logspace(-40, 38, rows)
    )
    upstream[0, 7] = torch.nan
    got = run(z, actions, z_ref, upstream)[1]
    want = run(z.float(), actions, z_ref.float(), upstream)[1].to(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    kinds = (want.isinf(), want.isnan(), (want != 0) & (want.abs() < tiny), want == 0)
    assert all(kind.any() for kind in kinds)  # the rounding is tried on each of them
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.view(torch.int16)[~want.isnan()], want.view(torch.int16)[~want.isnan()])
