"""`dqo inspect`: what a finished run says of each token of stored responses."""

from __future__ import annotations

import os
import sys

from dqo.config.flags import parse_flags
from dqo.errors import UserError
from dqo.inspection.options import InspectConfig

PLACE = 10


def inspect_command(arguments: list[str], prog: str = "dqo inspect") -> None:
    """Show what a finished run says of each token of stored responses."""
    config = parse_flags(InspectConfig, arguments, prog)
    from dqo.inspection.run import inspect  # torch from here on
    from dqo.inspection.terminal import summary_of, text_of

    options = {name: value for name, value in vars(config).items() if name not in ("run", "by")}
    found = inspect(config.run, **options, quiet=False)
    if config.output_file is not None:
        print("\n".join([*summary_of(found), f"page: {config.output_file}"]))
        return
    if config.by not in found.scales:
        raise UserError(f"by {config.by}: {config.run} has no value model; choose one of {', '.join(found.scales)}")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(text_of(found, config.by, colour))
