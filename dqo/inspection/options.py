"""The options of `dqo inspect`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

By = Literal["advantage", "soft_value", "value", "kl"]


@dataclass(frozen=True)
class InspectConfig:
    """Show what a finished run says of each token of stored responses: in the terminal, or with --output_file as a page."""

    run: Positional[str]
    """The output_dir of a run, a checkpoint in it, or what was exported of it."""
    dataset_name: str
    """The responses are in this file (.jsonl or .parquet), in any form that training reads."""
    by: Annotated[
        By,
        tyro.conf.arg(
            help="The terminal colours tokens by this: the advantage beta*log(pi/ref), the soft value of the logits, the value "
            "model's V, or the exact KL to the reference. A page has all of them."
        ),
    ] = "advantage"
    responses: int = 6
    """This many responses are shown, right and wrong ones of distinct prompts."""
    rows: tuple[str, ...] = ()
    """The rows in these lines of the file are shown in their place: 12, or 3-7."""
    output_file: str | None = None
    """A self-contained page is written to this file."""
    overwrite: bool = False
    """A page that exists is replaced."""
    ref_model_name_or_path: str | None = None
    """The reference is in this directory, or has this name on the hub. None takes that of the run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """The models' weights have this type. The value auto takes the one in which they are stored."""
    use_cpu: bool = False
    """The models run on the CPU although there is an accelerator."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        return [] if self.responses >= 1 else [("responses", f"must be at least 1, got {self.responses}")]
