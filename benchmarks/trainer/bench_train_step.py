"""One training step without the optimizer: forward of the models, loss, gradient of every parameter.

    pytest benchmarks/trainer/bench_train_step.py --benchmark-only

A Qwen2 with a vocabulary of 151,936 and random weights in float32, on synthetic pairs of responses; the reference's
log-probabilities are given. Variants: "dqo", "dpo" and "kto", the objectives of this package, all through
`dqo.train.step.accumulate` on the same tokens. DQO trains a value model too, a second trunk; KTO first looks at companions,
every prompt with another prompt's response, without a gradient. TRL's DPO and KTO must give the loss and gradients of ours.

Mode "forward" evaluates the loss without a gradient; "both" is the step. `accumulate` takes the gradient itself.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.harness import peers
from benchmarks.harness.records import parametrize
from benchmarks.harness.timing import Candidate, Case, Operation, Phases
from benchmarks.harness.units import TOKENS
from benchmarks.trainer import trl_steps
from dqo.data.batches import Batching, groups_of
from dqo.data.episode import Episode
from dqo.data.selection import selected
from dqo.models.critic import value_model_from
from dqo.models.policy import policy_stats
from dqo.objectives import DPO, DQO, KTO
from dqo.processes import Processes
from dqo.reference.columns import add_reference
from dqo.train.engine import Engine
from dqo.train.learner import Learner
from dqo.train.step import accumulate

DISPATCHED = ("linear_row_loss", "soft_bellman")
OBJECTIVES = {"dqo": DQO(), "dpo": DPO(), "kto": KTO()}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # 20M parameters
QWEN = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}  # Qwen2.5-0.5B
MODELS = {
    "tiny": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "20M": {"vocab_size": 151936, **SMALL},
    "0.5B": {"vocab_size": 151936, **QWEN},
}  # fmt: skip
SHAPES = {  # model, pairs, prompt, response
    "smoke": (("tiny", 2, 4, 12),),
    "default": (("20M", 2, 32, 96),),
    "full": (("20M", 4, 32, 96), ("20M", 8, 32, 224)),
    "cuda": (("0.5B", 8, 128, 384),),
}


def cases(device_type: str, size: str) -> list[Case]:
    shapes = SHAPES["cuda" if device_type == "cuda" and size != "smoke" else size]
    return [
        Case(f"{model} {2 * pairs}x({prompt}+{response})", (model, pairs, prompt, response), variant=variant)
        for model, pairs, prompt, response in shapes
        for variant in OBJECTIVES
    ]


def _model(name: str, device: torch.device) -> Qwen2ForCausalLM:
    shape = MODELS[name]
    config = Qwen2Config(tie_word_embeddings=True, num_key_value_heads=2, **shape)
    return Qwen2ForCausalLM(config).to(device)


def _episodes(pairs: int, prompt: int, response: int, vocab: int) -> list[Episode]:
    """Chosen, rejected, chosen, rejected, ...; the outcome is paid on the last token."""
    generator, episodes = np.random.default_rng(0), []
    for i in range(2 * pairs):
        chosen = i % 2 == 0
        if chosen:
            prompt_ids = generator.integers(0, vocab, prompt).tolist()
        rewards = np.zeros(response, np.float32)
        rewards[-1] = float(chosen)
        ids = generator.integers(0, vocab, response).tolist()
        episodes.append(Episode(prompt_ids, ids, rewards, float(chosen), chosen, True, i // 2, f"synthetic:{i}"))
    return episodes


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    model, *lengths = case.dims
    objective = OBJECTIVES[case.variant]
    episodes = _episodes(*lengths, MODELS[model]["vocab_size"])
    if case.variant == "kto":
        selected(objective, episodes)  # gives companions
    reference = _model(model, device)
    budget = 2 * sum(lengths[1:])  # two responses a batch
    batching, alone = Batching(0, budget, device), Processes(device=device)
    add_reference(episodes, lambda batch: policy_stats(reference, batch), batching, alone)
    policy = _model(model, device)
    value_model = value_model_from(policy) if objective.needs_values else None
    return SimpleNamespace(objective=objective, episodes=episodes, learner=Learner(policy, value_model))


def _step(loss, models: dict[str, torch.nn.Module]) -> Phases:
    """`loss()` gives a step's loss with its graph, or detached with the gradient left in the parameters."""

    def forward():
        return {"loss": loss()}

    def backward(outputs):
        if outputs["loss"].requires_grad:
            outputs["loss"].backward()
        gradients = {}
        for prefix, model in models.items():
            for name, parameter in model.named_parameters():
                gradients[f"{prefix} {name}"], parameter.grad = parameter.grad, None
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    return Phases(forward, backward)


@contextmanager
def _insisting_on(backend: str):
    """The trainer has no such argument: its users choose by the environment."""
    before = os.environ.get("DQO_KERNELS_BACKEND")
    os.environ["DQO_KERNELS_BACKEND"] = backend
    try:
        yield
    finally:
        del os.environ["DQO_KERNELS_BACKEND"]
        if before is not None:
            os.environ["DQO_KERNELS_BACKEND"] = before


def _ours(x: SimpleNamespace, backend: str) -> Phases:
    groups = groups_of(x.episodes, x.objective.group_size)
    tokens = sum(e.length for e in x.episodes)  # one micro-batch
    device = x.learner.device
    engine = Engine(x.learner, x.learner, Batching(0, tokens, device), Processes(device=device))

    def loss():
        with _insisting_on(backend):
            sums, _ = accumulate(engine, x.objective, groups)
        total, count = sums["loss"]
        return total / count

    return _step(loss, dict(x.learner.named_children()))


def _trl(x: SimpleNamespace, make_loss: Callable, make_batch: Callable) -> Phases:
    """On a copy of the policy: the trainer changes a model's forward."""
    policy = copy.deepcopy(x.learner.policy)
    loss, batch = make_loss(policy, x.objective), make_batch(x.episodes, policy.device)
    return _step(lambda: loss(batch), {"policy": policy})


CANDIDATES = [
    *peers.ours(_ours, DISPATCHED, "the step of the variant's objective, and its metrics"),
    Candidate(
        "trl dpo",
        "DPO and its metrics, by DPOTrainer.compute_loss without checkpointing; on the CPU its head scores the prompts too",
        lambda x: _trl(x, trl_steps.dpo_loss, trl_steps.dpo_batch),
        peers.trl_chunked_reason,
        suits=lambda case: case.variant == "dpo",
    ),
    Candidate(
        "trl kto",
        "KTO and its metrics, by KTOTrainer.compute_loss in the same way, with the same companions",
        lambda x: _trl(x, trl_steps.kto_loss, trl_steps.kto_batch),
        peers.trl_chunked_reason,
        suits=lambda case: case.variant == "kto",
    ),
]


def _tokens(case: Case) -> int:
    _, pairs, prompt, response = case.dims
    return 2 * pairs * (prompt + response)


TEXT = "prompts and responses of both of every pair; companions are not counted"
OPERATION = Operation(
    "train_step",
    cases,
    inputs,
    CANDIDATES,
    {"forward": (TEXT, _tokens), "both": (TEXT, _tokens)},
    DISPATCHED,
    tolerance=lambda case: 1e-3,
    unit=TOKENS,
    modes=("forward", "both"),
)


@parametrize(OPERATION)
def bench_train_step(run, case, mode, implementation):
    run(OPERATION, case, mode, implementation)
