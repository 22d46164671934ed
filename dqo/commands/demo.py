"""`dqo demo`: the built-in demonstration."""

from __future__ import annotations

import logging

from dqo.config.flags import parse_flags
from dqo.demo.recipe import DemoConfig
from dqo.demo.run import run_demo
from dqo.requirements import check_packages

PLACE = 2


def demo_command(arguments: list[str], prog: str = "dqo demo") -> None:
    """Compare base, continued SFT, RFT, DPO and DQO on a built-in task, from nothing to report.html."""
    config = parse_flags(DemoConfig, arguments, prog)
    check_packages()
    logging.getLogger("dqo").setLevel(logging.ERROR)  # samples of a small model repeat each other: nothing to warn of
    print(
        f"dqo: demonstration (seed {config.seed}) -> {config.output_dir}; `dqo-train --help` for your own data",
        flush=True,
    )
    print(f"report: {run_demo(config)}")
