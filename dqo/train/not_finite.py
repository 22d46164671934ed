"""A loss or a gradient that is no finite number: the run stops, names where, and keeps the batch for whoever looks into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dqo.data.episode import Episode
from dqo.errors import UserError
from dqo.files import replacing
from dqo.processes import Processes
from dqo.train.masters import master_of

CURE = "Lower the learning rate or raise beta, leave out bf16, and look for rewards or stored logprobs that are far too large"
_COLUMNS = ("rewards", "behavior_logprobs", "ref_logprobs", "ref_lse")
_NAMED = 5  # rows, and parameters, of a message


class NotFinite(UserError):
    """Where training stops. `episodes`: of the batch."""

    def __init__(self, message: str, episodes: Sequence[Episode]):
        super().__init__(message)
        self.episodes = episodes


def rows_of(episodes: Sequence[Episode]) -> str:
    """The first rows, for a message."""
    return ", ".join(e.source for e in episodes[:_NAMED]) + (" ..." if len(episodes) > _NAMED else "")


def wrong_gradients(model: nn.Module) -> str:
    """The parameters whose gradients are not finite, for a message; "" where they are sharded."""
    updated = ((name, master_of(parameter).grad) for name, parameter in model.named_parameters())
    gradients = {name: gradient for name, gradient in updated if gradient is not None}
    if any(isinstance(gradient, DTensor) for gradient in gradients.values()):
        return ""
    wrong = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    return (
        f" ({len(wrong)} of {len(gradients)} parameters: {', '.join(wrong[:_NAMED])}{' ...' * (len(wrong) > _NAMED)})"
    )


def stopped(error: NotFinite, what: str, output_dir, processes: Processes) -> UserError:
    """The error that ends the run, when the batch lies in output_dir/bad_batch.pt (each process has a file of its own)."""
    path = output_dir / (f"bad_batch-{processes.rank}.pt" if processes.rank else "bad_batch.pt")
    batch = [
        {"source": e.source, "prompt_ids": e.prompt_ids, "completion_ids": e.completion_ids, "label": bool(e.label)}
        | {name: torch.from_numpy(column) for name in _COLUMNS if (column := getattr(e, name)) is not None}
        for e in error.episodes
    ]
    kept = f"The batch is in {path}"
    try:
        with replacing(path) as beside:
            torch.save({"stopped": f"{what}: {error}", "rows": batch}, beside)
    except UserError as failed:  # what went wrong before is what matters
        kept = f"The batch is not kept: {failed}"
    return UserError(f"{what}: {error}. {CURE}. {kept}")
