"""Registration with torch.library: opcheck of every operation and dtype, and compiled functions against eager ones."""

import pytest
import torch

import dqo_kernels
from dqo_kernels import lambda_return, soft_bellman_loss, token_stats
from dqo_kernels.core import dispatch, library
from dqo_kernels.core.row_stats import RowStats
from tests.kernels import edge_cases
from tests.kernels.edge_cases import arguments, call, differentiated, live_of, same
from tests.kernels.oracle import random_batch

pytestmark = pytest.mark.slow

OPS = torch.ops.dqo_kernels
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NATIVE = {"cpu": ["cpp", "triton", "cuda"], "cuda": ["triton", "cuda"]}


def backends(device, dtype):
    listed = [name for name in NATIVE[device] if name in dispatch.TABLE["token_stats"][device]]
    return [name for name in listed if dispatch.unavailable(name, device, dtype) is None]


def opcheck(operation, arguments, backend, whole=True):
    """torch's check of a registration. Without `whole` Triton, whose interpreter takes seconds for each run, only has to give the
    shapes and dtypes that were announced: backend and dtype have no part in the rest, which runs every kernel several times."""
    chosen = {} if whole or backend != "triton" else {"test_utils": "test_faketensor"}
    torch.library.opcheck(operation.default, (*arguments, backend), **chosen)


def stats_arguments(device, dtype, form):
    rng = torch.Generator().manual_seed(0)
    shape = (2, 3, 9) if form == "padded" else (6, 9)
    logits = (3 * torch.randn(shape, generator=rng)).to(device, dtype)
    ref_logits = None if form == "one model" else (3 * torch.randn(shape, generator=rng)).to(device, dtype)
    actions = torch.randint(9, (6,), generator=rng).to(device)
    mask = (torch.rand(6, generator=rng) < 0.7).to(device) if form == "padded" else None
    fields = torch.float64 if dtype == torch.float64 else torch.float32
    temperatures = torch.linspace(0.5, 2.0, 6, dtype=fields, device=device) if form == "padded" else None
    return logits, actions, ref_logits, mask, temperatures, 0.7, 5.0 if form == "padded" else 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["two models", "one model", "padded"])
def test_opcheck_of_token_stats(device, dtype, form):
    for backend in backends(device, dtype):
        arguments = stats_arguments(device, dtype, form)
        forward = OPS.token_stats(*arguments, backend)
        whole = form == "padded" and dtype == torch.float32
        opcheck(OPS.token_stats, (arguments[0].requires_grad_(), *arguments[1:]), backend, whole)
        stats = [x.detach() for x in RowStats(*forward).saved()]
        upstream = [torch.randn(6, dtype=forward[0].dtype).to(device) for _ in range(4)]
        if form == "one model":
            upstream[3] = None
        arguments = (arguments[0].detach(), *arguments[1:])
        opcheck(OPS.token_stats_backward, (*arguments, *stats, *upstream), backend, whole)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("form", ["two models", "one model", "padded"])
def test_opcheck_of_one_pass(device, dtype, form):
    if "cuda" not in backends(device, dtype) or dispatch.unavailable(dispatch.ONE_PASS, device):
        pytest.skip(str(dispatch.unavailable(dispatch.ONE_PASS, device)))
    import dqo_kernels.soft_bellman_loss_cuda  # noqa: F401  (registers it)

    logits, *rest = stats_arguments(device, dtype, form)
    ref_logprobs, rewards, values = torch.randn(3, 6).to(device)
    reference = (None, None) if form != "one model" else (ref_logprobs, None)
    values = values.clone().requires_grad_()
    boundaries, count = torch.tensor([0, 4, 6], device=device), torch.tensor(5, device=device)
    tail = ("td", "detach", "suffix", 1.0, None, 0.5, 2.0, 0.0 if form == "one model" else 0.3)
    options = (boundaries, count, *reference, rewards, values, None, None, None, 0.1, 0.9, 0.8, *tail)
    torch.library.opcheck(OPS.soft_bellman_loss_one_pass.default, (logits.requires_grad_(), *rest, *options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_of_the_scans(device, dtype):
    batch = random_batch()
    rows = [x.to(device, dtype) for x in (batch.logprobs, batch.ref_logprobs, batch.rewards, batch.values)]
    cu_seqlens, bootstrap = batch.cu_seqlens.to(device), batch.bootstrap.to(device, dtype)
    mask = (torch.arange(len(rows[0])) != 2).to(device)
    live = [x.clone().requires_grad_() for x in rows]
    for backend in backends(device, dtype):
        opcheck(OPS.lambda_return, (live[2], live[3], bootstrap, cu_seqlens, 0.9, 0.8), backend)
        opcheck(OPS.lambda_return_backward, (rows[0], cu_seqlens, 0.9, 0.8), backend)
        for target, ends in (("detach", None), ("residual", bootstrap.clone().requires_grad_())):
            options = (0.1, 0.9, 0.8, "td", target, "suffix", 1.0, None)
            arguments = (live[0], rows[1], rows[2], live[3], cu_seqlens, mask, rows[1] - 0.1, ends, None)
            opcheck(OPS.soft_bellman, (*arguments, *options), backend, target == "residual")
        opcheck(OPS.soft_bellman_backward_residual, (rows[0], rows[1], cu_seqlens, mask, *options), backend)


def packed(logits, values, case, backend):
    out = soft_bellman_loss(
        logits, case["actions"], case["rewards"], values, ref_logits=case["ref_logits"], cu_seqlens=case["cu_seqlens"],
        kl_coef=0.1, lam=0.9, backend=backend,
    )  # fmt: skip
    return out.loss, out.entropy.mean(), out.weights


def padded_soft_values(logits, values, case, backend):
    out = soft_bellman_loss(
        logits[:, :-1], case["actions"], case["rewards"], ref_logits=case["ref_logits"][:, 1:], mask=case["mask"],
        target="residual", is_level="suffix", temperature=0.8, softcap=20.0, backend=backend,
    )  # fmt: skip
    return out.loss + 0 * values.sum(), out.returns


def case_of(function, device, rows, vocab):
    rng = torch.Generator().manual_seed(rows)
    shape = (rows,) if function is packed else (3, rows)
    wide = shape if function is packed else (3, rows + 1)
    case = {
        "actions": torch.randint(vocab, shape, generator=rng),
        "rewards": torch.randn(shape, generator=rng),
        "ref_logits": torch.randn(*wide, vocab, generator=rng),
        "cu_seqlens": torch.tensor([0, 3, 3, rows]),
        "mask": torch.rand(shape, generator=rng) < 0.7,
    }
    live = torch.randn(*wide, vocab, generator=rng), torch.randn(shape, generator=rng)
    return [x.to(device).requires_grad_() for x in live], {name: x.to(device) for name, x in case.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [packed, padded_soft_values], ids=["packed", "padded"])
@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda", "reference"])
def test_a_compiled_function_of_the_loss_equals_the_eager_one(device, function, backend):
    if backend not in dispatch.TABLE["token_stats"][device]:
        pytest.skip(f"{backend} has no kernels for {device}")
    if dispatch.unavailable(backend, device):
        pytest.skip(dispatch.unavailable(backend, device))
    # The reference is plain torch: that it can be traced is ours to show, not that its loops compile to something fast.
    compiler = "inductor" if backend == dispatch.TABLE["token_stats"][device][0] else "aot_eager"
    torch._dynamo.reset()  # what another backend's case left counts as a compilation before
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for rows, vocab in ((6, 33), (8, 50)):  # the second pair of sizes needs no other compilation
        (logits, values), case = case_of(function, device, rows, vocab)
        results = []
        for run in (function, compiled):
            with torch._dynamo.config.patch(error_on_recompile=True):
                loss, *shown = run(logits, values, case, backend)
            results.append([loss, *shown, *torch.autograd.grad(loss, [logits, values])])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear_token_stats", "linear_row_loss", "linear_soft_bellman_loss"])
def test_the_linear_forms_break_a_compiled_graph_and_say_so(name, monkeypatch):
    monkeypatch.setitem(edge_cases.OPTIONS, name, {})  # one piece: more are cut where the boundaries' values say
    tensors = arguments(name)
    live = live_of(name, tensors)
    for backend, fullgraph in (("reference", True), ("cpp", False)):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=fullgraph, backend="eager")
        value = compiled(name, tensors, backend)
        same([value, *torch.autograd.grad(value, live)], differentiated(name, tensors, backend))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no part of a compiled graph.*leave fullgraph out"):
        torch.compile(call, fullgraph=True, backend="eager")(name, tensors, "cpp")
    assert "`torch.compile(..., fullgraph=True)` refuses this call" in getattr(dqo_kernels, name).__doc__


def test_absent_gradients_are_absent_and_specialise_the_kernel(monkeypatch):
    seen = []
    run = library.run

    def spy(op, direction, backend, *arguments):
        seen.append((direction, [x is not None for x in arguments[-4:]] if direction == "bwd" else None))
        return run(op, direction, backend, *arguments)

    monkeypatch.setattr(library, "run", spy)
    logits, ref_logits = torch.randn(2, 4, 9).unbind()
    stats = token_stats(logits.requires_grad_(), torch.zeros(4, dtype=torch.long), ref_logits, backend="cpp")
    stats.logprobs.sum().backward(retain_graph=True)
    (stats.lse + stats.kl).sum().backward()
    assert [names for direction, names in seen if direction == "bwd"] == [
        [True, False, False, False],
        [False, True, False, True],
    ]


def test_a_second_derivative_is_refused_where_there_is_none():
    logits = torch.randn(3, 5, requires_grad=True)
    stats = token_stats(logits, torch.zeros(3, dtype=torch.long), backend="cpp")
    (gradient,) = torch.autograd.grad(stats.entropy.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="token_stats .*second derivative.*reference"):
        gradient.square().sum().backward()
    rewards = torch.randn(3, requires_grad=True)
    returns = lambda_return(rewards, rewards, torch.tensor([0, 3]), backend="cpp")
    (gradient,) = torch.autograd.grad(returns.square().sum(), rewards, create_graph=True)
    with pytest.raises(RuntimeError, match="lambda_return .*second"):
        gradient.sum().backward()


def test_meta_tensors_give_shapes_without_running_anything():
    logits = torch.empty(5, 7, dtype=torch.bfloat16, device="meta")
    forward = OPS.token_stats(
        logits, torch.empty(5, dtype=torch.long, device="meta"), None, None, None, 1.0, 0.0, "cpp"
    )
    assert [tuple(x.shape) for x in forward] == [(5,)] * 5 + [(0,)] * 5
    assert {x.dtype for x in forward} == {torch.float32}
