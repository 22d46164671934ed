"""`python -m dqo.train`, for launchers of processes: the command `dqo-train`."""

from dqo.commands.train import main

main()
