"""Direct Q-function Optimization (arXiv 2410.09302): offline reinforcement learning for language-model reasoning."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["DQOConfig", "DQOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    """The trainer when it is asked for: it imports torch, which the command line's help does without."""
    if name in ("DQOConfig", "DQOTrainer"):
        from dqo import api

        return getattr(api, name)
    raise AttributeError(f"module 'dqo' has no attribute {name!r}")
