"""What shows that the methods learn: the demonstration over several seeds, and every objective on one rollout file.

`python -m benchmarks.evidence.methods`, `.objectives`, `.credit` and `.critics`; each writes to benchmarks/results.
`.study` compares all methods on many tasks, tuned alike, as docs/evidence.md says.
"""
