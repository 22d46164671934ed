"""How good a policy is on problems with a verifier.

Samples responses and grades them; training never imports this package.
"""
