"""Responses of fixed length to equally long prompts: `dqo sample`'s generate beside transformers' own with do_sample.

    pytest benchmarks/trainer/bench_sample.py --benchmark-only

A Qwen2 with random weights, in float32; no token ends a response, so that both write the same number of tokens. Ours draws each
response from a stream of its own and keeps the log-probabilities; transformers does neither. Variants: the distribution that is
sampled.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from benchmarks.harness.records import parametrize
from benchmarks.harness.timing import Candidate, Case, Operation, Phases
from benchmarks.harness.units import TOKENS
from dqo.models.generate import Request, Sampling, generate

MODELS = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
    "20M": {"vocab_size": 151936, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2},
    "0.5B": {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
}
SHAPES = {  # model, responses, prompt, response
    "smoke": (("tiny", 4, 8, 8),),
    "default": (("tiny", 64, 16, 48), ("20M", 16, 16, 16)),
    "full": (("tiny", 256, 16, 48), ("20M", 64, 16, 24)),
    "cuda": (("0.5B", 64, 128, 128), ("0.5B", 256, 128, 128)),
}
VARIANTS = {
    "whole": {},
    "temperature 0.7": {"temperature": 0.7},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
}
END = 1  # its logit is -inf


def cases(device_type: str, size: str) -> list[Case]:
    shapes = SHAPES["cuda" if device_type == "cuda" and size != "smoke" else size]
    return [
        Case(f"{model} {responses}x({prompt}+{response})", (model, responses, prompt, response), variant=variant)
        for model, responses, prompt, response in shapes
        for variant in VARIANTS
    ]


class Endless(Qwen2ForCausalLM):
    """A model that never ends a response."""

    def forward(self, *arguments, **more):
        output = super().forward(*arguments, **more)
        output.logits[..., END] = -torch.inf
        return output


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    name, responses, prompt, _ = case.dims
    config = Qwen2Config(tie_word_embeddings=True, num_attention_heads=2, num_key_value_heads=2, **MODELS[name])
    return SimpleNamespace(
        model=Endless(config).to(device).eval(),
        prompts=torch.randint(2, config.vocab_size, (responses, prompt)).tolist(),
        length=case.dims[3],
        options=VARIANTS[case.variant],
    )


def _transformers(x: SimpleNamespace) -> Phases:
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": x.length, "eos_token_id": [END], "pad_token_id": 0}
    config = GenerationConfig(**settings | x.options)
    ids = torch.tensor(x.prompts, device=x.model.device)

    def forward():
        found = x.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return {"tokens": (found[:, ids.shape[1] :].cpu() != END).sum(1)}

    return Phases(forward)


def _ours(x: SimpleNamespace) -> Phases:
    requests = [Request(prompt, (i,)) for i, prompt in enumerate(x.prompts)]
    sampling = Sampling(max_new_tokens=x.length, **x.options)

    def forward():
        found = generate(x.model, requests, sampling, stop_ids=[END], pad_id=0, batch_size=len(requests), quiet=True)
        return {"tokens": torch.tensor([len(response.ids) for _, response in found])}

    return Phases(forward)


CANDIDATES = [
    Candidate("ours", "responses and their log-probabilities, each from a stream of its own", _ours, profiled=False),
    Candidate("reference", "responses, by transformers' generate with do_sample", _transformers, profiled=False),
]
OPERATION = Operation(
    "sample",
    cases,
    inputs,
    CANDIDATES,
    {"forward": ("tokens of the responses", lambda case: case.dims[1] * case.dims[3])},
    unit=TOKENS,
    modes=("forward",),
)


@parametrize(OPERATION)
def bench_sample(run, case, mode, implementation):
    run(OPERATION, case, mode, implementation)
