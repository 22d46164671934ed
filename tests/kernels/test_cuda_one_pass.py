"""soft_bellman_loss in one pass against the reference in float64: on a GPU with clusters, else emulated (cuda_emulated.py)."""

import itertools

import pytest
import torch

from dqo_kernels import soft_bellman, soft_bellman_loss
from dqo_kernels.core import checks, dispatch
from dqo_kernels.core.addresses import DTYPES, where
from tests.combinations import pairwise
from tests.kernels.gpu_backends import DEVICE

REASON = dispatch.unavailable("cuda_one_pass", DEVICE)
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
LENGTHS = [5, 0, 33, 1, 70, 0]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
PER_TOKEN = ("rewards", "values", "ref_logprobs", "ref_lse", "behavior_logprobs", "target_values")


def disorder(seed, resident):
    """Another order of threads and clusters, where that can be chosen."""
    if hasattr(dispatch._cuda, "configure"):
        dispatch._cuda.configure(seed, resident)


def batch(
    lengths=LENGTHS, vocab=41, dtype=torch.float32, seed=0, reference="logits", soft=False, extras=False, padded=False
):
    """Arguments of soft_bellman_loss. Padded ones have holes, and NaN in them."""
    rng = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    made = {
        "logits": (3 * torch.randn(n, vocab, generator=rng)).to(dtype),
        "actions": torch.randint(vocab, (n,), generator=rng),
        "rewards": torch.randn(n, generator=rng),
        "values": None if soft else torch.randn(n, generator=rng),
    }
    if reference == "logits":
        made["ref_logits"] = (3 * torch.randn(n, vocab, generator=rng)).to(dtype)
    else:
        made["ref_logprobs"] = -torch.rand(n, generator=rng) * 5
        made["ref_lse"] = torch.randn(n, generator=rng) if soft else None
    if extras:
        made["behavior_logprobs"] = -torch.rand(n, generator=rng) * 5
        made["target_values"] = None if soft else torch.randn(n, generator=rng)
        made["bootstrap"] = torch.randn(len(lengths), generator=rng)
    if not padded:
        made["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
        return made
    width = max(lengths) + 3
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for b, length in enumerate(lengths):
        mask[b, torch.randperm(width, generator=rng)[:length]] = True
    for name, x in list(made.items()):
        if name != "bootstrap" and x is not None:
            hole = torch.nan if x.is_floating_point() else 10**9
            made[name] = x.new_full((*mask.shape, *x.shape[1:]), hole)
            made[name][mask] = x
    return made | {"mask": mask}


def run(given, backend, dtype=None, device=DEVICE, factor=None, **options):
    """(fields of the output, gradients of logits and values), on the CPU."""
    moved = {}
    for name, x in given.items():
        if isinstance(x, torch.Tensor):
            x = x.detach().to(device)
            x = x.to(dtype) if dtype and x.is_floating_point() else x
        moved[name] = x
    live = [name for name in ("logits", "values") if moved[name] is not None]
    for name in live:
        moved[name] = moved[name].requires_grad_()
    out = soft_bellman_loss(**moved, backend=backend, **options)
    loss = out.loss if factor is None else out.loss * factor
    gradients = torch.autograd.grad(loss, [moved[name] for name in live])
    return {k: v.detach().cpu() for k, v in out._asdict().items() if v is not None}, [g.cpu() for g in gradients]


def assert_equals_reference(given, **options):
    tolerance = TOLERANCE[given["logits"].dtype]
    got, gradients = run(given, "cuda_one_pass", **options)
    want, exact = run(given, "reference", torch.float64, "cpu", **options)
    assert got.keys() == want.keys()
    for name, x in want.items():
        close = {"rtol": 1e-4, "atol": 2e-6 * (1 + x.abs().max().item())} if x.numel() else {}
        torch.testing.assert_close(got[name].double(), x, **close, msg=lambda text, name=name: f"{name}: {text}")
    for g, w in zip(gradients, exact, strict=True):
        assert g.shape == w.shape
        assert (g.double() - w).norm() <= tolerance * w.norm(), (g.double() - w).norm() / w.norm()
    if "mask" in given:
        assert (gradients[0][~given["mask"]] == 0).all()
    return got, gradients


@pytest.mark.parametrize(
    "is_level, form, padded",
    pairwise(
        ["none", "token", "suffix"], [("return", 1.0, 1.0), ("td", 0.8, 0.97), ("one_step", 0.0, 0.9)], [False, True]
    ),
)
def test_every_loss_that_it_takes(is_level, form, padded):
    policy_target, lam, gamma = form
    options = {"is_level": is_level, "policy_target": policy_target, "lam": lam, "gamma": gamma, "beta": 0.3}
    for soft, reference in itertools.product([False, True], ["logits", "rows"]):
        given = batch(seed=1, soft=soft, reference=reference, extras=True, padded=padded)
        kl_coef = 0.2 if reference == "logits" else 0.0
        assert_equals_reference(given, **options, kl_coef=kl_coef, policy_scale=0.7, value_coef=1.3, is_floor=-2.0)


@pytest.mark.parametrize("vocab, dtype, kl_coef", pairwise([1, 2, 63, 64, 65, 1000, 5003], list(TOLERANCE), [0.0, 0.5]))
def test_vocabularies_and_dtypes(vocab, dtype, kl_coef):
    given = batch([3, 0, 34], vocab, dtype, seed=vocab)
    assert_equals_reference(given, is_level="suffix", kl_coef=kl_coef, lam=0.9, reduction="sum")


@pytest.mark.parametrize(
    "vocab, dtype, reference, blocks",
    [
        (32000, torch.bfloat16, "rows", 1),
        (60007, torch.bfloat16, "rows", 2),
        (151936, torch.bfloat16, "rows", 4),
        (151936, torch.bfloat16, "logits", 8),
        (100003, torch.float32, "logits", 8),
    ],
)
def test_rows_that_a_cluster_holds_together(vocab, dtype, reference, blocks):
    number = {torch.float32: 0, torch.bfloat16: 1}[dtype]
    assert dispatch._cuda.one_pass_shape(vocab, number, reference == "logits")[0] == blocks
    given = batch([2, 0, 3], vocab, dtype, seed=2, reference=reference)
    given["actions"][:2] = torch.tensor([0, vocab - 1])
    for kl_coef in (0.0, 0.1) if reference == "logits" else (0.0,):
        assert_equals_reference(given, is_level="token", kl_coef=kl_coef, temperature=0.7)


def test_temperatures_softcap_strides_and_actions_out_of_range():
    given = batch(seed=3, padded=True, extras=True)
    temperature = torch.rand(given["mask"].shape, generator=torch.Generator().manual_seed(0)) + 0.5
    for options in ({"temperature": 0.7}, {"temperature": temperature.to(DEVICE), "softcap": 5.0}):
        exact = dict(options)
        if isinstance(options["temperature"], torch.Tensor):
            exact["temperature"] = options["temperature"].cpu().double()
        got, gradients = run(given, "cuda_one_pass", is_level="none", kl_coef=0.1, **options)
        want, wanted = run(given, "reference", torch.float64, "cpu", is_level="none", kl_coef=0.1, **exact)
        torch.testing.assert_close(got["loss"].double(), want["loss"], rtol=1e-4, atol=1e-5)
        for g, w in zip(gradients, wanted, strict=True):
            assert (g.double() - w).norm() <= 2e-5 * w.norm()

    packed = batch([4, 3], 48, seed=4)
    wide = torch.randn(7, 64)
    wide[:, 5:53] = packed["logits"]
    strided = packed | {"logits": wide.to(DEVICE)[:, 5:53]}
    want, wanted = run(packed, "cuda_one_pass", is_level="suffix")
    view = strided["logits"].detach().requires_grad_()
    rest = {k: v.to(DEVICE) for k, v in packed.items() if k != "logits"}
    out = soft_bellman_loss(view, **rest, is_level="suffix", backend="cuda_one_pass")
    assert torch.equal(out.loss.cpu(), want["loss"])  # the bits do not depend on where a row lies
    assert torch.equal(torch.autograd.grad(out.loss, view)[0].cpu(), wanted[0])


@pytest.mark.parametrize("backend", ["cuda", "cuda_one_pass"])
def test_a_reference_that_every_sequence_shares(backend):
    given = {name: x.to(DEVICE) for name, x in batch([6, 6, 6], seed=11, padded=True).items()}
    shared = torch.randn(1, *given["logits"].shape[1:], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    given["ref_logits"] = shared.expand(given["logits"].shape)  # a batch of stride 0
    options = {"is_level": "none", "kl_coef": 0.3}
    got, gradients = run(given, backend, **options)
    want, wanted = run(given | {"ref_logits": given["ref_logits"].contiguous()}, backend, **options)
    assert all(torch.equal(got[name], x) for name, x in want.items())
    assert torch.equal(gradients[0], wanted[0])


def test_the_gradient_of_a_transposed_batch_belongs_to_its_rows():
    given = batch(seed=11, padded=True)
    want, wanted = run(given, "cuda_one_pass", is_level="none")
    # Dense in memory, so that an empty_like would have its strides.
    turned = given | {"logits": given["logits"].transpose(0, 1).contiguous().transpose(0, 1)}
    got, gradients = run(turned, "cuda_one_pass", is_level="none")
    assert torch.equal(got["loss"], want["loss"])
    assert all(torch.equal(g, w) for g, w in zip(gradients, wanted, strict=True))


def test_the_rows_are_bit_for_bit_those_of_the_scan():
    given = batch([100, 3, 64, 33], 50, seed=5, extras=True)
    options = {"is_level": "suffix", "lam": 0.9, "gamma": 0.98, "beta": 0.2}
    out, _ = run(given, "cuda_one_pass", **options)
    rows = {name: x.to(DEVICE) for name, x in given.items() if name in PER_TOKEN or name == "bootstrap"}
    terms = soft_bellman(
        out["logprobs"].to(DEVICE), out["ref_logprobs"].to(DEVICE), rows.pop("rewards"), rows.pop("values"),
        given["cu_seqlens"].to(DEVICE), **rows, **options, reduction="none", backend="cuda",
    )  # fmt: skip
    for name in ("returns", "advantages", "weights"):
        assert torch.equal(out[name], getattr(terms, name).cpu()), name


def test_the_same_bits_in_every_order():
    given = batch([90, 1, 40, 0, 65], 130, torch.bfloat16, seed=6)
    options = {"is_level": "suffix", "lam": 0.95, "kl_coef": 0.1}
    disorder(1, 2)
    want, wanted = run(given, "cuda_one_pass", **options)
    for seed, resident in ((2, 1), (3, 5), (4, 9)):
        disorder(seed, resident)
        got, gradients = run(given, "cuda_one_pass", **options)
        assert all(torch.equal(got[name], x) for name, x in want.items())
        assert all(torch.equal(g, w) for g, w in zip(gradients, wanted, strict=True))
    # A sequence has the same bits alone.
    one = {name: x[91:131] for name, x in given.items() if name != "cu_seqlens"} | {"cu_seqlens": torch.tensor([0, 40])}
    alone, _ = run(one, "cuda_one_pass", **options)
    for name in ("returns", "weights", "logprobs", "kl"):
        assert torch.equal(alone[name], want[name][91:131])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[5000], [33] * 200, [1] * 3000, [700, 0, 1300, 2, 900]], ids=str)
def test_many_rows_at_once_on_a_gpu(lengths):
    """Where memory is really weak and clusters really race: the same bits every time, and those of the two-kernel form's scan."""
    for vocab, kl_coef in ((64, 0.0), (4096, 0.1), (60_000, 0.0)):
        given = batch(
            lengths if vocab < 60_000 else [min(n, 300) for n in lengths[:20]], vocab, torch.bfloat16, seed=12
        )
        options = {"is_level": "suffix", "lam": 0.9, "gamma": 0.99, "kl_coef": kl_coef}
        want, wanted = run(given, "cuda_one_pass", **options)
        for _ in range(20):
            got, gradients = run(given, "cuda_one_pass", **options)
            assert all(torch.equal(got[name], x) for name, x in want.items())
            assert all(torch.equal(g, w) for g, w in zip(gradients, wanted, strict=True))
        two, two_gradients = run(given, "cuda", **options)
        torch.testing.assert_close(want["returns"], two["returns"], rtol=1e-4, atol=1e-4)
        assert (wanted[0].float() - two_gradients[0].float()).norm() <= 2**-7 * two_gradients[0].float().norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_factor_of_the_backward(dtype):
    given = batch(dtype=dtype, seed=7)
    _, gradients = run(given, "cuda_one_pass", is_level="none")
    _, scaled = run(given, "cuda_one_pass", is_level="none", factor=0.5)
    for g, s in zip(gradients, scaled, strict=True):
        torch.testing.assert_close(s, g * 0.5, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "count", [1, 4099, 150_001 if DEVICE == "cpu" else 10_000_001]
)  # the last: several tiles a block
def test_a_factor_reaches_every_entry_and_no_other(dtype, count):
    x = torch.randn(count + 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    got, factor = x.clone(), torch.tensor(-0.5, device=DEVICE)
    dispatch._cuda.rescale(where(got), got.data_ptr(), count, DTYPES[dtype], factor.data_ptr())
    assert torch.equal(got[:count], -0.5 * x[:count]) and torch.equal(got[count:], x[count:])


@pytest.mark.skipif(not hasattr(dispatch._cuda, "end_arrays"), reason="of the emulation of CUDA")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_no_word_lies_across_the_end_of_an_array(dtype):
    given = batch([5, 0, 33, 1, 71, 0], dtype=dtype)  # the last row begins at no multiple of 16 bytes
    ends = [given[name].data_ptr() + given[name].nbytes for name in ("logits", "ref_logits")]
    assert any(end % 16 for end in ends)
    dispatch._cuda.end_arrays(ends)
    try:
        run(given, "cuda_one_pass", kl_coef=0.5, is_level="suffix")
    finally:
        dispatch._cuda.end_arrays([])


def test_a_second_backward_is_refused():
    given = {name: x.to(DEVICE) for name, x in batch(seed=8).items()}
    given["logits"].requires_grad_()
    out = soft_bellman_loss(**given, is_level="none", backend="cuda_one_pass")
    assert not any(x.requires_grad for x in out[1:] if x is not None)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one-pass gradient.*earlier backward.*backend='cuda'"):
        out.loss.backward()
    out = soft_bellman_loss(**given, is_level="none", backend="cuda_one_pass")
    (gradient,) = torch.autograd.grad(out.loss, given["logits"], create_graph=True)
    with pytest.raises(RuntimeError, match="one_pass has no second derivative.*backend='reference'"):
        gradient.square().sum().backward()


def test_nothing_to_do():
    for lengths in ([], [0, 0]):
        out, gradients = run(batch(lengths), "cuda_one_pass", is_level="none")
        assert out["loss"] == 0 and gradients[0].shape == (0, 41)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_row_stays_in_its_sequence(poison):
    given = batch([4, 40, 3], seed=9)
    clean, clean_gradients = run(given, "cuda_one_pass", is_level="suffix")
    given["logits"][20, 3] = poison
    got, gradients = run(given, "cuda_one_pass", is_level="suffix")
    others = [*range(4), *range(44, 47)]
    assert got["loss"].isnan() and got["logprobs"][20].isnan() and got["returns"][4:21].isnan().all()
    assert torch.equal(got["returns"][others], clean["returns"][others])
    assert torch.equal(gradients[0][others], clean_gradients[0][others])
    assert torch.equal(gradients[0][21:], clean_gradients[0][21:])  # later rows do not see it either


@pytest.mark.parametrize("bad", [-1, 41, 2**40])
def test_an_action_that_nobody_has_checked_is_nan_and_reads_nothing(bad, monkeypatch):
    monkeypatch.setattr(checks, "reads_values", lambda like: False)
    given = batch([4, 40, 3], seed=13)
    clean, clean_gradients = run(given, "cuda_one_pass", is_level="token")
    given["actions"][20] = bad
    got, gradients = run(given, "cuda_one_pass", is_level="token")
    assert got["logprobs"][20].isnan() and got["ref_logprobs"][20].isnan() and gradients[0][20].isnan().all()
    assert torch.equal(got["lse"], clean["lse"])
    others = [*range(4), *range(21, 47)]
    assert torch.equal(gradients[0][others], clean_gradients[0][others])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"is_level": "trajectory"}, "is_level with backend='cuda_one_pass'.*none, token, suffix.*trajectory"),
        ({"is_level": "none", "target": "residual"}, "target with backend='cuda_one_pass'.*detach.*residual"),
        ({"is_level": "none", "reduction": "none"}, "reduction with backend='cuda_one_pass'.*mean, sum.*none"),
    ],
)
def test_what_needs_two_passes_is_refused(options, message):
    given = {name: x.to(DEVICE) for name, x in batch(seed=10).items()}
    with pytest.raises(ValueError, match=message):
        soft_bellman_loss(**given, backend="cuda_one_pass", **options)


def test_what_does_not_fit_and_what_does_not_exist_is_refused():
    given = {name: x.to(DEVICE) for name, x in batch([1], 300_000).items()}
    with pytest.raises(RuntimeError, match="300000 columns in torch.float32 does not fit.*backend='cuda'"):
        soft_bellman_loss(**given, is_level="none", kl_coef=0.1, backend="cuda_one_pass")
    with pytest.raises(RuntimeError, match="float64.*reference"):
        run(batch(), "cuda_one_pass", torch.float64, is_level="none")
    with pytest.raises(RuntimeError, match="float64.*reference"):  # what the two models are promoted to
        double = batch() | {"ref_logits": batch()["ref_logits"].double()}
        run(double, "cuda_one_pass", is_level="none")
    with pytest.raises(RuntimeError, match="'cuda_one_pass' has no soft_bellman"):
        x = torch.zeros(1, device=DEVICE)
        soft_bellman(x, x, x, x, torch.tensor([0, 1], device=DEVICE), backend="cuda_one_pass")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "cuda_one_pass"])
def test_a_compiled_function_equals_the_eager_one(backend):
    def loss_of(logits, values, rest):
        out = soft_bellman_loss(logits, values=values, **rest, is_level="suffix", kl_coef=0.1, backend=backend)
        return out.loss, out.returns

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, vocab in (([3, 4], 33), ([5, 0, 6], 50)):  # the second shapes must not need another compilation
        given = {name: x.to(DEVICE) for name, x in batch(lengths, vocab, seed=11).items()}
        live = [given.pop(name).requires_grad_() for name in ("logits", "values")]
        results = []
        for function in (loss_of, compiled):
            loss, returns = function(*live, given)
            results.append([loss, returns, *torch.autograd.grad(2 * loss, live)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-7)
