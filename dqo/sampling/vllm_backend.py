"""vLLM's offline class `LLM`. A request has a seed of its own; vLLM does not promise that the batch makes no difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from dqo.data.ends import ends_of
from dqo.errors import UserError
from dqo.models.adapters import CONFIG, adapter_base
from dqo.models.generate import Request, Response, Sampling
from dqo.models.named import load_tokenizer, stop_ids

LEAST = (
    "0.10.2"  # the first whose log-probabilities can be those of the distribution after temperature, top_k and top_p
)


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise UserError(f"backend vllm needs the package vllm: pip install 'dqo[vllm]' ({error})") from error
    if Version(vllm.__version__) < Version(LEAST):
        raise UserError(
            f"backend vllm needs vllm>={LEAST}, and {vllm.__version__} is installed: pip install 'vllm>={LEAST}'"
        )
    return vllm


class VllmBackend:
    """A model in vLLM. An adapter is not merged; vLLM loads it beside its base."""

    def __init__(self, model_path: str, dtype: torch.dtype, batch_size: int, **engine: Any):
        vllm = _vllm()
        base = adapter_base(model_path)
        self.lora = None
        if base is not None:
            from vllm.lora.request import LoRARequest

            self.lora = LoRARequest("adapter", 1, model_path)
            engine |= {"enable_lora": True, "max_lora_rank": _rank(model_path)}
        self.tokenizer = load_tokenizer(model_path)
        self.ends = ends_of(self.tokenizer, stop_ids(model_path))
        self.batch_size = batch_size
        self.record = {"backend": "vllm", "version": vllm.__version__}
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=base or model_path,
            tokenizer=self.tokenizer.name_or_path,  # an adapter may have none
            dtype=str(dtype).removeprefix("torch."),
            generation_config="vllm",  # the model's own would set top_p and others
            logprobs_mode="processed_logprobs",
            **engine,
        )

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, description: str = "sample", quiet: bool = False
    ) -> Iterator[tuple[int, Response]]:
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            outputs = self._llm.generate(
                [{"prompt_token_ids": request.prompt_ids} for request in batch],
                [self._params(**self._settings(sampling, request)) for request in batch],
                use_tqdm=not quiet,
                lora_request=self.lora,
            )
            for index, output in enumerate(outputs, start=start):
                yield index, self._response(output.outputs[0])

    def _settings(self, sampling: Sampling, request: Request) -> dict[str, Any]:
        settings = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": sorted(self.ends.stops),
            "ignore_eos": True,  # the stops are these alone, as with the other backend
            "logprobs": 0,  # of the chosen token alone
            "detokenize": False,
        }
        if sampling.temperature > 0:
            digest = hashlib.sha256(json.dumps([sampling.seed, *request.key]).encode()).digest()
            settings |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "seed": int.from_bytes(digest[:6], "big")}
        return settings

    def _response(self, output: Any) -> Response:
        ids = list(output.token_ids)
        if output.finish_reason not in ("stop", "length") or not ids or output.logprobs is None:
            raise UserError(f"vllm gave no whole response (finish_reason {output.finish_reason!r}, {len(ids)} tokens)")
        logprobs = [min(float(step[token].logprob), 0.0) for token, step in zip(ids, output.logprobs)]
        if len(logprobs) != len(ids):
            raise UserError(f"vllm gave {len(logprobs)} log-probabilities of {len(ids)} tokens")
        return Response(ids, logprobs, ids[-1] in self.ends.stops)


def _rank(path: str) -> int:
    """The largest rank of an adapter's matrices, rounded up to one that vLLM takes."""
    from transformers.utils import find_adapter_config_file

    found = find_adapter_config_file(path)
    assert found is not None  # `adapter_base` read it
    values = json.loads(Path(found).read_text())
    rank = max([values.get("r", 16), *(values.get("rank_pattern") or {}).values()])
    sizes = (8, 16, 32, 64, 128, 256, 320, 512)
    fitting = [size for size in sizes if size >= rank]
    if not fitting:
        raise UserError(f"{path}: r is {rank} in {CONFIG}, and vLLM takes adapters of rank {sizes[-1]} at most")
    return fitting[0]
