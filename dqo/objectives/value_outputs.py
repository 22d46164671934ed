"""What the outputs of a value model mean where a cross-entropy fits them, and not a squared error.

    bce        one output z      V = low + (high - low) * sigmoid(z); cross-entropy with p = (G - low) / (high - low)
    hl_gauss   BINS outputs      V = the mean of softmax(z) over bins of equal width; cross-entropy with the masses that a normal
                                 distribution around G has in the bins, its deviation SIGMA bins (HL-Gauss, arXiv 2403.03950)

low and high are the least and the greatest return of the training data, and G is clipped to them. MARGIN bins lie on each side of
them, so that the distribution around either end has its mean there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dqo.objectives.sums import mean_metric

BINS, MARGIN, SIGMA = 51, 3, 0.75


def output_count(kind: str) -> int:
    """How many outputs a state has; `kind` is the option value_loss."""
    return BINS if kind == "hl_gauss" else 1


def _edges(low: Tensor, high: Tensor) -> Tensor:
    """(..., BINS + 1) of the bins."""
    places = (torch.arange(BINS + 1, dtype=low.dtype, device=low.device) - MARGIN) / (BINS - 2 * MARGIN)
    return low[..., None] + (high - low)[..., None] * places


def _middles(low: Tensor, high: Tensor) -> Tensor:
    """(..., BINS) of the bins."""
    edges = _edges(low, high)
    return (edges[..., 1:] + edges[..., :-1]) / 2


def values_of(outputs: Tensor, low: float, high: float) -> Tensor:
    """(..., K) outputs of a cross-entropy's value model -> (...) values."""
    if outputs.shape[-1] == 1:
        return low + (high - low) * outputs[..., 0].sigmoid()
    return outputs.softmax(-1) @ _middles(outputs.new_tensor(low), outputs.new_tensor(high))


def outputs_for(kind: str, value: float, low: float, high: float) -> Tensor:
    """(K,) float32: outputs whose value is `value`, between low and high; of hl_gauss those of the greatest entropy."""
    if kind == "squared":
        return torch.tensor([value])
    inside = min(max((value - low) / (high - low), 1e-3), 1.0 - 1e-3)  # neither end can be reached
    if kind == "bce":
        return torch.tensor([math.log(inside / (1.0 - inside))])
    places = _middles(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    least, greatest = -1e4, 1e4  # of the slope; the mean rises with it
    for _ in range(80):
        slope = (least + greatest) / 2
        below = bool((slope * places).softmax(0) @ places < inside)
        least, greatest = (slope, greatest) if below else (least, slope)
    found = slope * places
    return (found - found.mean()).float()


def target_masses(returns: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(N,) returns between low and high (N,) -> (N, BINS) masses that add up to 1."""
    width = (high - low) / (BINS - 2 * MARGIN)
    scaled = (_edges(low, high) - returns[:, None]) / (math.sqrt(2.0) * SIGMA * width)[:, None]
    masses = torch.erf(scaled).diff(dim=-1)
    return masses / masses.sum(-1, keepdim=True)


def cross_entropy(outputs: Tensor, returns: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(N,): of outputs (N, K) with returns between low and high, (N,) each."""
    if outputs.shape[-1] == 1:
        chance = (returns - low) / (high - low)
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], chance, reduction="none")
    return -(target_masses(returns, low, high) * outputs.log_softmax(-1)).sum(-1)


def value_losses(
    rows: dict[str, Tensor], squared: Tensor, returns: Tensor, weights: Tensor | None = None, at: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value model's loss in M states, and what to log of it: `squared` where the rows have no value_outputs, else their
    cross-entropy with the clipped returns, times `weights`.

    Args:
        rows: value_outputs (N, K) and value_range (N, 2), low and high, where a cross-entropy fits the value model.
        squared: (M,), with its weights. returns: (M,), constants.
        at: (M,) the rows of the states; None: all of them.
    """
    if "value_outputs" not in rows:
        return squared, {}
    outputs, bounds = (rows[name] if at is None else rows[name][at] for name in ("value_outputs", "value_range"))
    low, high = bounds.unbind(-1)
    inside = returns.detach().clamp(low, high)
    losses = cross_entropy(outputs, inside, low, high)
    beyond = (returns - inside).abs() > 1e-6 * (high - low)  # by more than rounding
    found = losses if weights is None else weights * losses
    return found, {"returns/clipped_frac": mean_metric(beyond.to(losses.dtype))}


def outcome_losses(rows: dict[str, Tensor], cu_seqlens: Tensor, otherwise: Tensor) -> Tensor:
    """(B,) the loss of a value model that is fitted to the outcome of whole responses; `otherwise` where the rows have none."""
    own = rows.get("outcome_loss")
    return otherwise if own is None else own[cu_seqlens[1:] - 1]
