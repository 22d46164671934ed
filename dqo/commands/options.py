"""Options of the commands that have no module of their own for them."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a public data format into a rollout file."""

    format: Positional[str]
    """Format of the source. Solutions with step labels: gsm8k-solutions, prm800k, math-shepherd, math-aps. Other trainers' data:
    trl-preference, trl-kto, trl-stepwise, oreo, open-r1, verl."""
    source: Positional[str]
    """.jsonl or .parquet file, folder of a saved data set, or name on the Hugging Face hub (org/name or org/name:split)."""
    destination: Positional[str]
    """Rollout file to write (.jsonl)."""
    messages: bool = False
    """Write prompts and completions as messages, for models with a chat template."""
    keep_annotations: bool = True
    """Leave GSM8K's <<expression=value>> in the completions."""
    step_penalty: float | None = None
    """gsm8k-solutions: step reward of a line with a wrong calculator annotation is minus this; 0.5 unless given."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        if self.step_penalty is None or self.step_penalty >= 0:
            return []
        return [("step_penalty", f"must be at least 0 or None, got {self.step_penalty}")]


@dataclass(frozen=True)
class InitConfig:
    """Make a small randomly initialised Llama and a byte-level BPE tokenizer trained on a rollout file."""

    dataset_name: str
    """Rollout file whose prompts and completions the tokenizer is trained on."""
    output_dir: str
    """New directory of model and tokenizer."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    hidden_size: int = 256
    """Width."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    max_length: int = 1024
    """Positions."""
    seed: int = 0
    """Of the weights."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        found = [("seed", f"must be at least 0, got {self.seed}")] if self.seed < 0 else []
        # the tokenizer begins with 256 bytes and three special tokens
        for name, least in {"vocab_size": 259, "hidden_size": 1, "layers": 1, "heads": 1, "max_length": 1}.items():
            if getattr(self, name) < least:
                found.append((name, f"must be at least {least}, got {getattr(self, name)}"))
        return found
