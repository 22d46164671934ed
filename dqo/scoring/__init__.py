"""Grades stored responses by a verifier, splits them into steps, and measures pass rates of their prefixes.

Training never imports this package.
"""
