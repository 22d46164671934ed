"""token_stats against a float64 numpy oracle, and its gradient against the closed form

    dz = p*(A + B*(z-lse) + C*(z_ref-ref_lse)) + D*onehot
    A = c_lse - c_logprob - c_kl*KL - c_H*H,  B = c_kl - c_H,  C = -c_kl,  D = c_logprob

Forward bound: 2e-6*(1+|x|) on the same inputs. Gradient bound: twice the error of torch's own computation
from the same inputs. Holds part of T8 (extreme logits, low precision, 150k tokens) and of defects 17, 18, 21.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo_kernels import token_stats
from tests.combinations import pairwise
from tests.kernels.backends import backends
from tests.kernels.stats_cases import all_fields, closed_gradient, gradient, make, oracle, torch_gradient

BACKENDS = backends("token_stats")
LOW = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def problems(draw):
    rows, vocab = draw(st.integers(0, 6)), draw(st.integers(2, 70))
    per_row = draw(st.booleans())
    temperature = draw(st.floats(0.2, 3.0))
    if per_row:
        temperature = torch.linspace(temperature, 2 * temperature, rows, dtype=torch.float64)
    softcap = draw(st.sampled_from([None, None, 2.0, 30.0]))
    case = make(draw(st.integers(0, 999)), rows, vocab, scale=draw(st.sampled_from([0.1, 3.0, 30.0])))
    return case, {"temperature": temperature, "softcap": softcap}


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_float64_statistics_and_gradient_equal_the_closed_forms(backend, problem):
    (z, z_ref, actions, upstream), options = problem
    expected, _, _ = oracle(z, z_ref, actions, **options)
    # With U the spread of the scaled logits, rounding an exponent moves p by eps*U of itself, an expectation
    # of terms below U by eps*U^2, and a gradient by upstream/T times that. Both sides round: four such terms.
    coldest = torch.as_tensor(options["temperature"]).min().item() if len(actions) else 1.0
    spread = 1 + 2 * sum(x.abs().max().item() for x in (z, z_ref) if x.numel()) / coldest
    rounding = 4 * torch.finfo(z.dtype).eps * spread**2
    stats = token_stats(z, actions, z_ref, backend=backend, **options)
    for name, value, want in zip(stats._fields, stats, expected, strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, want, rtol=1e-12, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")
    got = gradient(z, z_ref, actions, upstream, backend=backend, **options)
    want = closed_gradient(z, z_ref, actions, upstream, **options)
    loudest = upstream.abs().max().item() if len(actions) else 0.0
    torch.testing.assert_close(got, want, rtol=1e-12, atol=rounding * loudest / coldest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, offset, options, vocab",
    pairwise(LOW, [0.0, 100.0, -100.0], [{}, {"temperature": 0.7}, {"softcap": 30.0}], [2, 33, 1000]),
)
def test_low_precision_inputs_keep_float32_accuracy(backend, dtype, offset, options, vocab):
    z, z_ref, actions, upstream = make(
        3, 64, vocab, dtype, offset=offset
    )  # enough rows to compare errors by their mean
    expected, _, _ = oracle(z, z_ref, actions, **options)
    stats = token_stats(z, actions, z_ref, backend=backend, **options)
    for name, value, want in zip(stats._fields, stats, expected, strict=True):
        assert value.dtype == torch.float32
        # A soft-capped logit carries two roundings of its size already; a statistic meets two such logits.
        capping = 4 * 2**-24 * options.get("softcap", 0.0)
        excess = ((value.double() - want).abs() - 2e-6 * (1 + want.abs()) - capping).max().item()
        assert excess <= 0, f"{name} exceeds its bound by {excess:.1e}"
    exact = closed_gradient(z, z_ref, actions, upstream, **options)
    own = gradient(z, z_ref, actions, upstream, backend=backend, **options)
    torchs = torch_gradient(z, z_ref, actions, upstream, **options)
    error, yardstick = ((g.double() - exact).square().mean().sqrt().item() for g in (own, torchs))
    storing = (exact.to(dtype).double() - exact).square().mean().sqrt().item()
    assert error <= 2 * yardstick + storing, f"error {error:.1e}, torch {yardstick:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "softcap": 3.0}], ids=["plain", "scaled"])
def test_autograd_passes_gradcheck(backend, options):
    z, z_ref, actions, _ = make(1, 4, 7)
    options = {**options, "backend": backend}

    def run(z):
        return all_fields(token_stats(z, actions, z_ref, **options))

    assert torch.autograd.gradcheck(run, z.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_identical_rows_have_a_divergence_of_exactly_zero(backend, dtype):
    z, _, actions, _ = make(4, 64, 257, dtype, scale=20.0)
    stats = token_stats(z, actions, z.clone(), backend=backend)
    assert torch.equal(stats.kl, torch.zeros_like(stats.kl))
    assert torch.equal(stats.logprobs, stats.ref_logprobs)
    assert torch.equal(stats.lse, stats.ref_lse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_log_probabilities_are_never_positive(backend, dtype, scale):
    z, _, _, _ = make(5, 64, 50, dtype, scale=scale)
    stats = token_stats(z, z.argmax(-1), backend=backend)
    assert (stats.logprobs <= 0).all() and (stats.entropy >= -1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_minus_infinity_is_a_token_of_probability_zero(backend, dtype):
    z, z_ref, actions, upstream = make(6, 5, 9, dtype)
    small = token_stats(z[:, :7], actions % 7, z_ref[:, :7], backend=backend)
    z[:, 7:] = z_ref[:, 7:] = -torch.inf
    padded = token_stats(z, actions % 7, z_ref, backend=backend)
    for wide, narrow in zip(padded, small, strict=True):
        torch.testing.assert_close(wide, narrow)
    got = gradient(z, z_ref, actions % 7, upstream, backend=backend)
    assert torch.equal(got[:, 7:], torch.zeros_like(got[:, 7:]))
    torch.testing.assert_close(got[:, :7], gradient(z[:, :7], z_ref[:, :7], actions % 7, upstream, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_the_reference_cannot_say_makes_the_divergence_infinite(backend):
    z, z_ref, actions, _ = make(7, 3, 5)
    z_ref[1, 2] = -torch.inf
    kl = token_stats(z, actions, z_ref, backend=backend).kl
    assert kl[1] == torch.inf and kl[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e4, 6e4])
def test_extreme_logits_stay_finite(backend, size):
    z = torch.tensor([[size, -size, 0.0], [-size, -size, -size], [size, size, -size]])
    actions, upstream = torch.tensor([1, 0, 2]), torch.ones(4, 3)
    stats = token_stats(z, actions, z.flip(1), backend=backend)
    expected, _, _ = oracle(z, z.flip(1), actions)
    for value, want in zip(stats, expected, strict=True):
        torch.testing.assert_close(value.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        gradient(z, z.flip(1), actions, upstream, backend=backend).double(),
        closed_gradient(z, z.flip(1), actions, upstream), rtol=1e-6, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_150k_keeps_the_bound(backend, dtype):
    # bf16 rounding inside the sums would cost about 1e-2 a token (defect 18); the bound is 1e-5 in delta.
    z, z_ref, actions, _ = make(8, 2, 151_936, dtype, scale=4.0)
    stats = token_stats(z, actions, z_ref, backend=backend)
    expected, _, _ = oracle(z, z_ref, actions)
    for name, value, want in zip(stats._fields, stats, expected, strict=True):
        assert ((value.double() - want).abs() <= 2e-6 * (1 + want.abs())).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [2.0, torch.tensor(2.0), torch.full((6,), 2.0)], ids=["float", "0d", "rows"])
def test_temperature_divides_the_logits_once_and_for_both_models(backend, temperature):
    # Defect 17: exp(Q/beta)/Z with Q = beta*l/T is softmax(l/T), and a model's ratio to itself is 1 at any T.
    z, z_ref, actions, _ = make(9, 6, 11)
    got = token_stats(z, actions, z_ref, temperature=temperature, backend=backend)
    want = token_stats(z / 2, actions, z_ref / 2, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    itself = token_stats(z, actions, z, temperature=temperature, backend=backend)
    assert torch.equal(itself.logprobs - itself.ref_logprobs, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_strides_and_integer_types_do_not_matter(backend, dtype):
    z, z_ref, actions, _ = make(10, 6, 12, dtype)
    wide = torch.cat([z, z_ref], 1)
    for a, b in [(wide[:, :12], wide[:, 12:]), (z.repeat_interleave(2, 0)[::2], z_ref[:1].expand(6, 12))]:
        got = token_stats(a, actions.int(), b, backend=backend)
        want = token_stats(a.contiguous(), actions, b.contiguous(), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    # Column-major rows may be summed in another order.
    got = token_stats(z.t().contiguous().t(), actions, z_ref, backend=backend)
    for x, y in zip(got, token_stats(z, actions, z_ref, backend=backend), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_poisons_itself_alone(backend, poison):
    z, z_ref, actions, upstream = make(11, 5, 8)
    clean, clean_gradient = (
        token_stats(z, actions, z_ref, backend=backend),
        gradient(z, z_ref, actions, upstream),
    )
    z[2, 3] = poison
    stats, got = (
        token_stats(z, actions, z_ref, backend=backend),
        gradient(z, z_ref, actions, upstream, backend=backend),
    )
    others = torch.tensor([0, 1, 3, 4])
    assert all(not field[2].isfinite() for field in (stats.logprobs, stats.lse, stats.entropy, stats.kl))
    assert all(torch.equal(a[others], b[others]) for a, b in zip(stats, clean, strict=True))
    torch.testing.assert_close(got[others], clean_gradient[others], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_row", [False, True])
def test_the_size_of_the_chunks_changes_nothing(backend, per_row, monkeypatch):
    module = sys.modules[token_stats.__module__]  # the package attribute of that name is the function
    z, z_ref, actions, upstream = make(12, 7, 10)
    options = {
        "temperature": torch.linspace(0.5, 1.5, 7) if per_row else 1.0,
        "softcap": 5.0,
        "backend": backend,
    }
    whole = token_stats(z, actions, z_ref, **options)
    whole_gradient = gradient(z, z_ref, actions, upstream, **options)
    for chunk_bytes in (1, 2 * 10 * 8, 3 * 10 * 8 + 1):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        assert all(torch.equal(a, b) for a, b in zip(token_stats(z, actions, z_ref, **options), whole, strict=True))
        assert torch.equal(gradient(z, z_ref, actions, upstream, **options), whole_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_side_is_a_constant(backend):
    z, z_ref, actions, _ = make(13, 3, 5)
    stats = token_stats(z.requires_grad_(), actions, z_ref.requires_grad_(), backend=backend)
    assert not stats.ref_logprobs.requires_grad and not stats.ref_lse.requires_grad
    all_fields(stats).sum().backward()
    assert z_ref.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_reference_its_fields_are_none_and_the_others_the_same(backend):
    z, z_ref, actions, _ = make(14, 3, 5)
    alone, both = token_stats(z, actions, backend=backend), token_stats(z, actions, z_ref, backend=backend)
    assert alone[3:] == (None, None, None)
    assert all(torch.equal(a, b) for a, b in zip(alone[:3], both[:3], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_gives_the_same_bits_whatever_the_batch(backend):
    z, z_ref, actions, _ = make(15, 9, 1000, torch.float32)
    batch = token_stats(z, actions, z_ref, backend=backend)
    for row in range(9):
        alone = token_stats(z[row : row + 1], actions[row : row + 1], z_ref[row : row + 1], backend=backend)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, batch, strict=True))
