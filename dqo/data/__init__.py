"""Rollout files become episodes: rows of any form, their checks, and their tokens.

Data flows sources -> forms -> checks -> rows -> chat, tokens, ids -> episodes -> batches. Knows no model.
"""
