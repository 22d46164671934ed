"""Differentiable operations of Direct Q-function Optimization (arXiv 2410.09302) on packed response tokens."""

from dqo_kernels.gather_weight import gather_weight
from dqo_kernels.lambda_return import lambda_return
from dqo_kernels.linear_row_loss import linear_row_loss
from dqo_kernels.linear_soft_bellman_loss import linear_soft_bellman_loss
from dqo_kernels.linear_token_stats import linear_token_stats
from dqo_kernels.soft_bellman import SoftBellmanTerms, soft_bellman
from dqo_kernels.soft_bellman_loss import SoftBellmanOutput, soft_bellman_loss
from dqo_kernels.token_stats import TokenStats, token_stats

__all__ = [
    "SoftBellmanOutput",
    "SoftBellmanTerms",
    "TokenStats",
    "gather_weight",
    "lambda_return",
    "linear_row_loss",
    "linear_soft_bellman_loss",
    "linear_token_stats",
    "soft_bellman",
    "soft_bellman_loss",
    "token_stats",
]
