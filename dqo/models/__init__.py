"""Language models and what is made of them: policy, value model (critic), adapters, packed attention, samples.

A model from any source is checked here before a run uses it. Knows no objective.
"""
