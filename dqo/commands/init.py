"""`dqo init`: a small random model, for a first run without a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dqo.config.flags import parse_flags
from dqo.data.chat import completion_text
from dqo.data.mixed import open_data

PLACE = 5


@dataclass(frozen=True)
class InitConfig:
    """Make a small randomly initialised Llama and a byte-level BPE tokenizer trained on a rollout file."""

    dataset_name: str
    """The tokenizer is trained on the prompts and completions of this rollout file."""
    output_dir: str
    """The new directory where model and tokenizer are written."""
    vocab_size: int = 4096
    """The vocabulary has at most this many tokens."""
    hidden_size: int = 256
    """The hidden states of the model have this width."""
    layers: int = 4
    """The model has this many transformer blocks."""
    heads: int = 4
    """Each block has this many attention heads."""
    max_length: int = 1024
    """A text may have at most this many positions."""
    seed: int = 0
    """The random weights depend on this seed."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        found = [("seed", f"must be at least 0, got {self.seed}")] if self.seed < 0 else []
        # the tokenizer begins with 256 bytes and three special tokens
        for name, least in {"vocab_size": 259, "hidden_size": 1, "layers": 1, "heads": 1, "max_length": 1}.items():
            if getattr(self, name) < least:
                found.append((name, f"must be at least {least}, got {getattr(self, name)}"))
        return found


def init_command(arguments: list[str], prog: str = "dqo init") -> None:
    """Make a small random model with a tokenizer trained on a rollout file."""
    config = parse_flags(InitConfig, arguments, prog)
    rows = open_data(config.dataset_name)
    from dqo.models import new as new_model  # torch from here on

    texts = list({row.prompt: None for row in rows if isinstance(row.prompt, str)}) + [completion_text(r) for r in rows]
    tokenizer = new_model.bpe_tokenizer(texts, config.vocab_size)
    size = {"hidden_size": config.hidden_size, "layers": config.layers, "heads": config.heads}
    model = new_model.new_llama(tokenizer, **size, max_length=config.max_length, seed=config.seed)
    new_model.save(model, tokenizer, Path(config.output_dir))
    print(f"{config.output_dir}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")
