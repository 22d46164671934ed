"""What callers do around a call: foreign defaults, memory that is written over or given back, views that lie, derivatives of
other kinds. Each is right, or refused in one line; none ends the process and none is wrong in silence."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import dqo_kernels
from dqo_kernels.core import checks, dispatch
from dqo_kernels.core.bellman_options import BellmanOptions
from tests.kernels.edge_cases import (
    ARGUMENTS,
    BACKENDS,
    BATCH,
    NATIVE,
    V,
    arguments,
    call,
    differentiated,
    live_of,
    run_here,
    same,
)  # fmt: skip

NAMES = list(ARGUMENTS)
FAR = 2**40  # an index that no memory holds


@pytest.fixture(params=BACKENDS)
def backend(request):
    run_here(request.param)
    if request.param == "triton" and "bellman" in request.node.name:
        pytest.skip("seconds in Triton's interpreter; lambda_return and token_stats have the same callers")
    return request.param


@pytest.fixture(params=NATIVE)
def native(request):
    run_here(request.param)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_callers_default_device_and_dtype_change_nothing(name, backend):
    want = differentiated(name, arguments(name), backend)
    for dtype in (torch.float64, torch.bfloat16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                got = differentiated(name, arguments(name), backend)
        finally:
            torch.set_default_dtype(before)
        for x, y in zip(got, want, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", ["cu_seqlens", "actions"])
def test_an_index_that_is_written_over_after_the_forward_is_not_read_again(name, backend, index):
    tensors = arguments(name)
    if index not in tensors:
        return
    want = differentiated(name, arguments(name), backend)

    def write():
        tensors[index].numpy()[:] = FAR

    same(differentiated(name, tensors, backend, write), want)


@pytest.mark.parametrize("written", ["mask", "temperature"])
@pytest.mark.parametrize("form", ["token_stats", "linear_token_stats", "soft_bellman_loss"])
@pytest.mark.parametrize("chosen", ["cpp", "reference"])
def test_a_mask_or_temperature_that_is_written_over_after_the_forward_is_not_read_again(form, written, chosen):
    if written == "mask" and form != "soft_bellman_loss":
        return
    run_here(chosen)
    gradients = []
    for write in (False, True):
        x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
        ids, rows = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.float64)
        given = {"mask": torch.ones(2, 3, dtype=torch.bool), "temperature": torch.ones(2, 3, dtype=torch.float64)}
        flat = {"temperature": given["temperature"].view(6), "backend": chosen}
        if form == "token_stats":
            total = dqo_kernels.token_stats(x.flatten(0, 1), ids.view(6), **flat).logprobs.sum()
        elif form == "linear_token_stats":
            head = torch.eye(5, dtype=torch.float64)
            total = dqo_kernels.linear_token_stats(
                x.flatten(0, 1), head, ids.view(6), **flat, workspace_bytes=80
            ).logprobs.sum()
        else:
            total = dqo_kernels.soft_bellman_loss(x, ids, rows, rows, ref_logprobs=-rows, **given, backend=chosen).loss
        if write:
            given[written].numpy()[:] = written == "temperature" and 9
        total.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("boundaries", [[0, 9, FAR], [-FAR, 0, 9], [0, FAR, 9], [0, 5, 8], [1, 2, 9], []])
def test_boundaries_that_nobody_checked_stop_at_the_kernel(boundaries):
    run_here("cpp")
    rows, cu_seqlens = torch.ones(9), torch.tensor(boundaries, dtype=torch.long)
    sequences = rows.new_ones(max(len(cu_seqlens) - 1, 0))
    ops, options = torch.ops.dqo_kernels, BellmanOptions(0.1, 0.9, 0.8, "td", "detach", "trajectory", None, None)
    calls = [
        lambda: ops.lambda_return(rows, rows, sequences, cu_seqlens, 0.9, 0.8, "cpp"),
        lambda: ops.soft_bellman(*[rows] * 4, cu_seqlens, *[None] * 4, *options, "cpp"),
    ]
    if boundaries:
        calls += [
            lambda: ops.lambda_return_backward(rows, cu_seqlens, 0.9, 0.8, "cpp"),
            lambda: ops.soft_bellman_backward_residual(rows, rows, cu_seqlens, None, *options, "cpp"),
        ]
    for run in calls:
        with pytest.raises(ValueError, match="cu_seqlens: expected boundaries from 0 to N = 9"):
            run()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("held", [0, 8])
def test_an_argument_whose_memory_was_given_back_is_named(name, held):
    for key in arguments(name):
        tensors = arguments(name)
        tensors[key].untyped_storage().resize_(held)
        with pytest.raises(ValueError, match=rf"{key}: expected a tensor with its numbers in memory.* {held} bytes"):
            call(name, tensors)


@pytest.mark.parametrize("name", ["token_stats", "linear_token_stats"])
@pytest.mark.parametrize("held", [0, 8])
def test_memory_that_is_given_back_before_the_backward_is_refused(name, native, held):
    for key in ("logits", "ref_logits", "weight", "hidden", "ref_weight"):
        tensors = arguments(name)
        if key in tensors:
            with pytest.raises(ValueError, match="a tensor of (linear_)?token_stats: .*freed or resized"):
                differentiated(name, tensors, native, lambda x=tensors[key]: x.untyped_storage().resize_(held))


def test_a_view_needs_what_it_spans_and_no_more():
    base = torch.randn(4, 3 * V)
    view = base[1:3, V : 2 * V]
    needed = 4 * (view.storage_offset() + 3 * V + V)
    base.untyped_storage().resize_(needed)
    dqo_kernels.token_stats(view, torch.zeros(2, dtype=torch.long))
    base.untyped_storage().resize_(needed - 1)
    with pytest.raises(ValueError, match="logits.*freed or resized"):
        dqo_kernels.token_stats(view, torch.zeros(2, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_negated_view_is_read_as_what_it_means(name, backend):
    want = differentiated(name, arguments(name), backend)
    negated = {key: torch._neg_view(-x) for key, x in arguments(name).items()}
    assert all(x.is_neg() for x in negated.values())
    same(differentiated(name, negated, backend), want)
    imaginary = {  # where users meet them: the imaginary part of a conjugate
        key: torch.complex(x, -x).conj().imag if x.is_floating_point() else x for key, x in arguments(name).items()
    }
    same(differentiated(name, imaginary, backend), want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*Sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning", "ignore:.*quantiz:DeprecationWarning")
def test_a_tensor_without_plain_memory_is_named_with_the_cure(name):
    odd = {
        "to_dense": lambda x: x.to_sparse(),
        "pack": lambda x: torch.nested.nested_tensor([x, x]),
        "dequantize": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        "dtype, got torch.complex64": lambda x: x.to(torch.complex64),
    }
    first = next(iter(ARGUMENTS[name]))
    for cure, made in odd.items():
        for key in {first, "actions" if "actions" in ARGUMENTS[name] else "values"}:
            tensors = arguments(name)
            tensors[key] = made(tensors[key])
            with pytest.raises(ValueError, match=f"{key}: expected .*{cure}"):
                call(name, tensors)


def test_fake_tensors_give_shapes():
    tensors = arguments("token_stats")
    with FakeTensorMode() as mode:
        tensors = {key: mode.from_tensor(x) for key, x in tensors.items()}
        stats = dqo_kernels.token_stats(**tensors)
    assert [tuple(x.shape) for x in stats] == [(9,)] * 6


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_gives_the_same_derivative_and_insisting_on_a_kernel_is_refused(name, native):
    tensors = {k: x.double() if x.is_floating_point() else x for k, x in arguments(name).items()}
    live = [k for k in tensors if any(tensors[k] is x for x in live_of(name, tensors))]
    _, *gradients = differentiated(name, tensors, "reference")
    point = [tensors[k].detach() for k in live]
    direction = [x.cos() for x in point]
    want = sum((g * d).sum() for g, d in zip(gradients, direction))

    def function(*x, backend=None):
        return call(name, tensors | dict(zip(live, x)), backend)

    torch.testing.assert_close(torch.func.jvp(function, tuple(point), tuple(direction))[1], want)
    for x, y in zip(torch.func.grad(function, tuple(range(len(live))))(*point), gradients):
        torch.testing.assert_close(x, y)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, d) for x, d in zip(point, direction)]
        torch.testing.assert_close(forward_ad.unpack_dual(function(*dual)).tangent, want)
        with pytest.raises(RuntimeError, match=f"{native}.*forward-mode.*backend='reference'"):
            function(*(x.float() for x in dual), backend=native)
    with pytest.raises(RuntimeError, match=f"{native}.*torch.func.*backend='reference'"):
        torch.func.jvp(lambda *x: function(*x, backend=native), tuple(point), tuple(direction))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_right_or_refused(name, backend):
    tensors = arguments(name)
    if backend == "reference":
        tensors = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    live = live_of(name, tensors)
    gradients = torch.autograd.grad(call(name, tensors, backend), live, create_graph=True)
    same(gradients, differentiated(name, arguments(name) if backend != "reference" else tensors, backend)[1:])
    penalty = sum(g.square().sum() for g in gradients) + sum(x.sum() for x in live)
    if backend != "reference":
        with pytest.raises(RuntimeError, match="has no second derivative; backend='reference' has one"):
            penalty.backward()
        return
    second = torch.autograd.grad(penalty, live)
    if "bellman" in name:  # has stopped gradients, which differences do not know
        return
    step = 1e-5
    directions = [x.detach().cos() for x in live]
    ends = []
    for sign in (1, -1):
        moved = dict(tensors)
        for k in moved:
            moved[k] = moved[k].detach()
        for x, d in zip(live, directions):
            key = next(k for k in tensors if tensors[k] is x)
            moved[key] = x.detach() + sign * step * d
        _, *g = differentiated(name, moved, backend)
        ends.append(sum(x.square().sum() for x in g) + sum(x.detach().sum() for x in live_of(name, moved)))
    along = sum((s * d).sum() for s, d in zip(second, directions))
    torch.testing.assert_close(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", checks.INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_indices_may_be_of_any_integer_dtype(dtype, backend):
    for name in NAMES:
        tensors = arguments(name)
        for key in {"actions", "cu_seqlens"} & set(tensors):
            tensors[key] = tensors[key].to(dtype)
        same([call(name, tensors, backend)], [call(name, arguments(name), backend)])


def test_a_huge_unsigned_id_is_out_of_range():
    tensors = arguments("token_stats") | {"actions": torch.full((9,), 2**64 - 1, dtype=torch.uint64)}
    with pytest.raises(ValueError, match=r"actions: expected token ids in \[0, 6\)"):
        call("token_stats", tensors)


@pytest.mark.parametrize("name", [name for name in NAMES if "actions" in ARGUMENTS[name]])
def test_the_label_to_ignore_is_refused_by_name(name):
    tensors = arguments(name)
    tensors["actions"][2] = -100
    with pytest.raises(ValueError, match="actions.*ids from -100.*-100 marks rows to ignore.*mask="):
        call(name, tensors)


def test_the_label_to_ignore_is_fine_where_the_mask_is_false(backend):
    mask = torch.tensor([[True, False, True], [True, True, False]])
    rows = {"rewards": torch.ones(2, 3), "values": torch.zeros(2, 3), "ref_logprobs": -torch.ones(2, 3), "mask": mask}
    logits, zeros = BATCH.logits[:6].float().view(2, 3, V), torch.zeros(2, 3, dtype=torch.long)
    losses = [
        dqo_kernels.soft_bellman_loss(logits, torch.where(mask, zeros, label), backend=backend, **rows).loss
        for label in (0, -100)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name, key", [("token_stats", "logits"), ("lambda_return", "rewards"),
    ("soft_bellman", "logprobs"), ("linear_token_stats", "hidden"), ("linear_row_loss", "hidden")])  # fmt: skip
def test_padded_tensors_are_told_how_they_become_packed(name, key):
    tensors = arguments(name)
    tensors[key] = tensors[key].unflatten(0, (3, 3))
    with pytest.raises(ValueError, match=rf"{key}: expected shape \(N.*got shape \(3, 3.*flatten.*cu_seqlens"):
        call(name, tensors)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_entries_in_other_dimensions_are_told_the_shape(name):
    for key in {"actions", "values", "ref_logprobs"} & set(ARGUMENTS[name]):
        for shape in ((3, 3), (9, 1), (1, 9)):
            tensors = arguments(name)
            tensors[key] = tensors[key].view(shape)
            with pytest.raises(ValueError, match=rf"{key}: expected shape \(9,\).*; reshape it to \(9,\)"):
                call(name, tensors)


NUMBERS = {
    "temperature": [0.0, -1.0, float("inf"), float("nan"), 1e300, 1e-40, "1", None, True, 10**400],
    "softcap": [0.0, -1.0, float("inf"), float("nan"), 1e300, 1e-40, "1", True],
    "beta": [0.0, -1.0, float("inf"), float("nan"), 1e300, 1e-40, "1", None, torch.tensor(0.1)],
    "gamma": [-0.1, float("inf"), float("nan"), 1e300, "1", None],
    "lam": [-0.1, float("inf"), float("nan"), 1e300, "1", None],
    "is_cap": [float("nan"), float("-inf"), 1e300, "1"],
    "is_floor": [float("nan"), float("inf"), -1e300, "1"],
    "kl_coef": [float("inf"), float("nan"), 1e300, "1", None],
    "policy_scale": [float("inf"), float("nan"), 1e300, "1", None],
    "value_coef": [float("inf"), float("nan"), 1e300, "1", None],
    "lora_scale": [float("inf"), float("nan"), 1e300, "1", None],
    "loss_scale": [float("inf"), float("nan"), 1e300, "1", None],
    "workspace_bytes": [0, -1, float("nan"), float("inf"), "1"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_number_without_use_is_refused_before_any_backend(name, monkeypatch):
    import inspect

    from tests.kernels import edge_cases

    taken = set(inspect.signature(getattr(dqo_kernels, name)).parameters) & set(NUMBERS)
    assert taken
    for option in taken:
        for value in NUMBERS[option]:
            monkeypatch.setitem(edge_cases.OPTIONS, name, {option: value})
            with pytest.raises(ValueError, match=f"{option}: expected "):
                call(name, arguments(name))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 1e-40, 1e30])
def test_a_temperature_of_one_row_is_checked_like_one_of_all(value):
    for name in ("token_stats", "linear_token_stats", "soft_bellman_loss"):
        temperature = torch.ones(9)
        temperature[4] = value
        with pytest.raises(ValueError, match=r"temperature: expected a positive number in \[1e-06, 1e\+06\]"):
            call(name, arguments(name) | {"temperature": temperature})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token_stats", "soft_bellman_loss", "linear_token_stats"])
@pytest.mark.parametrize("option", ["temperature", "softcap", "beta", "is_cap", "is_floor"])
def test_the_outermost_numbers_mean_the_same_in_every_backend(name, backend, option, monkeypatch):
    import inspect

    from tests.kernels import edge_cases

    if option not in inspect.signature(getattr(dqo_kernels, name)).parameters:
        return
    ends = {"is_cap": [-1e4, 1e4, float("inf")], "is_floor": [-1e4, float("-inf")]}
    for value in ends.get(option, [checks.SMALLEST, checks.LARGEST]):
        monkeypatch.setitem(edge_cases.OPTIONS, name, {option: value})
        got, want = (differentiated(name, arguments(name), chosen) for chosen in (backend, "reference"))
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
        # Of gradients only that they are numbers: at 1/temperature = 1e6 float32 leaves few of their digits.
        assert all(torch.equal(x.isfinite(), y.isfinite()) for x, y in zip(got, want, strict=True))


def test_a_transform_chooses_the_backend_that_knows_it():
    found = []

    def spied(x):
        found.append(dispatch.choose("token_stats", "cpu"))
        return x.sum()

    torch.func.grad(spied)(torch.ones(2))
    assert found == ["reference"] and dispatch.choose("token_stats", "cpu") != "reference"


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_what_has_no_part_in_a_return_makes_it_neither_infinite_nor_nan(wrong, backend):
    cu_seqlens, rewards = torch.tensor([0, 2, 4]), torch.ones(4)
    values, ends = torch.full((4,), wrong), torch.full((2,), wrong)
    lambda_one = dqo_kernels.lambda_return(rewards, values, cu_seqlens, lam=1.0, backend=backend)
    assert lambda_one.tolist() == [2, 1, 2, 1]
    alone = dqo_kernels.lambda_return(rewards, values, cu_seqlens, gamma=0.0, bootstrap=ends, backend=backend)
    assert alone.tolist() == [1, 1, 1, 1]
