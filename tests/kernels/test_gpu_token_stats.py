"""The launchers of token_stats in Triton and CUDA against float64 oracles, on a GPU or as gpu_backends.py says.

Bounds as in test_token_stats.py: 2e-6*(1+|x|) forward, twice the error of torch's own float32 computation backward.
"""

import itertools
import math

import pytest
import torch

from dqo_kernels.core.row_stats import RowStats
from tests.kernels.gpu_backends import BACKENDS, DEVICE, launchers, on_device
from tests.kernels.stats_cases import closed_gradient, make, oracle, torch_gradient

SPLIT = 32768  # columns of a forward program, in both
PUBLIC = [0, 1, 2, 5, 6, 7]  # logprobs, lse, entropy, ref_logprobs, ref_lse, kl: the order of stats_cases.oracle
POLICY, REFERENCE = [0, 1, 2, 3, 4], [5, 6, 8, 9]
SIZES = [2, 3, 17, 1000, 8193, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 5]

# numpy warns where inf - inf and NaN are computed in the interpreter
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(params=BACKENDS, autouse=True)
def kernels(request):
    """The module under test; `fwd` and `bwd` below call it."""
    global KERNELS
    KERNELS = launchers("token_stats", request.param)


def fwd(z, actions, z_ref=None, mask=None, temperature=1.0, softcap=0.0):
    temperatures = temperature.float() if isinstance(temperature, torch.Tensor) else None
    scalar = 1.0 if temperatures is not None else temperature
    out = KERNELS.fwd(*on_device(z, actions, z_ref, mask, temperatures), scalar, softcap)
    return [x.cpu() for x in out]


def bwd(z, actions, z_ref, fields, coefficients, mask=None, temperature=1.0, softcap=0.0):
    """coefficients of (logprobs, lse, entropy, kl), None where absent."""
    temperatures = temperature.float() if isinstance(temperature, torch.Tensor) else None
    scalar = 1.0 if temperatures is not None else temperature
    inputs = on_device(z, actions, z_ref, mask, temperatures)
    saved = on_device(*RowStats(*fields).saved())
    return KERNELS.bwd(*inputs, scalar, softcap, *saved, *on_device(*coefficients)).cpu()


def assert_fields(got, want, names=PUBLIC):
    for i, w in zip(names, want, strict=True):
        error = (got[i].double() - w).abs() / (1 + w.abs())
        assert error.max() <= 2e-6, (i, error.max())


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize(
    "vocab, dtype, offset, temperature, softcap",
    [(vocab, torch.float32, 100.0, 0.7, 0.0) for vocab in SIZES]
    # What these change is done to each element; where a row ends in its tile is the same for every dtype.
    + [(vocab, torch.bfloat16, 0.0, "rows", 0.0) for vocab in (3, 17, 8193, SPLIT + 1)]
    + [(vocab, torch.float16, 0.0, 1.3, 30.0) for vocab in (17, 1000, SPLIT - 1)]
    + [(vocab, torch.float32, 0.0, 1.0, 2.0) for vocab in (2, 1000, 2 * SPLIT + 5)],
)
def test_statistics_and_gradient_hold_their_bounds(vocab, dtype, offset, temperature, softcap):
    rows = 64 if vocab < 100 else 3  # few where the interpreter is slow
    z, z_ref, actions, upstream = make(vocab, rows, vocab, dtype, offset=offset)
    temperature = torch.linspace(0.5, 2.0, rows) if temperature == "rows" else temperature
    options = {"temperature": temperature, "softcap": softcap or None}
    want, _, _ = oracle(z, z_ref, actions, **options)
    got = fwd(z, actions, z_ref, temperature=temperature, softcap=softcap)
    assert_fields(got, want)
    assert (got[0] <= 0).all() and (got[5] <= 0).all() and (got[4] >= 0).all()
    alone = fwd(z, actions, temperature=temperature, softcap=softcap)
    assert_fields(alone, want[:3], PUBLIC[:3])
    assert all(x.shape == (0,) for x in alone[5:])

    exact = closed_gradient(z, z_ref, actions, upstream, **options)
    grad = bwd(z, actions, z_ref, got, upstream.float().unbind(), temperature=temperature, softcap=softcap)
    assert grad.dtype == dtype and grad.shape == z.shape and grad.is_contiguous()
    torchs = torch_gradient(z, z_ref, actions, upstream, **options).double()
    error, yardstick, storing = ((g - exact).square().mean().sqrt() for g in (grad.double(), torchs, exact.to(dtype)))
    luck = 2**-22 * exact.abs().max() if rows < 64 else 0.0  # the yardstick of three rows may have rounded well
    assert error <= 2 * yardstick + storing + luck


def test_a_softcap_far_above_the_logits_costs_no_accuracy():
    z, z_ref, actions, _ = make(8, 64, 3, torch.float32, scale=0.1)  # tanh(x) near x
    want, _, _ = oracle(z, z_ref, actions, softcap=100.0)
    assert_fields(fwd(z, actions, z_ref, softcap=100.0), want)


def test_every_subset_of_upstream_gradients():
    z, z_ref, actions, upstream = make(5, 2, 200, torch.float32)
    fields = fwd(z, actions, z_ref)
    for given in itertools.product([False, True], repeat=4):
        c = [x.float() if present else None for x, present in zip(upstream, given, strict=True)]
        zeroed = upstream * torch.tensor(given)[:, None]
        exact = closed_gradient(z, z_ref, actions, zeroed)
        saved = fields if given[3] else fields[:5] + [torch.empty(0)] * 5
        grad = bwd(z, actions, z_ref if given[3] else None, saved, c)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("vocab", [2, 1000, SPLIT + 100])
def test_identical_rows_have_kl_of_exactly_zero(vocab):
    z, _, actions, _ = make(1, 4, vocab, torch.float32, scale=10.0, offset=50.0)
    for options in ({"temperature": 0.7}, {"temperature": 0.3, "softcap": 30.0}):
        got = fwd(z, actions, z.clone(), **options)
        assert torch.equal(got[7], torch.zeros(4))
        assert all(same_bits(got[i], got[j]) for i, j in ((0, 5), (1, 6), (3, 8), (4, 9)))


def test_the_kl_of_a_policy_that_is_sure_has_no_gradient():
    z, z_ref, actions, upstream = make(12, 5, 200, torch.float32, scale=3.0)
    z[torch.arange(5), actions] = 40.0
    got = fwd(z, actions, z_ref, temperature=0.05)
    grad = bwd(z, actions, z_ref, got, (None, None, None, upstream[3].float()), temperature=0.05)
    of_kl = (upstream[3].float() * got[7]).abs() / 0.05
    assert (of_kl > 100).any()
    # CUDA rounds log(p/p_ref) otherwise than the KL; Triton does not.
    assert (grad.abs().amax(1) <= (2**-22 * of_kl if KERNELS.__name__.endswith("cuda") else 0.0 * of_kl)).all()


@pytest.mark.parametrize("vocab", [1000, SPLIT + 100])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(vocab):
    z, z_ref, actions, upstream = make(2, 5, vocab, torch.float32)
    together = fwd(z, actions, z_ref, temperature=0.9)
    grads = bwd(z, actions, z_ref, together, upstream.float().unbind(), temperature=0.9)
    one = slice(3, 4)
    alone = fwd(z[one], actions[one], z_ref[one], temperature=0.9)
    assert all(same_bits(a[one], b) for a, b in zip(together, alone, strict=True))
    c = [x.contiguous() for x in upstream.float()[:, one]]
    assert same_bits(grads[one], bwd(z[one], actions[one], z_ref[one], alone, c, temperature=0.9))


@pytest.mark.parametrize("vocab", [40, SPLIT + 40])
def test_strided_batches_and_masks(vocab):
    base, base_ref, actions, upstream = make(3, 6, vocab + 8, torch.float32)
    full, ref = base.view(2, 3, -1)[:, :-1, :vocab], base_ref.view(2, 3, -1)[:, 1:, 4 : vocab + 4]
    actions, upstream = actions[:4] % vocab, upstream[:, :4].float()
    mask = torch.tensor([True, False, False, True])
    z, z_ref = full.reshape(4, -1), ref.reshape(4, -1)
    want = fwd(z, actions, z_ref)
    want_grad = bwd(z, actions, z_ref, want, upstream.unbind())
    full.view(2, 2, -1)[~mask.view(2, 2)] = torch.nan
    ref.view(2, 2, -1)[~mask.view(2, 2)] = torch.nan
    actions[~mask] = vocab + 10**9
    got = fwd(full, actions, ref, mask=mask)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, torch.where(mask, b, 0.0))
    grad = bwd(full, actions, ref, got, upstream.unbind(), mask=mask)
    assert grad.shape == full.shape and grad.is_contiguous()
    assert torch.equal(grad.view(4, -1), torch.where(mask[:, None], want_grad, 0.0))


def test_the_gradient_of_a_transposed_batch_is_laid_out_in_the_order_of_its_rows():
    z, z_ref, actions, upstream = make(11, 6, 12, torch.float32)
    want = fwd(z, actions, z_ref)
    want_grad = bwd(z, actions, z_ref, want, upstream.float().unbind())
    # Dense in memory, so that an empty_like would have its strides.
    turned = z.view(2, 3, 12).transpose(0, 1).contiguous().transpose(0, 1)
    got = fwd(turned, actions, z_ref.view(2, 3, 12))
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    grad = bwd(turned, actions, z_ref.view(2, 3, 12), got, upstream.float().unbind())
    assert grad.is_contiguous() and torch.equal(grad.view(6, 12), want_grad)


def test_columns_and_tiles_of_minus_infinity():
    vocab = SPLIT + 9000  # the third tile of the second split is a padded one
    z, z_ref, actions, upstream = make(4, 5, vocab, torch.float32)
    kept = slice(SPLIT + 100, SPLIT + 700)
    for i, hidden in enumerate([slice(600, vocab), slice(0, SPLIT), slice(0, SPLIT + 100), slice(SPLIT, vocab)]):
        z[i, hidden] = -torch.inf  # tiles and whole splits, first and last
        z_ref[i, hidden] = -torch.inf
    z_ref[2, : SPLIT + 4500] = -torch.inf  # impossible in the reference, possible in the policy: kl = inf
    z_ref[4, 7] = z[4, 7] = -torch.inf
    actions[:] = torch.tensor([3, kept.start, kept.start, 5, 7])
    want, policy, ref = oracle(z, z_ref, actions)
    got = fwd(z, actions, z_ref)
    assert got[7][2] == torch.inf and got[0][4] == -torch.inf and got[5][4] == -torch.inf
    for i, w in zip(PUBLIC, want, strict=True):
        torch.testing.assert_close(got[i].double(), w, rtol=2e-6, atol=2e-6)
    rows = [0, 1, 3, 4]  # the gradient of an infinite kl is none
    c = upstream.float()[:, rows]
    grad = bwd(z[rows], actions[rows], z_ref[rows], [x[rows] for x in got], c.contiguous().unbind())
    exact = closed_gradient(z[rows], z_ref[rows], actions[rows], c)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=2e-6)


def test_columns_that_only_one_policy_finds_impossible():
    z, z_ref, actions, upstream = make(12, 6, 600, torch.float32)
    spans = [slice(0, 64), slice(64, 500), slice(0, 599), slice(1, 600), slice(300, 600)]
    for i, span in enumerate(spans):
        z[i, span] = -torch.inf
        actions[i] = 599 if span.start == 0 else 0
    z_ref[5, 7] = -torch.inf
    assert_fields(fwd(z[:5], actions[:5], z_ref[:5]), oracle(z[:5], z_ref[:5], actions[:5])[0])
    got = fwd(z, actions, z_ref)
    assert got[7][5] == torch.inf
    upstream[3, 5] = 0  # nobody differentiates it
    assert bwd(z, actions, z_ref, got, upstream.float().unbind()).isfinite().all()


def test_every_row_of_many_is_merged_from_its_splits():
    z, _, actions, _ = make(15, 1, SPLIT + 5, torch.float32)
    many = 131  # no multiple of the rows of a merging block
    mask = torch.zeros(many, dtype=torch.bool)
    mask[[0, many - 1]] = True
    got = fwd(z.expand(many, -1), actions.expand(many).contiguous(), mask=mask)
    want = fwd(z, actions)
    for a, b in zip(got[:5], want):
        assert same_bits(a[mask], b.expand(2)) and (a[~mask] == 0).all()


@pytest.mark.parametrize("vocab", [5, SPLIT + 5])
def test_a_row_of_nothing_but_minus_infinity_has_no_statistics(vocab):
    z, z_ref, actions, _ = make(13, 3, vocab, torch.float32)
    clean = fwd(z, actions, z_ref)
    z[1] = -torch.inf
    for pair, fields in (((z, z_ref), [0, 1, 2, 7]), ((z_ref, z), [5, 6, 7])):
        got = fwd(pair[0], actions, pair[1])
        assert all(got[i][1].isnan() for i in fields)
    assert all(same_bits(a[[0, 2]], b[[0, 2]]) for a, b in zip(fwd(z, actions, z_ref), clean, strict=True))


@pytest.mark.parametrize("temperature, factor", [(1.0, 1.0), (0.3, 1.0), (1.0, 1e4), (20.0, 1.0)])
def test_an_impossible_column_has_no_gradient(temperature, factor):
    # log p is infinite there, or overflows when it is divided by the temperature or multiplied by what arrives.
    z, z_ref, actions, upstream = make(9, 4, 30, torch.float32)
    z[0, 3] = z_ref[0, 3] = -torch.inf
    z[1, 3:9] = torch.finfo(torch.float32).min
    z_ref[2, 3:9] = z[2, 3:9] = -torch.inf
    z_ref[3, 5] = z[3, 5] = -torch.finfo(torch.float32).max / 4
    actions[:] = 0
    fields = fwd(z, actions, z_ref, temperature=temperature)
    for absent in range(-1, 4):
        given = upstream * factor
        if absent >= 0:
            given[absent] = 0
        c = [None if i == absent else x.float() for i, x in enumerate(given)]
        grad = bwd(z, actions, z_ref, fields, c, temperature=temperature)
        exact = closed_gradient(z, z_ref, actions, given, temperature=temperature)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-5 * factor)
        assert (grad[z < -1e30] == 0).all()


def test_an_infinite_divergence_far_below_the_maximum_counts_nothing():
    # Column 0 is impossible in the reference and seems likely until the maximum moves; then p = 0.
    z, z_ref = torch.zeros(1, SPLIT + 9000), torch.zeros(1, SPLIT + 9000)
    z_ref[0, 0] = -torch.inf
    for far in (SPLIT - 1, SPLIT + 8999):  # the maximum moves in a later tile, in the last split
        z[0, far] = 500.0
        got = fwd(z, torch.tensor([far]), z_ref)
        assert got[7].item() == pytest.approx(math.log(SPLIT + 8999), rel=1e-6)
        z[0, far] = 0.0


@pytest.mark.parametrize(
    "poison, place",
    [(float("nan"), place) for place in (0, 5000, SPLIT - 1, SPLIT + 3)]
    + [(float("inf"), place) for place in (0, SPLIT + 3)],
)
def test_a_nan_reaches_every_field_of_its_row_and_no_other(place, poison):
    z, z_ref, actions, upstream = make(6, 3, SPLIT + 5000, torch.float32)
    z[1, -1] = 900.0  # a late maximum does not wash it out
    clean = fwd(z, actions, z_ref)
    for poisoned, hit in ((z.clone(), "policy"), (z_ref.clone(), "reference")):
        poisoned[1, place] = poison
        pair = (poisoned, z_ref) if hit == "policy" else (z, poisoned)
        got = fwd(pair[0], actions, pair[1])
        fields = POLICY if hit == "policy" else REFERENCE
        for i, x in enumerate(got):
            if i == 7 or i in fields:
                assert x[1].isnan() or (poison == torch.inf and i in (3, 8)), i
            else:
                assert same_bits(x[1:2], clean[i][1:2])
            assert same_bits(x[[0, 2]], clean[i][[0, 2]])
        grad = bwd(pair[0], actions, pair[1], got, upstream.float().unbind())
        assert grad[1].isnan().any() and not grad[[0, 2]].isnan().any()


@pytest.mark.parametrize("vocab", [50, SPLIT + 50])
@pytest.mark.parametrize("bad", [-1, "vocab", 2**40, -(2**62)])
def test_an_action_out_of_range_is_nan_and_reads_nothing(vocab, bad):
    z, z_ref, actions, upstream = make(7, 2, vocab, torch.float32)
    clean = fwd(z, actions, z_ref)
    c = upstream.float().unbind()
    policy_alone, rest = (c[0], None, None, None), (None, *c[1:])
    clean_rest = bwd(z, actions, z_ref, clean, rest)
    actions[0] = vocab if bad == "vocab" else bad
    got = fwd(z, actions, z_ref)
    for i, (a, b) in enumerate(zip(got, clean, strict=True)):
        assert same_bits(a[1:], b[1:])
        assert a[0].isnan() if i in (0, 5) else same_bits(a[:1], b[:1])
    grad = bwd(z, actions, z_ref, got, policy_alone)
    assert grad[0].isnan().all() and not grad[1].isnan().any()
    assert same_bits(bwd(z, actions, z_ref, got, rest), clean_rest)


def test_no_rows():
    z, actions = torch.empty(0, 7), torch.empty(0, dtype=torch.long)
    got = fwd(z, actions, z)
    assert all(x.shape == (0,) for x in got)
    assert bwd(z, actions, z, got, [torch.empty(0)] * 4).shape == (0, 7)


def test_rows_beyond_two_to_the_31_elements():
    vocab, stride = 17, 2**30  # of 4.3 GB that are never touched but for three rows
    z = torch.empty(2 * stride + vocab, dtype=torch.float16, device=DEVICE).as_strided((3, vocab), (stride, 1))
    z.copy_(torch.randn(3, vocab, generator=torch.Generator().manual_seed(0)))
    actions = torch.tensor([0, 5, 16])
    # Not the same bits: Triton chooses the order of a row's sums by what divides the strides.
    for view in (z, z.as_strided((3, 1, vocab), (stride, 1, 1)), z.as_strided((1, 3, vocab), (1, stride, 1))):
        got, want = fwd(view, actions, view), fwd(z.clone(), actions, z.clone())
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
        c = [torch.ones(3)] * 4
        expected = bwd(z.clone(), actions, z.clone(), want, c)
        torch.testing.assert_close(bwd(view, actions, view, got, c).view(3, vocab), expected, rtol=1e-3, atol=1e-6)
