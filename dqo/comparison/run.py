"""A comparison: everything is checked, then each run is a `dqo train` in a process and a directory of its own.

So each can be repeated alone, none leaves memory to the next, and one that was killed goes on by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dqo import signals
from dqo.comparison.plan import PlannedRun, flags_of, plan
from dqo.config.launcher import obey
from dqo.config.options import Options, command_line
from dqo.errors import UserError
from dqo.evaluation.tasks import check_tasks, read_tasks
from dqo.files import write_whole, writing
from dqo.train.inputs import Given, check_options, load_rows

PLAN_FILE, LOCK_FILE = "compare.json", "compare.lock"


def dry_run(firsts: list[Options]) -> None:
    """Everything that a method can refuse before its model is loaded: options, rows, tasks, and what it makes of the responses.

    Raises:
        UserError: that names every method that cannot be trained.
    """
    from dqo.data.behavior import reference_samples
    from dqo.data.selection import nothing_selected, selected
    from dqo.models.limits import check_tokenizer  # torch from here on
    from dqo.models.named import load_config, load_tokenizer, stop_ids
    from dqo.train.prepare import on_tokens
    from dqo.train.weighting import reference_name

    refused = []
    for options in map(obey, firsts):
        config = options.train
        try:
            check_options(options)
            tasks = read_tasks(config.eval_tasks, config.verifier)
            rows, _ = load_rows(options)
            tokenizer, model_config = load_tokenizer(config.model_path), load_config(config.model_path)
            check_tokenizer(tokenizer, rows, model_config)
            vocab_size = model_config.get_text_config().vocab_size
            episodes = on_tokens(rows, options, tokenizer, vocab_size, stop_ids(config.model_path), None)
            samples = partial(reference_samples, rows, reference_name(options, Given()))
            if not selected(options.objective, episodes, samples):
                raise UserError(nothing_selected(options.objective, episodes))
            if tasks:
                check_tasks(options, None, None, tasks)
        except UserError as error:
            refused.append(f"method {config.method}: {error}")
    if refused:
        raise UserError("\n".join([*refused, "Nothing was trained."]))


def check_place(output_dir: Path) -> None:
    """Refuses a directory of something else than a comparison; nothing is written there."""
    if (output_dir / PLAN_FILE).exists() or not output_dir.exists():
        return
    if not output_dir.is_dir() or set(os.listdir(output_dir)) - {LOCK_FILE}:
        raise UserError(f"output_dir {output_dir} is in use; choose another with --output_dir")


def _planned_before(path: Path) -> dict[str, list[str]]:
    """The arguments of the runs that compare.json holds."""
    try:
        runs = json.loads(path.read_bytes())["runs"]
        for words in runs.values():
            flags_of(words)
        return runs
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # a UserError too, of words that are no flags
        raise UserError(f"{path} is damaged; choose another --output_dir, or delete {path.parent}") from error


def claim(output_dir: Path, runs: list[PlannedRun]) -> None:
    """Takes an empty directory, or that of a comparison whose runs have the same options; others may join them.

    Raises:
        UserError: for a directory of something else, or of runs with other options.
    """
    path = output_dir / PLAN_FILE
    wanted = {run.directory.name: run.arguments for run in runs}
    before: dict[str, list[str]] = {}
    if path.exists():
        before = _planned_before(path)
        for name in wanted.keys() & before.keys():
            if (changed := _difference(before[name], wanted[name])) is not None:
                raise UserError(
                    f"{output_dir / name} was planned with other options: {changed}. Choose another --output_dir"
                )
    check_place(output_dir)
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({"runs": before | wanted}, indent=1) + "\n").encode())


def _difference(then: list[str], now: list[str]) -> str | None:
    old, new = ({flag.name: " ".join(flag.words) for flag in flags_of(words)} for words in (then, now))
    changed = [
        f"{old.get(n, 'nothing')} then, {new.get(n, 'nothing')} now" for n in old | new if old.get(n) != new.get(n)
    ]
    return "; ".join(changed) or None


@contextlib.contextmanager
def alone(output_dir: Path) -> Iterator[int]:
    """Keeps a second comparison out, also while a run of this one ends after a kill; gives the lock to hand to the runs."""
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"another comparison, or a run that it left behind, is at work in {output_dir}; wait for its end"
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_finished(directory: Path) -> bool:
    """Whether a run is trained, evaluated and reported."""
    try:
        return (
            bool(json.loads((directory / "run.json").read_bytes())["finished"]) and (directory / "report.html").exists()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def train_one(run: PlannedRun, lock: int) -> None:
    """One run in a process of its own. A signal to this process is handed on once, and raised when the run has ended."""
    command = [sys.executable, "-m", "dqo", "train", *run.arguments]
    with signals.waiting():
        process = subprocess.Popen(command, pass_fds=(lock,), start_new_session=True, preexec_fn=_end_with_the_parent())
        handed_on = False
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
            if signals.noted() and not handed_on and process.poll() is None:
                process.send_signal(signals.noted())
                handed_on = True
    if process.returncode:
        raise UserError(
            f"{run.directory}: the run ended with status {process.returncode}, see above; when the cause is mended, the same "
            "command goes on there"
        )


def _end_with_the_parent() -> Callable[[], Any] | None:
    """On Linux: what makes a run stop, with a checkpoint, when this process is killed."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    set_parent_death_signal = 1
    return lambda: libc.prctl(set_parent_death_signal, signal.SIGTERM)


def compare(
    methods: Sequence[str],
    *,
    seeds: int = 3,
    output_dir: str | Path = "comparison",
    options: Sequence[str] = (),
    stop_before_training: bool = False,
) -> Path | None:
    """Trains and evaluates several methods on one file with one budget, and writes the page over all runs.

    Args:
        methods: their names. seeds: runs of each method, with the seeds seed, seed + 1 ...
        output_dir: of the comparison; a directory METHOD-seedN for each run, report.html over all. Finished runs are kept.
        options: those of `dqo train` as on the command line, ["--max_steps", "100", "--dpo.beta", "0.7", ...]; METHOD.OPTION is
            of one method alone.
        stop_before_training: check everything, print the plan, and return None.

    Returns:
        The path of the page.

    Raises:
        UserError: before anything is trained, for what any of the methods refuses; and for a run that fails.
    """
    if not methods or seeds < 1:
        raise UserError("give one method or more, and one seed or more: --methods dqo,dpo --seeds 3")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "dqo compare runs in one process; train each method under the launcher, and `dqo report` the runs"
        )
    directory = Path(output_dir)
    runs, firsts = plan(methods, seeds, directory, flags_of(options))
    dry_run(firsts)
    print(_described(firsts, seeds), flush=True)
    if stop_before_training:
        print("# nothing was trained or written")
        return None
    check_place(directory)
    with alone(directory) as lock:
        claim(directory, runs)
        for number, run in enumerate(runs, 1):
            done = is_finished(run.directory)
            what = f"{run.directory} is finished" if done else shlex.join(["dqo", "train", *run.arguments])
            print(f"[{number}/{len(runs)}] {what}", flush=True)
            if not done:
                train_one(run, lock)
        return _page(directory, runs)


def _page(directory: Path, runs: list[PlannedRun]) -> Path:
    from dqo.report.build import report_of
    from dqo.report.page import console_table, write_report
    from dqo.report.runs import read_run

    report = report_of([read_run(run.directory) for run in runs])
    report["command"] = f"{command_line()}\n\n{report['command']}"
    path = write_report(directory, report)
    if report["methods"]:
        print(console_table(report["methods"], report["baseline"]))
    print(f"report: {path}")
    return path


def _described(firsts: list[Options], seeds: int) -> str:
    lines = []
    for options in firsts:
        config = options.train
        warmup = int(config.value_warmup_steps) if options.trains_values else 0
        updates = config.max_steps - warmup
        size = options.objective.group_size
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        units = {1: "responses", None: "prompts with all their responses"}
        unit = units.get(size, f"groups of {size} responses")
        before = f" after {warmup:,} of the value model alone" if warmup else ""
        lines.append(
            f"{config.method}: {seeds} seeds, {updates:,} updates of the policy{before}, {batch:,} {unit} each"
        )
    return "\n".join(lines)
