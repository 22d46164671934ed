"""`dqo convert`: published data becomes a rollout file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from dqo.config.flags import parse_flags
from dqo.convert.entry import FORMATS, convert

PLACE = 3


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a public data format into a rollout file."""

    format: Positional[Annotated[str, tyro.conf.arg(help=f"The format of the source is one of {', '.join(FORMATS)}.")]]
    source: Positional[str]
    """The source is a .jsonl or .parquet file, the folder of a saved data set, or a name on the Hugging Face hub (org/name,
    org/name:split or org/name:configuration:split; org/name@revision chooses a revision)."""
    destination: Positional[str]
    """The rollout file (.jsonl) to write."""
    messages: bool = False
    """Prompts and completions are written as messages, for models with a chat template."""
    keep_annotations: bool = True
    """The completions keep GSM8K's annotations <<expression=value>>."""
    step_penalty: float | None = None
    """A line with a wrong calculator annotation has minus this as its step reward. It is an option of gsm8k-solutions, where
    None is 0.5."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        if self.step_penalty is None or self.step_penalty >= 0:
            return []
        return [("step_penalty", f"must be at least 0 or None, got {self.step_penalty}")]


def convert_command(arguments: list[str], prog: str = "dqo convert") -> None:
    """Turn a public data format into a rollout file."""
    config = parse_flags(ConvertConfig, arguments, prog)
    for name, value in convert(**dataclasses.asdict(config)).items():
        several = isinstance(value, dict)
        shown = ", ".join(f"{key} {share:.4g}" for key, share in value.items()) if several else _short(value)
        print(f"{name:>32}  {shown}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
