"""The real model's part of docs/evidence.md: SmolLM2-135M-Instruct on short problems, by eight methods, in pieces."""
