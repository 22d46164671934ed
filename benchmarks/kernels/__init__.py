"""One benchmark an operation of `dqo_kernels` (bench_*.py), and the small awkward cases that every backend must agree on.

`pytest benchmarks/kernels --benchmark-only` measures; `python -m benchmarks.kernels.small_cases` compares.
"""
