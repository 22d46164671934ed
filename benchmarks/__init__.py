"""What the package's speed, memory and learning are measured with; none of it is installed with the package.

`pytest benchmarks/ --benchmark-only` measures operations and steps; `python -m benchmarks.report` writes RESULTS.md.
"""
