"""One file a command of `dqo`; each checks its options before torch is imported.

`base` finds the commands, runs one, and turns errors into one line.
"""
