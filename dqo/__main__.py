"""`python -m dqo <command>`, for machines where the scripts are not on the path."""

from dqo.commands.cli import main

main()
