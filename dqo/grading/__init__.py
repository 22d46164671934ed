"""Grades a response's text: what is right, and which step is wrong.

One file a verifier: gsm8k, math (answers, math_grader) and the built-in arithmetic. Knows strings, not rows.
"""
