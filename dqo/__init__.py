"""Direct Q-function Optimization (arXiv 2410.09302): offline reinforcement learning for language-model reasoning."""

__version__ = "0.1.0"
