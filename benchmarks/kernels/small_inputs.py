"""The inputs of small_cases.py: an operation's call on tensors made on the CPU, with what tends to go wrong.

Vocabularies that no vector width divides, rows longer than one program takes, an empty sequence, no rows at all, masks with
holes over NaN, strides that are not the width, softcaps and a temperature for every row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dqo_kernels import (
    lambda_return,
    linear_row_loss,
    linear_token_stats,
    soft_bellman,
    soft_bellman_loss,
    token_stats,
)

LENGTHS = (5, 1, 0, 40, 17, 0)
LONG = (1100, 0, 3)  # beyond the block of a scan, twice

Made = dict[str, Tensor]
Run = Callable[
    [Made, str], tuple[list[Tensor], Tensor]
]  # of the tensors and a backend: the results, and a loss of them


class SmallCase(NamedTuple):
    operation: str
    name: str
    made: Made  # on the CPU
    live: tuple[str, ...]  # those of `made` that receive a gradient
    run: Run
    value_bound: float = 1e-5  # |error| <= bound * (1 + |value|)


class Numbers:
    """Random tensors. Logits, hidden states and heads have the case's dtype; what is one number a row has float32."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.rng = dtype, torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.rng)).to(self.dtype)

    def rows(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)

    def actions(self, vocab: int, *shape: int) -> Tensor:
        return torch.randint(vocab, shape, generator=self.rng)

    def temperatures(self, *shape: int) -> Tensor:
        return 0.5 + torch.rand(*shape, generator=self.rng)


def _boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _weighted(results: list[Tensor]) -> Tensor:
    """A sum in which every entry has a weight of its own."""
    return sum(
        (x * (torch.arange(x.numel(), device=x.device) + i).cos().view(x.shape)).sum() for i, x in enumerate(results)
    )


def _token_stats(x: Made, backend: str, **options):
    stats = token_stats(
        x["logits"],
        x["actions"],
        x.get("ref_logits"),
        temperature=x.get("temperature", 0.7),
        backend=backend,
        **options,
    )
    fields = [field for field in stats if field is not None]
    return fields, _weighted([*fields[:3], *fields[5:]])  # not those of the reference


def _token_stats_cases(dtype: torch.dtype) -> Iterator[SmallCase]:
    shapes = (("one model", 13, 1003, {}), ("two models", 13, 1003, {"softcap": 6.0}), ("long rows", 3, 70_001, {}))
    shapes += (("aligned", 4, 1024, {"softcap": 30.0}), ("one column", 3, 1, {}), ("no rows", 0, 1003, {}))
    for name, n, vocab, options in shapes:
        make = Numbers(dtype)
        made = {"logits": make.normal(n, vocab, scale=4.0), "actions": make.actions(vocab, n)}
        if name != "one model":
            made |= {"ref_logits": make.normal(n, vocab, scale=4.0), "temperature": make.temperatures(n)}
        yield SmallCase("token_stats", name, made, ("logits",), functools.partial(_token_stats, **options), 2e-6)


def _scan_inputs(make: Numbers, lengths: tuple[int, ...]) -> Made:
    """In the case's dtype; the kernels compute in float32."""
    n, made = sum(lengths), {"cu_seqlens": _boundaries(lengths)}
    made |= {name: make.normal(n) for name in ("rewards", "values", "target_values", "lse", "ref_lse")}
    made |= {name: -make.normal(n).abs() for name in ("logprobs", "ref_logprobs", "behavior_logprobs")}
    return made | {"bootstrap": make.normal(len(lengths))}


def _lambda_return(x: Made, backend: str):
    returns = lambda_return(
        x["rewards"], x["values"], x["cu_seqlens"], gamma=0.99, lam=0.9, bootstrap=x["bootstrap"], backend=backend
    )
    return [returns], _weighted([returns])


def _lambda_return_cases(dtype: torch.dtype) -> Iterator[SmallCase]:
    for name, lengths in (("short", LENGTHS), ("long", LONG)):
        made = _scan_inputs(Numbers(dtype), lengths)
        yield SmallCase("lambda_return", name, made, ("rewards", "values", "bootstrap"), _lambda_return)


def _soft_bellman(x: Made, backend: str, given: tuple[str, ...] = (), **options):
    rows = (x["logprobs"], x["ref_logprobs"], x["rewards"], None if "lse" in given else x["values"], x["cu_seqlens"])
    optional = {name: x[name] for name in given}
    terms = soft_bellman(*rows, gamma=0.99, lam=0.9, reduction="none", backend=backend, **optional, **options)
    trained = [terms.policy_loss] if options.get("target") == "residual" else [terms.policy_loss, terms.value_loss]
    return list(terms), _weighted(trained)


SOFT_BELLMAN = {  # the live tensors beside the log-probabilities, the optional ones, the options
    "paper": (("values",), (), {}),
    "residual": (
        ("values", "bootstrap"),
        ("bootstrap",),
        {"target": "residual", "policy_target": "td", "is_level": "suffix", "is_floor": -0.5},
    ),
    "soft values": (("lse",), ("lse", "ref_lse"), {"policy_target": "one_step", "is_level": "token", "is_cap": 0.3}),
    "slow values": (
        ("values",),
        ("target_values", "behavior_logprobs", "bootstrap"),
        {"policy_target": "td", "is_level": "prefix"},
    ),
}


def _soft_bellman_cases(dtype: torch.dtype) -> Iterator[SmallCase]:
    for lengths in (LENGTHS, LONG):
        for name, (live, given, options) in SOFT_BELLMAN.items():
            run = functools.partial(_soft_bellman, given=given, **options)
            made = _scan_inputs(Numbers(dtype), lengths)
            name = f"{name}, {'long' if lengths == LONG else 'short'}"
            yield SmallCase("soft_bellman", name, made, ("logprobs", *live), run)


def _linear_inputs(make: Numbers, n: int) -> Made:
    width, vocab, rank = 24, 1003, 3
    made = {"hidden": make.normal(n, width), "weight": make.normal(vocab, width, scale=0.6), "bias": make.normal(vocab)}
    made |= {"lora_a": make.normal(rank, width, scale=0.3), "lora_b": make.normal(vocab, rank)}
    made |= {"ref_hidden": make.normal(n, width), "ref_weight": make.normal(vocab, width, scale=0.6)}
    return made | {"actions": make.actions(vocab, n), "temperature": make.temperatures(n)}


HEAD = ("hidden", "weight", "bias", "lora_a", "lora_b")
WORKSPACE = 40 * 1003 * 4 * 2  # bytes: not all rows at once


def _linear_token_stats(x: Made, backend: str):
    stats = linear_token_stats(**x, softcap=20.0, workspace_bytes=WORKSPACE, backend=backend)
    return list(stats), _weighted([stats.logprobs, stats.lse, stats.entropy, stats.kl])


def _linear_token_stats_cases(dtype: torch.dtype) -> Iterator[SmallCase]:
    yield SmallCase(
        "linear_token_stats", "all", _linear_inputs(Numbers(dtype), sum(LENGTHS)), HEAD, _linear_token_stats
    )


def _linear_row_loss(x: Made, backend: str, **options):
    def row_loss(stats, rows, cu_seqlens):
        loss = (rows["advantages"] * stats.logprobs + 0.3 * stats.lse - 0.2 * stats.entropy + 0.1 * stats.kl).sum()
        return loss, {"kl": stats.kl.sum(), "entropy": stats.entropy.sum()}

    head = {name: t for name, t in x.items() if name not in ("advantages", "cu_seqlens")}
    rows, cu_seqlens = {"advantages": x["advantages"]}, x["cu_seqlens"]
    options |= {"softcap": 20.0, "workspace_bytes": WORKSPACE, "loss_scale": 0.1, "backend": backend}
    loss, sums = linear_row_loss(row_loss=row_loss, rows=rows, cu_seqlens=cu_seqlens, **head, **options)
    return [loss, *sums.values()], loss


def _linear_row_loss_cases(dtype: torch.dtype) -> Iterator[SmallCase]:
    for coupling in ("group", "batch"):
        make = Numbers(dtype)
        made = _linear_inputs(make, sum(LENGTHS)) | {
            "advantages": make.rows(sum(LENGTHS)),
            "cu_seqlens": _boundaries(LENGTHS),
        }
        run = functools.partial(_linear_row_loss, coupling=coupling)
        yield SmallCase("linear_row_loss", coupling, made, (*HEAD, "advantages"), run)


def _soft_bellman_loss(x: Made, backend: str, **options):
    """Of padded logits one longer than the actions, as a model gives them: their rows are not neighbours in memory."""
    given = {name: t for name, t in x.items() if name not in ("logits", "actions", "rewards")}
    for name in ("logits", "ref_logits"):
        if name in x and x[name].dim() == 3:
            given[name] = x[name][:, :-1]
    logits = given.pop("logits", x["logits"])
    out = soft_bellman_loss(logits, x["actions"], x["rewards"], backend=backend, **given, **options)
    return [field for field in out if field is not None], out.loss


def _soft_bellman_loss_cases(dtype: torch.dtype) -> Iterator[SmallCase]:
    make, vocab, b, t = Numbers(dtype), 1003, 4, 9
    mask = torch.arange(t) < torch.tensor([[9], [4], [0], [7]])
    mask[3, 2] = False  # a hole
    padded = {"logits": make.normal(b, t + 1, vocab, scale=3.0), "ref_logits": make.normal(b, t + 1, vocab, scale=3.0)}
    padded["logits"][:, :-1][~mask] = torch.nan  # masked rows may hold anything
    padded |= {"actions": make.actions(vocab, b, t), "rewards": make.rows(b, t), "values": make.rows(b, t)}
    padded |= {"temperature": make.temperatures(b, t), "bootstrap": make.rows(b), "mask": mask}
    run = functools.partial(_soft_bellman_loss, kl_coef=0.1, softcap=15.0, lam=0.9)
    yield SmallCase("soft_bellman_loss", "padded, exact KL", padded, ("logits", "values"), run)
    run = functools.partial(run, is_level="suffix")
    yield SmallCase("soft_bellman_loss", "padded, exact KL, suffix weights", padded, ("logits", "values"), run)

    make, n = Numbers(dtype), sum(LENGTHS)
    packed = {"logits": make.normal(n, vocab, scale=3.0), "actions": make.actions(vocab, n), "rewards": make.rows(n)}
    packed |= {"ref_logprobs": -make.rows(n).abs() - 4, "cu_seqlens": _boundaries(LENGTHS)}
    given = packed | {"values": make.rows(n), "behavior_logprobs": -make.rows(n).abs() - 4}
    run = functools.partial(_soft_bellman_loss, is_level="token", policy_target="td", lam=0.9)
    yield SmallCase("soft_bellman_loss", "packed, log-probabilities given", given, ("logits", "values"), run)
    run = functools.partial(_soft_bellman_loss, target="residual", reduction="sum", policy_scale=0.5)
    soft = packed | {"ref_lse": make.rows(n)}
    yield SmallCase("soft_bellman_loss", "packed, soft values", soft, ("logits",), run)


CASES: dict[str, Callable[[torch.dtype], Iterator[SmallCase]]] = {
    "token_stats": _token_stats_cases,
    "lambda_return": _lambda_return_cases,
    "soft_bellman": _soft_bellman_cases,
    "linear_token_stats": _linear_token_stats_cases,
    "linear_row_loss": _linear_row_loss_cases,
    "soft_bellman_loss": _soft_bellman_loss_cases,
}
