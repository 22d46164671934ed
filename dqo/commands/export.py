"""`dqo export`: what a run trained as one directory that transformers and vLLM load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from dqo.config.flags import parse_flags
from dqo.train.saved import find_saved

PLACE = 12


@dataclass(frozen=True)
class ExportConfig:
    """Write the policy of a run, its adapter merged, as transformers and vLLM load it, and compare it with what was trained."""

    run: Positional[str]
    """The run is this output_dir, a checkpoint in one, or the directory of an adapter."""
    output_dir: str
    """The new directory where model, tokenizer, generation_config and model card are written."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The weights are written in this type. None takes that of the run's final models, and for an adapter that of its base."""
    value_model: bool = False
    """The value model is written too, as critic/, for AutoModelForTokenClassification."""
    push_to_hub: str | None = None
    """The directory is uploaded to this repository of the Hugging Face hub, "name" or "organisation/name"."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range: none."""
        return []


def export_command(arguments: list[str], prog: str = "dqo export") -> None:
    """Write a run's policy, its adapter merged, as transformers and vLLM load it."""
    config = parse_flags(ExportConfig, arguments, prog)
    find_saved(Path(config.run))  # a run that cannot be exported is refused before torch is imported
    from dqo.train.export import export

    print(
        export(
            config.run,
            config.output_dir,
            dtype=config.dtype,
            value_model=config.value_model,
            push_to_hub=config.push_to_hub,
        )
    )
