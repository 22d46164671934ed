"""What our operations are measured beside, and why a candidate cannot run where it cannot.

Installed with `pip install -e .[bench]`; none is needed, one that is missing is skipped with a reason. What each computes:
    trl        selective_log_softmax, entropy_from_logits: log-probability and entropy of one model in the dtype of the logits;
               torch operations on the CPU, one Triton kernel on a GPU. No exact KL (its trainers estimate it from samples).
               ChunkedLogProbFunction: log-probabilities from hidden states and the head, in tiles of the vocabulary, projected
               again in the backward; the losses of DPOTrainer and KTOTrainer, which call it (trainer/trl_steps.py).
    liger      liger_cross_entropy: log-probability alone; Triton, so GPU only; its gradient overwrites the logits.
               triton_grpo_loss: another loss of the same inputs, one model's logits, the reference's log-probabilities given.
               liger_fused_linear_cross_entropy, LigerFusedLinearGRPOLoss: from hidden states and the head, the gradient made in
               the forward; the first is Triton, the second torch operations.
    torch      F.linear_cross_entropy (2.13): cross-entropy from hidden states and the head, in chunks of rows.
    cut-cross-entropy   the same; its Triton kernels need a GPU, its other form is torch.compile of all logits.
    torchrl    td_lambda_return_estimate (a loop over time) and its vectorised form (a convolution): lambda-returns, padded.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable

import torch

from benchmarks.harness.environment import size
from benchmarks.harness.timing import Candidate, Case
from dqo_kernels.core import dispatch


def _devices(backend: str, operations: tuple[str, ...]) -> tuple[str, ...]:
    """Where the table lists it for all of `operations`. Triton on the CPU is its interpreter, which nobody measures."""
    listed = [d for d in ("cpu", "cuda") if all(backend in dispatch.TABLE[op].get(d, ()) for op in operations)]
    return tuple(d for d in listed if (backend, d) != ("triton", "cpu"))


def ours(build_with: Callable, operations: tuple[str, ...], computes: str = "everything") -> list[Candidate]:
    """One candidate for each of our backends; `build_with(inputs, backend)` gives its phases."""

    def candidate(backend: str) -> Candidate:
        return Candidate(
            backend,
            computes,
            lambda inputs: build_with(inputs, backend),
            lambda case, device_type: backend_reason(operations, device_type, backend),
            backend,
            _devices(backend, operations),
        )

    return [candidate(name) for name in dispatch.BACKENDS if _devices(name, operations)]


def backend_reason(operations: tuple[str, ...], device_type: str, backend: str) -> str | None:
    for operation in operations:
        try:
            dispatch.choose(operation, device_type, backend)
        except (ValueError, RuntimeError) as error:
            return str(error)
    return None


def default_backend(operations: tuple[str, ...], device_type: str) -> str:
    """What a user gets who does not ask; an operation without kernels has one implementation."""
    return dispatch.choose(operations[0], device_type) if operations[0] in dispatch.TABLE else "ours"


def needs(package: str) -> Callable:
    def reason(case: Case, device_type: str) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; run `pip install -e .[bench]`"
        return None

    return reason


def needs_cpp(case: Case, device_type: str) -> str | None:
    return dispatch.unavailable("cpp")


def compiled(function: Callable) -> Callable:
    """Compiled for the exact shapes of a case, without graph breaks."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def compile_reason(in_smoke: bool = False) -> Callable:
    def reason(case: Case, device_type: str) -> str | None:
        if size() == "smoke" and not in_smoke:
            return "DQO_BENCH=smoke compiles one operation only"
        if device_type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "torch.compile needs a C++ compiler"
        return None

    return reason


def trl_logprobs_entropy(logits, actions):
    """(logprobs, entropy) as TRL's trainers compute them; the entropy without a gradient."""
    if logits.is_cuda and importlib.util.find_spec("trl.kernels"):  # since 1.16: what its trainers call there
        from trl.kernels import selective_log_softmax_and_entropy

        logprobs, entropy = selective_log_softmax_and_entropy(logits, actions)
        return logprobs, entropy.detach()
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return selective_log_softmax(logits, actions), entropy


def trl_chunked_reason(case: Case, device_type: str) -> str | None:
    if reason := needs("trl")(case, device_type):
        return reason
    if not importlib.util.find_spec("trl.kernels"):
        return "this trl has no trl.kernels.ChunkedLogProbFunction; 1.16 does"
    return None


def trl_chunked_logprobs(hidden, weight, actions):
    """As its trainers call it, without the statistics that they log."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    options = (
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        (),
    )  # temperature, columns a tile, softcap, scale, statistics
    logprobs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, actions, *options)
    return logprobs


def linear_cross_entropy_reason(case: Case, device_type: str) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked torch.nn.functional.linear_cross_entropy; 2.13 does"
    return None


def cut_cross_entropy_reason(case: Case, device_type: str) -> str | None:
    if reason := needs("cut_cross_entropy")(case, device_type):
        return reason
    if device_type == "cpu":
        return compile_reason()(case, device_type)
    return "its Triton kernels differentiate 16-bit inputs only" if case.dtype.itemsize > 2 else None


def cut_cross_entropy(hidden, weight, actions):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, actions, impl="cce" if hidden.is_cuda else "torch_compile")


def liger_linear_cross_entropy(hidden, weight, actions):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, actions)


def liger_chunked_grpo(device_type: str, sequences: int) -> Callable:
    """Of (hidden (B, T, D), weight, actions (B, T), mask, advantages (B,)); compiled on a GPU as it is by default. Each of its
    chunks has a gradient of the head of its own, so one is best; inside it the vocabulary is tiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=device_type == "cuda", chunk_size=sequences)


def liger_logprobs(logits, actions):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return -liger_cross_entropy(logits, actions, reduction="none")


def torchrl_returns(rewards, values, gamma: float, lam: float, *, vectorised: bool):
    """(B, T) -> (B, T); every row ends its episode at T."""
    from torchrl.objectives.value import functional

    estimate = functional.vec_td_lambda_return_estimate if vectorised else functional.td_lambda_return_estimate
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))[..., None]
    done = torch.zeros_like(following, dtype=torch.bool)
    done[:, -1] = True
    return estimate(gamma, lam, following, rewards[..., None], done)[..., 0]
