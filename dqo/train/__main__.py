"""`python -m dqo.train`, for launchers of processes: the command `dqo-train`."""

from dqo.commands.cli import train_main

train_main()
