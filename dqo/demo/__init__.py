"""The built-in demonstration: a base model, its samples, every method, one report.

Needs no network and no GPU; `dqo-train` without options runs it.
"""
