"""The study of docs/evidence.md, piece by piece.

    OMP_NUM_THREADS=1 python -m benchmarks.evidence.study DIRECTORY [--minutes 30]

Makes base models and data, tries every method's settings, trains the seeds, and writes tables.md, results.json and plots to
DIRECTORY. What is there is kept, and what a killed run left goes on; a piece whose options have changed is made again. The same
command in a second terminal takes the pieces that the first is not at. --task, --method and --stage choose pieces, and what these
need is made too. --stage table makes nothing. --record writes tables, plots, and a line for each finished run to
benchmarks/results as well: another DIRECTORY, on another machine too, begins with these runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import pieces
from benchmarks.evidence.recorded import go_on, record
from benchmarks.evidence.study.markdown import markdown
from benchmarks.evidence.study.pieces import STAGES, STUDY, Piece, every_piece
from benchmarks.evidence.study.plots import draw_ablations, draw_tasks
from benchmarks.evidence.study.settings import BASE, METHODS
from benchmarks.evidence.study.sizes import TASKS
from benchmarks.evidence.study.tables import summarise
from benchmarks.evidence.study.training import make

RESULTS = Path(__file__).parents[2] / "results"


def wanted(tasks: Sequence[str], methods: Sequence[str], stages: Sequence[str]) -> list[Piece]:
    """The pieces that were chosen, in the order of docs/evidence.md, without what they need."""
    return [
        piece
        for piece in every_piece()
        if piece.stage in stages
        and piece.kind != "base"
        and piece.name in tasks
        and (not piece.method or piece.method in (BASE, *methods))
    ]


def write_tables(root: Path, command: str, record: bool) -> None:
    """With `record` to benchmarks/results too, unless there is no finished run to tell of."""
    summary = summarise(root, command)
    record = record and pieces.worth_recording(summary)
    for path in (root / "results.json", *([RESULTS / "study.json"] if record else [])):
        path.write_text(json.dumps(summary, indent=1) + "\n")
        if summary["rows"]:
            draw_tasks(summary["rows"], path.parent / "study.svg")
        if summary["ablations"]:
            draw_ablations(summary["ablations"], path.parent / "study-ablations.svg")
    text = markdown(summary)
    (root / "tables.md").write_text(text)
    print(text)


@pieces.command
def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)

    def names(of: Sequence[str]):
        def read(text: str) -> list[str]:
            found = text.split(",")
            if unknown := [name for name in found if name not in of]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(of)}")
            return found

        return read

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("--task", type=names(list(TASKS)), default=list(TASKS), help="such as a,b14")
    parser.add_argument("--method", type=names(list(METHODS)), default=list(METHODS), help="such as dqo,dpo")
    parser.add_argument("--stage", type=names([*STAGES, "table"]), default=list(STAGES[1:]), help="such as data,tune")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no piece after so many")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results too")
    asked = parser.parse_args(given)
    root = asked.directory.resolve()
    root.mkdir(parents=True, exist_ok=True)
    chosen = wanted(asked.task, asked.method, asked.stage)
    left = go_on(STUDY, every_piece(), chosen, root, asked.minutes, make, RESULTS)
    if asked.record:
        record(STUDY, every_piece(), root, RESULTS)
    write_tables(root, pieces.told("benchmarks.evidence.study", given, asked.directory), asked.record)
    if left:
        print(f"{left} pieces are left; the same command goes on with them")


if __name__ == "__main__":
    main()
