"""Zeroth-order policy gradient: a policy learns from comparisons of its own samples, without a gradient through the model."""
