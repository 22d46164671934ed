"""Scores by which responses and their beginnings are ranked, one file each.

A module has NEEDS, which of "value_model", "reference" and "separators" it reads, and `score(models, batch)`: (B,) of a batch's B
episodes.
"""
