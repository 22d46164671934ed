"""`python -m dqo <command>`, for machines where the scripts are not on the path."""

from dqo.commands.base import main

main()
