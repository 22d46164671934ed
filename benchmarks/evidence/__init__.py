"""What shows that the methods learn: the demonstration over several seeds, and every objective on one rollout file.

`python -m benchmarks.evidence.methods` and `python -m benchmarks.evidence.objectives`; each writes to benchmarks/results.
"""
