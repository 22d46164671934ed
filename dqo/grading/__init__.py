"""Grades a response's text: what is right, and which step is wrong.

A verifier is one file and one line of the table in `verifiers`; `arith` is the built-in task. Knows strings, not rows.
"""
