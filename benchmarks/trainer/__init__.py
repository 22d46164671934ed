"""The trainer measured: a step beside TRL's, where a step's time goes, and every architecture of transformers, made small.

`pytest benchmarks/trainer --benchmark-only`; `python -m benchmarks.trainer.step_overhead` and `.architectures`.
"""
