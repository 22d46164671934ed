"""Tiny models, tokenizers and episodes that the trainer's tests share."""

from __future__ import annotations

import random

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dqo.data.episode import Episode
from dqo.grading.arith import VOCABULARY, ArithTask
from dqo.models.new import character_tokenizer, new_llama
from dqo.models.policy import hidden_positions

TASK = ArithTask(2, 4)


def tokenizer():
    return character_tokenizer(VOCABULARY)


def policy(seed: int = 0, hidden_size: int = 16, layers: int = 1):
    return new_llama(tokenizer(), hidden_size=hidden_size, layers=layers, heads=2, max_length=64, seed=seed)


def untied(seed: int = 3):
    """`policy` with a head of its own."""
    torch.manual_seed(seed)
    config = policy().config
    config.tie_word_embeddings = False
    return LlamaForCausalLM(config)


def gpt2():
    """A model whose class has dropout, a bias, and Conv1D in the place of Linear."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.3))


def rollout_rows(prompts: int = 8, samples: int = 4, seed: int = 0) -> list[dict]:
    """Rows of the arith task: demonstrations, about half of which a wrong digit spoils."""
    rng = random.Random(seed)
    rows = []
    for _ in range(prompts):
        prompt = TASK.problem(rng)
        for _ in range(samples):
            text = TASK.solution(prompt)
            if rng.random() < 0.5:
                text = text[:-1] + str((int(text[-1]) + rng.randint(1, 9)) % 10)
            rows.append({"prompt": prompt, "completion": text, "reward": float(TASK.grade(prompt, text).correct)})
    return rows


def measured(rows: list[dict]) -> list[dict]:
    """The same rows with two steps each, and what the prefixes that end with them are worth."""
    cuts = [len(row["completion"]) // 2 for row in rows]
    return [
        row | {"steps": [[0, cut], [cut, len(row["completion"])]], "step_rewards": [0.5, row["reward"]]}
        for row, cut in zip(rows, cuts)
    ]


def episodes(count: int = 6, seed: int = 0, reference: bool = True, terminated: bool = True) -> list[Episode]:
    """Random token ids of uneven lengths, rewards on every token."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        length = int(rng.integers(1, 9))
        ids = rng.integers(3, 19, length).tolist()
        label = bool(i % 2)
        found.append(
            Episode(
                prompt_ids=rng.integers(3, 19, int(rng.integers(1, 7))).tolist(),
                completion_ids=ids,
                rewards=rng.normal(size=length).astype(np.float32),
                reward=float(label),
                label=label,
                terminated=terminated,
                prompt_index=i // 2,
                source=f"row {i + 1}",
                ref_logprobs=-rng.random(length).astype(np.float32) if reference else None,
                ref_lse=rng.normal(size=length).astype(np.float32) if reference else None,
            )
        )
    return found


def hidden_rows(model, batch, bf16: bool = False) -> torch.Tensor:
    """(N, D): the hidden states of a batch's rows."""
    return hidden_positions(model, batch, bf16)[batch.states]


def gradients(*models) -> torch.Tensor:
    """All gradients in one vector; zeros where a parameter has none."""
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for model in models for p in model.parameters()]
    return torch.cat([g.flatten() for g in flat]).double()


def arguments(files, **changes) -> list[str]:
    """Options of a short run in the directory that the fixture `files` makes."""
    settings = {
        "dataset_name": files / "rollouts.jsonl",
        "model_name_or_path": files / "model",
        "output_dir": files / "out",
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "logging_steps": 4,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-2,
        "eval_fraction": 0.2,
    } | changes
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]
