"""Responses of a model to prompts, by one of several backends, and the rollout files that `dqo sample` writes of them.

Training never imports this package.
"""
