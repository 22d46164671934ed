"""[sum, count] metrics of micro-batches -> numbers of a step, and metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from dqo.objectives.sums import mean_metric
from dqo_kernels import TokenStats


def add(total: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    return total | {name: total[name] + value if name in total else value for name, value in more.items()}


def common(stats: TokenStats, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every objective logs."""
    metrics = {"entropy": mean_metric(stats.entropy)}
    if "ref_logprobs" in rows:
        # k3 on stored responses: an estimate of the distance, not of KL(pi || ref) once the policy has moved far
        back = rows["ref_logprobs"] - stats.logprobs.detach()
        metrics["kl"] = mean_metric(back.clamp(max=20.0).exp() - 1.0 - back)
    return metrics


def finish(sums: dict[str, Tensor]) -> dict[str, float]:
    """Means; mean squares become the value model's explained variance 1 - Var(G - V) / Var(G)."""
    means = {name: (value[0] / value[1]).item() for name, value in sums.items() if value[1] > 0}

    def variance(name: str) -> float | None:
        square = means.pop(f"{name}/mean_square", None)
        return None if square is None else square - means[f"{name}/mean"] ** 2

    of_returns, of_error = variance("returns"), variance("value_error")
    means.pop("value_error/mean", None)
    if of_returns is not None and of_returns > 0:
        means["value/explained_variance"] = 1.0 - of_error / of_returns
    if "rewards/chosen" in means and "rewards/rejected" in means and "rewards/margins" not in means:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


class MetricsFile:
    """metrics.jsonl: one object a line, append-only, cut back to a checkpoint's position on resume."""

    def __init__(self, path: Path, position: int = 0):
        path.touch()
        self.file = path.open("r+")
        self.file.truncate(position)
        self.file.seek(position)

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def position(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def peak_memory_gb() -> float:
    """Of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
