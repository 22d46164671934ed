"""What samples: transformers' generate, or vLLM, chosen by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from dqo.config.launcher import whole_models
from dqo.data.ends import Ends, ends_of
from dqo.errors import UserError, did_you_mean
from dqo.models.generate import Request, Response, Sampling, generate
from dqo.models.named import load_config, load_tokenizer, stop_ids
from dqo.models.policy import load_policy
from dqo.processes import Processes, launched

BATCH_SIZES = {"transformers": 64, "vllm": 4096}  # by the name of the backend


class Backend(Protocol):
    """A loaded model that gives responses. `record` says what it is, for the `sampling` record of rows."""

    tokenizer: Any
    ends: Ends
    record: dict[str, Any]

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, description: str = ..., quiet: bool = ...
    ) -> Iterator[tuple[int, Response]]:
        """(index of the request, response), in any order; see `dqo.models.generate.generate`."""
        ...


class TransformersBackend:
    """transformers' generate with its KV cache."""

    def __init__(self, model_path: str, dtype: torch.dtype, batch_size: int, device: str):
        import transformers

        self.tokenizer = load_tokenizer(model_path)
        self.policy = load_policy(model_path, device, dtype)
        self.ends = ends_of(self.tokenizer, stop_ids(self.policy))
        self.batch_size = batch_size
        self.record = {"backend": "transformers", "version": transformers.__version__}

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, description: str = "sample", quiet: bool = False
    ) -> Iterator[tuple[int, Response]]:
        try:
            yield from generate(
                self.policy,
                requests,
                sampling,
                stop_ids=self.ends.stops,
                pad_id=self.tokenizer.pad_token_id,
                batch_size=self.batch_size,
                description=description,
                quiet=quiet,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU has too little memory for {self.batch_size} responses at once: take a smaller --batch_size"
            ) from error


def dtype_of(name: str, model_path: str) -> torch.dtype:
    """The dtype that torch calls so; "auto": the one in which the weights are stored, float32 where that is not told."""
    stored = load_config(model_path).dtype if name == "auto" else name
    return stored if isinstance(stored, torch.dtype) else getattr(torch, stored or "float32")


def launched_for(command: str, backend: str, use_cpu: bool = False) -> Processes:
    """The processes over which a command splits its requests: those of `accelerate launch`, or this one alone.

    Raises:
        UserError: for settings of the launcher that the command does not have.
    """
    processes = launched(whole_models(command) or use_cpu)
    if processes.world > 1 and backend == "vllm":
        raise UserError(
            f"{processes.world} processes were launched, and vllm spreads a model over GPUs by itself: start {command} as one "
            "process" + (", with --tensor_parallel_size" if command == "dqo sample" else "")
        )
    return processes


def load_backend(
    name: str,
    model_path: str,
    *,
    dtype: str = "float32",
    batch_size: int | None = None,
    device: str | None = None,
    **engine: Any,
) -> Backend:
    """Loads a model into a backend.

    Args:
        name: "transformers" or "vllm".
        model_path: a model's or an adapter's directory or hub name.
        dtype: of the weights, as torch names it, or "auto".
        batch_size: responses that are generated at once; None: that of BATCH_SIZES.
        device: as torch names it, for transformers; None: a GPU where there is one.
        engine: arguments of vLLM's `LLM`.
    """
    if name not in BATCH_SIZES:
        raise UserError(f"unknown backend {name!r}; known: {', '.join(BATCH_SIZES)}.{did_you_mean(name, BATCH_SIZES)}")
    batch_size = batch_size or BATCH_SIZES[name]
    if name == "vllm":
        from dqo.sampling.vllm_backend import VllmBackend

        return VllmBackend(model_path, dtype_of(dtype, model_path), batch_size, **engine)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return TransformersBackend(model_path, dtype_of(dtype, model_path), batch_size, device)
