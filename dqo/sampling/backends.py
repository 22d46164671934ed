"""What samples: transformers' generate, or vLLM, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from dqo.data.ends import Ends, ends_of
from dqo.errors import UserError, did_you_mean
from dqo.models.generate import Request, Response, Sampling, generate
from dqo.models.policy import load_policy, load_tokenizer, stop_ids


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

    def __init__(self, model_path: str, *, dtype: torch.dtype, batch_size: int, device: str):
        import transformers

        self.tokenizer = load_tokenizer(model_path)
        self.policy = load_policy(model_path, device, dtype)
        self.ends = ends_of(self.tokenizer, stop_ids(self.policy))
        self.batch_size = batch_size
        self.record = {"backend": "transformers", "version": transformers.__version__}

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, description: str = "sample", quiet: bool = False
    ) -> Iterator[tuple[int, Response]]:
        return generate(
            self.policy,
            requests,
            sampling,
            stop_ids=self.ends.stops,
            pad_id=self.tokenizer.pad_token_id,
            batch_size=self.batch_size,
            description=description,
            quiet=quiet,
        )


BACKENDS: dict[str, Callable[..., Backend]] = {"transformers": TransformersBackend}


def load_backend(
    name: str,
    model_path: str,
    *,
    dtype: str = "float32",
    batch_size: int = 64,
    device: str | None = None,
) -> Backend:
    """Loads a model into a backend.

    Args:
        name: one of BACKENDS.
        model_path: a model's or an adapter's directory or hub name.
        dtype: of the weights, as torch names it.
        batch_size: responses that are generated at once; a backend that batches by itself takes no heed of it.
        device: as torch names it; None: a GPU where there is one.
    """
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}.{did_you_mean(name, BACKENDS)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return BACKENDS[name](model_path, dtype=getattr(torch, dtype), batch_size=batch_size, device=device)
