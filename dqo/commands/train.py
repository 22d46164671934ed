"""`dqo train`, which is `dqo-train` too."""

from __future__ import annotations

import dataclasses
import sys

from dqo.commands.base import FIRST_PROCESS, run
from dqo.commands.demo import demo_command
from dqo.config.launcher import obey
from dqo.config.options import dump_options, load_options
from dqo.data.overlap import check_unseen, trained_problems
from dqo.demo.recipe import DemoConfig
from dqo.evaluation.tasks import check_tasks, read_tasks
from dqo.train.inputs import check_options, load_rows
from dqo.train.resume import as_stored

PLACE = 1


def main() -> None:
    """Entry point of `dqo-train`."""
    run(lambda: train_command(sys.argv[1:], "dqo-train"))


def train_command(arguments: list[str], prog: str = "dqo train") -> None:
    """Train on your rollouts; without any option of training, the built-in demonstration."""
    flags = {a[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for a in arguments if a.startswith("--")}
    if "-h" not in arguments and flags <= {f.name for f in dataclasses.fields(DemoConfig)}:
        return demo_command(arguments, prog)
    options = as_stored(obey(load_options(arguments, prog)))
    check_options(options)
    tasks = read_tasks(options.train.eval_tasks, options.train.verifier)
    rows = load_rows(options)
    if tasks:
        data = str(options.train.dataset_name)
        check_unseen(tasks, trained_problems(rows[0]), str(options.train.eval_tasks), data)
    if options.train.dry_run:
        train_rows, held_out = rows
        print(dump_options(options), end="")
        print(f"# {len(train_rows):,} rows to train on, {len(held_out):,} held out; nothing was loaded or written.")
        print(f"# Which of the rows {options.train.method} selects is known when they are on tokens")
        return None
    if FIRST_PROCESS:
        print(
            f"dqo-train: {options.train.method} on {options.train.dataset_name} -> {options.train.output_dir}",
            flush=True,
        )
    from dqo.evaluation.during import answering  # torch from here on
    from dqo.evaluation.run import answers_of
    from dqo.report.run import report_run
    from dqo.train.run import train

    if tasks:
        check_tasks(options, None, None, tasks)
    run = train(options, rows=rows, answers=answering(options, tasks))
    processes = run.prepared.processes
    processes.leave()
    if processes.main:
        print(report_run(options, run, answers_of(options, run, tasks)))
    processes.end()
