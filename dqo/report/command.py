"""`dqo report`: a page of runs from what their directories hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dqo.config.options import command_line
from dqo.errors import UserError
from dqo.files import write_whole, writing
from dqo.report.build import report_of
from dqo.report.page import rendered
from dqo.report.runs import read_run


def report(
    runs: Sequence[str | Path],
    output_file: str | Path = "report.html",
    *,
    overwrite: bool = False,
    title: str | None = None,
) -> Path:
    """Writes one self-contained page of one run or several, and returns its path.

    Args:
        runs: the output_dir of each run, of one or of several methods; those that are not finished are shown as far as they are.
        output_file: the page. overwrite: whether one that exists is replaced. title: the page's; None: methods and data.

    Raises:
        UserError: for a directory that holds no run, a damaged file (with its line), or a page that exists or cannot be written.
    """
    path = Path(output_file)
    if not runs:
        raise UserError("no run to report; give one output_dir or more: dqo report out")
    if path.is_dir():
        raise UserError(f"output_file {path} is a directory; name the page, such as {path / 'report.html'}")
    if path.exists() and not overwrite:
        raise UserError(f"output_file {path} exists; choose another, or replace it with --overwrite")
    found = report_of([read_run(run) for run in runs])
    found["command"] += f"\n{command_line()}"
    if title is not None:
        found["title"] = title
    page = rendered(found)["report.html"]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())
    return path
