"""What shows that the methods learn: the demonstration over several seeds, and every objective on one rollout file.

`python -m benchmarks.evidence.methods`, `.objectives` and `.critics` (which critic earns its cost); each
writes to benchmarks/results.
"""
