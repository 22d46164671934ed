"""`dqo report`: one page of one run or several."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from dqo.config.flags import parse_flags

PLACE = 9


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained page of one run or several: what they gained, their curves, samples, data and commands."""

    runs: Positional[tuple[str, ...]]
    """The output_dir of each run."""
    output_file: str = "report.html"
    """The page is written to this file."""
    overwrite: bool = False
    """A page that exists is replaced."""
    title: str | None = None
    """The page has this title. None takes methods and data."""

    def problems(self) -> list[tuple[str, str]]:
        return []


def report_command(arguments: list[str], prog: str = "dqo report") -> None:
    """Write one page of one run or several, side by side."""
    config = parse_flags(ReportConfig, arguments, prog)
    from dqo.report.command import report  # torch from here on

    print(f"report: {report(config.runs, config.output_file, overwrite=config.overwrite, title=config.title)}")
