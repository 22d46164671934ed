"""What each process of a group runs for test_vocab_parallel.py; a case raises where its process disagrees with one process."""

import itertools
import json
import traceback

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dqo_kernels import (
    gather_weight,
    linear_row_loss,
    linear_soft_bellman_loss,
    linear_token_stats,
    soft_bellman_loss,
    token_stats,
)

BACKENDS = {"reference": torch.float64, "cpp": torch.float64, "triton": torch.float32}
WIDTH, VOCAB, LENGTHS = 5, 23, (3, 1, 0, 5)
ROWS = sum(LENGTHS)
CASES = {}


def backends_of(processes):
    """Triton for two: its kernels see one process's columns, and those of three are no other kind. The others for three, where
    one process has neighbours on both sides."""
    return {name: dtype for name, dtype in BACKENDS.items() if (processes == 2) == (name == "triton")}


def options_of(backend, *options):
    """Every combination; with Triton, whose interpreter takes seconds for each, every fifth. What the others change is the torch
    code between the kernels, which is the same with every backend."""
    return list(itertools.product(*options))[:: 5 if backend == "triton" else 1]


def case(function):
    CASES[function.__name__.removeprefix("check_")] = function
    return function


def columns(rank, processes, vocab=VOCAB):
    """Uneven slices: the first processes have one column more, and one of them far fewer."""
    ends = [0, *(vocab * (k + 1) // processes for k in range(processes))]
    if processes > 1:
        ends[1] = 2
    return slice(ends[rank], ends[rank + 1])


def tensors(seed, dtype, scale=1.0):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (scale * torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype)

    made = {
        "hidden": normal(ROWS, WIDTH), "weight": normal(VOCAB, WIDTH), "bias": normal(VOCAB),
        "lora_a": normal(2, WIDTH), "lora_b": normal(VOCAB, 2),
        "ref_hidden": normal(ROWS, WIDTH), "ref_weight": normal(VOCAB, WIDTH), "ref_bias": normal(VOCAB),
        "rewards": normal(ROWS), "values": normal(ROWS), "behavior_logprobs": -normal(ROWS).abs(),
    }  # fmt: skip
    return made, torch.randint(VOCAB, (ROWS,), generator=rng), torch.tensor([0, 3, 4, 4, 9])


OF_VOCAB = ("weight", "bias", "lora_b", "ref_weight", "ref_bias")
LIVE = ("hidden", "weight", "bias", "lora_a", "lora_b")


def leaves(made, mine=None):
    """Tensors that receive gradients and constants; with `mine` only those columns of what is cut."""
    cut = {name: x[mine] if mine is not None and name in OF_VOCAB else x for name, x in made.items()}
    return {name: x.clone().requires_grad_(name in (*LIVE, "values")) for name, x in cut.items()}


def close(got, want, dtype):
    options = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 3e-5, "atol": 3e-5}
    torch.testing.assert_close(got, want, **options)


def compare(whole, part, mine, names, dtype):
    for name in names:
        want = whole[name].grad[mine] if name in OF_VOCAB else whole[name].grad
        close(part[name].grad, want, dtype)


def weighted(stats):
    """Gives every statistic of every row an upstream gradient of its own."""
    fields = torch.stack([x for x in (stats.logprobs, stats.lse, stats.entropy, stats.kl) if x is not None])
    rng = torch.Generator().manual_seed(9)
    return (fields * torch.randn(fields.shape, generator=rng, dtype=torch.float64).to(fields.dtype)).sum()


def logits_of(x):
    update = F.linear(F.linear(x["hidden"], x["lora_a"]), x["lora_b"])
    return F.linear(x["hidden"], x["weight"], x["bias"]) + 0.5 * update


@case
def check_token_stats(group, rank, processes, backend, dtype):
    made, actions, _ = tensors(0, dtype)
    mine = columns(rank, processes)
    logits, ref = logits_of(made), F.linear(made["ref_hidden"], made["ref_weight"], made["ref_bias"])
    temperatures = torch.linspace(0.5, 2.0, ROWS, dtype=dtype)
    models = ((None, True), (50.0, True), (None, False))
    for offset, temperature, (softcap, with_ref) in options_of(
        backend, (0.0, 100.0, -100.0), (0.8, temperatures), models
    ):
        options = {"temperature": temperature, "softcap": softcap, "backend": backend}
        whole = (logits + offset).requires_grad_()
        part = (logits[:, mine] + offset).requires_grad_()
        want = token_stats(whole, actions, ref - offset if with_ref else None, **options)
        cut = (ref - offset)[:, mine] if with_ref else None
        got = token_stats(part, actions, cut, group=group, **options)
        for x, y in zip(got, want, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                close(x, y, dtype)
        (whole_grad,) = torch.autograd.grad(weighted(want), whole)
        (part_grad,) = torch.autograd.grad(weighted(got), part)
        close(part_grad, whole_grad[:, mine], dtype)


@case
def check_empty_slices_and_nan(group, rank, processes, backend, dtype):
    made, actions, _ = tensors(1, dtype)
    mine = columns(rank, processes)
    logits, ref = logits_of(made), F.linear(made["ref_hidden"], made["ref_weight"], made["ref_bias"])
    first = columns(0, processes)
    actions = actions.clamp(min=first.stop)
    actions[3] = 0
    logits[1, first] = -torch.inf  # nothing possible in the first process's columns
    ref[1, first] = -torch.inf
    logits[2, first] = -torch.inf  # the reference may go there, the policy may not: finite KL
    ref[3, first] = -torch.inf  # and the other way round: infinite
    logits[4] = -torch.inf  # no distribution at all
    logits[5, VOCAB - 1] = torch.nan
    whole, part = logits.clone().requires_grad_(), logits[:, mine].clone().requires_grad_()
    want = token_stats(whole, actions, ref, backend=backend)
    got = token_stats(part, actions, ref[:, mine], group=group, backend=backend)
    assert got.kl[3] == torch.inf and got.logprobs[[4, 5]].isnan().all()
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert torch.equal(x.isnan(), y.isnan()), (name, x, y)
        close(x.nan_to_num(7.0, 8.0, 9.0), y.nan_to_num(7.0, 8.0, 9.0), dtype)
    usual = torch.tensor([0, 1, 2, 6, 7, 8])
    keep = weighted(type(got)(*(x[usual] for x in got))), weighted(type(want)(*(x[usual] for x in want)))
    (part_grad,), (whole_grad,) = torch.autograd.grad(keep[0], part), torch.autograd.grad(keep[1], whole)
    close(part_grad[usual], whole_grad[:, mine][usual], dtype)


@case
def check_identical_models_have_no_kl(group, rank, processes, backend, dtype):
    made, actions, _ = tensors(2, dtype, 3.0)
    logits = (logits_of(made) + 37.0)[:, columns(rank, processes)]
    stats = token_stats(logits, actions, logits, group=group, backend=backend)
    assert (stats.kl == 0).all() and (stats.logprobs <= 0).all()


@case
def check_ids_outside_the_vocabulary(group, rank, processes, backend, dtype):
    made, actions, _ = tensors(3, dtype)
    logits = logits_of(made)[:, columns(rank, processes)]
    for bad in (-1, VOCAB):
        actions[2] = bad
        try:
            token_stats(logits, actions, group=group, backend=backend)
        except ValueError as error:
            assert f"token ids in [0, {VOCAB})" in str(error)
        else:
            raise AssertionError("an id outside V was taken")


@case
def check_every_process_has_the_same_bits(group, rank, processes, backend, dtype):
    made, actions, _ = tensors(4, dtype)
    part = leaves(made, columns(rank, processes))
    ref = {name: part[name] for name in ("ref_hidden", "ref_weight", "ref_bias")}
    head = {name: part[name] for name in LIVE}
    stats = linear_token_stats(actions=actions, group=group, backend=backend, **head, **ref)
    weighted(stats).backward()
    for x in (*stats, part["hidden"].grad, part["lora_a"].grad):
        everyone = [torch.empty_like(x) for _ in range(processes)]
        dist.all_gather(everyone, x.detach().contiguous(), group=group)
        assert all(torch.equal(x, other) for other in everyone)


@case
def check_linear_token_stats(group, rank, processes, backend, dtype):
    made, actions, _ = tensors(5, dtype)
    mine, ref = columns(rank, processes), ("ref_hidden", "ref_weight", "ref_bias")
    for (workspace,) in options_of(backend, (4 * VOCAB * 8, None, 1)):
        whole, part = leaves(made), leaves(made, mine)
        results = []
        for x, of_group in ((whole, None), (part, group)):
            stats = linear_token_stats(
                actions=actions, group=of_group, backend=backend, workspace_bytes=workspace, lora_scale=0.5,
                temperature=torch.linspace(0.5, 2.0, ROWS, dtype=dtype), **{name: x[name] for name in (*LIVE, *ref)},
            )  # fmt: skip
            weighted(stats).backward()
            results.append(stats)
        for x, y in zip(*results, strict=True):
            close(x, y, dtype)
        compare(whole, part, mine, LIVE, dtype)


@case
def check_linear_row_loss(group, rank, processes, backend, dtype):
    made, actions, cu_seqlens = tensors(6, dtype)
    mine = columns(rank, processes)

    def row_loss(stats, rows, cu_seqlens):
        ends = cu_seqlens.tolist()
        sums = torch.stack([stats.logprobs[a:b].sum() for a, b in zip(ends[:-1], ends[1:], strict=True)])
        loss = sums.square().sum() + (rows["values"] * (stats.entropy + stats.lse)).sum() + stats.kl.square().sum()
        return loss, {"rows": stats.kl.new_tensor(len(stats.kl))}

    ref = ("ref_hidden", "ref_weight", "ref_bias")
    for workspace, coupling in options_of(backend, (None, 1, 6 * VOCAB * 8), ("group", "batch")):
        whole, part = leaves(made), leaves(made, mine)
        losses = []
        for x, of_group in ((whole, None), (part, group)):
            loss, sums = linear_row_loss(
                actions=actions, row_loss=row_loss, cu_seqlens=cu_seqlens, rows={"values": x["values"]},
                coupling=coupling, workspace_bytes=workspace, backend=backend, group=of_group, loss_scale=0.1,
                **{name: x[name] for name in (*LIVE, *ref)},
            )  # fmt: skip
            assert sums["rows"] == ROWS
            (3.0 * loss).backward()
            losses.append(loss)
        close(*losses, dtype)
        compare(whole, part, mine, (*LIVE, "values"), dtype)


@case
def check_soft_bellman_loss(group, rank, processes, backend, dtype):
    made, actions, cu_seqlens = tensors(7, dtype)
    mine = columns(rank, processes)
    for reduction, form in options_of(backend, ("mean", "sum", "none"), ("logits", "hidden")):
        whole, part = leaves(made), leaves(made, mine)
        results = []
        for x, of_group in ((whole, None), (part, group)):
            options = {
                "behavior_logprobs": x["behavior_logprobs"], "cu_seqlens": cu_seqlens, "kl_coef": 0.2, "lam": 0.9,
                "beta": 0.3, "reduction": reduction, "backend": backend, "group": of_group, "temperature": 0.7,
            }  # fmt: skip
            rows = actions, x["rewards"], x["values"]
            if form == "hidden":
                out = linear_soft_bellman_loss(
                    x["hidden"], x["weight"], *rows, bias=x["bias"], ref_hidden=x["ref_hidden"],
                    ref_weight=x["ref_weight"], ref_bias=x["ref_bias"], **options,
                )  # fmt: skip
            else:
                ref_logits = F.linear(x["ref_hidden"], x["ref_weight"], x["ref_bias"])
                logits = F.linear(x["hidden"], x["weight"], x["bias"])
                out = soft_bellman_loss(logits, *rows, ref_logits=ref_logits, **options)
            upstream = torch.linspace(-1, 2, ROWS, dtype=dtype) if reduction == "none" else 1.7
            (out.loss * upstream).sum().backward()
            results.append([x.detach() for x in out])
        for a, b in zip(*results, strict=True):
            close(a, b, dtype)
        # The gradient of hidden states that went through somebody's own F.linear is that process's share of it.
        compare(whole, part, mine, (*(("hidden",) if form == "hidden" else ()), "weight", "bias", "values"), dtype)


@case
def check_padded_rows_under_the_mask(group, rank, processes, backend, dtype):
    made, actions, _ = tensors(8, dtype)
    mine, mask = columns(rank, processes), torch.tensor([[True, True, False], [True, False, True], [False] * 3])
    logits, ref = logits_of(made).view(3, 3, VOCAB), F.linear(made["ref_hidden"], made["ref_weight"]).view(3, 3, VOCAB)
    logits[~mask], actions = torch.nan, actions.view(3, 3)
    rewards, values = made["rewards"].view(3, 3), made["values"].view(3, 3)
    results = []
    for own, of_group in ((slice(None), None), (mine, group)):
        live = logits[..., own].clone().requires_grad_()
        out = soft_bellman_loss(
            live, actions, rewards, values, ref_logits=ref[..., own], mask=mask, kl_coef=0.1, backend=backend,
            group=of_group,
        )  # fmt: skip
        out.loss.backward()
        results.append((out, live.grad))
    (want, whole_grad), (got, part_grad) = results
    for x, y in zip(got, want, strict=True):
        close(x, y, dtype)
    close(part_grad, whole_grad[..., mine], dtype)


@case
def check_different_rows_are_refused(group, rank, processes, backend, dtype):
    made, actions, _ = tensors(9, dtype)
    rows = ROWS - rank  # every process brings another number
    logits = logits_of(made)[:rows, columns(rank, processes)]
    try:
        token_stats(logits, actions[:rows], group=group, backend=backend)
    except ValueError as error:
        assert "group: expected the same rows in every process" in str(error)
    else:
        raise AssertionError("different rows were merged")


@case
def check_no_rows(group, rank, processes, backend, dtype):
    mine = columns(rank, processes)
    hidden, weight = torch.zeros(0, WIDTH, dtype=dtype).requires_grad_(), torch.ones(VOCAB, WIDTH, dtype=dtype)[mine]
    weight = weight.clone().requires_grad_()
    stats = linear_token_stats(hidden, weight, torch.zeros(0, dtype=torch.long), group=group, backend=backend)
    stats.logprobs.sum().backward()
    assert len(stats.lse) == 0 and not weight.grad.any()


@case
def check_sharded_head(group, rank, processes, backend, dtype):
    """FSDP2's data parallelism: each process has rows of its own, and a shard of the head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made, actions, _ = tensors(10, dtype)
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCAB).to(dtype)
    weight, bias = (x.detach().clone().requires_grad_() for x in (head.weight, head.bias))
    fully_shard(head, mesh=init_device_mesh("cpu", (processes,)))
    own = slice(rank, ROWS, processes)
    for name, call in {
        "weight": lambda: linear_token_stats(made["hidden"][own], head.weight, actions[own], backend=backend),
        "bias": lambda: linear_token_stats(
            made["hidden"][own], weight, actions[own], bias=head.bias, backend=backend
        ),
        "logits": lambda: token_stats(head.weight, actions[:0], backend=backend),
    }.items():  # fmt: skip
        try:
            call()
        except ValueError as error:
            assert name in str(error) and "DTensor" in str(error) and "gather_weight" in str(error), error
        else:
            raise AssertionError(f"a sharded {name} was taken")
    whole = gather_weight(head.weight), gather_weight(head.bias)
    assert all(type(x) is torch.Tensor for x in whole)
    stats = linear_token_stats(made["hidden"][own], whole[0], actions[own], bias=whole[1], backend=backend)
    stats.logprobs.sum().backward()
    plain = linear_token_stats(made["hidden"], weight, actions, bias=bias, backend=backend)
    (plain.logprobs.sum() / processes).backward()
    close(head.weight.grad.full_tensor(), weight.grad, dtype)
    close(head.bias.grad.full_tensor(), bias.grad, dtype)
    assert gather_weight(weight) is weight


def main(rank, processes, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    group, outcome = dist.group.WORLD, {}
    from dqo_kernels.core import dispatch
    from tests.kernels import triton_interpreter

    triton_interpreter.install()
    for backend, dtype in backends_of(processes).items():
        if dispatch.unavailable(backend) is not None:
            continue
        for name, function in CASES.items():
            try:
                function(group, rank, processes, backend, dtype)
                outcome[f"{name}-{backend}"] = ""
            except Exception:  # reported by the test; a process that waits for this one times out
                outcome[f"{name}-{backend}"] = traceback.format_exc()
            dist.barrier()
    with open(f"{results}.{rank}", "w") as file:
        json.dump(outcome, file)
    dist.destroy_process_group()
