"""One file a command of `dqo`; each parses its options before torch is imported.

`cli` names the commands and turns errors into one line.
"""
