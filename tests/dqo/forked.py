"""Processes that begin with dqo and torch imported, so that a test can afford to kill many of them.

A test that starts Python by itself pays the imports, which take longer than a tiny run: it is about the start, and one is enough.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from dqo import signals
from dqo.requirements import check_packages
from tests import figures

check_packages()  # for all forks at once
os.fsync = os.fstat  # see tests/conftest.py
_CONTEXT = multiprocessing.get_context("forkserver")  # a process that imports once, runs no kernel, and forks
# dqo.commands are not among them: they ask which process of a launch they are when they are imported.
_CONTEXT.set_forkserver_preload(
    [
        *("dqo.train", "dqo.evaluation.during", "dqo.evaluation.run", "dqo.report.run", "scipy.stats", "pytest"),
        *("transformers.models.llama.modeling_llama", "tests.dqo.helpers", "tests.dqo.forked", "tests.dqo.warmed"),
    ]
)
KILLED_HERE = 77  # exit status of a process that ended itself at a chosen place, as abruptly as SIGKILL does
DQO, DQO_WITH_FORKS = "dqo.commands.base:main", "tests.dqo.forked:main_with_forks"


def start(target: Callable, *arguments) -> multiprocessing.Process:
    process = _CONTEXT.Process(target=_alone, args=(target, *arguments))
    process.start()
    return process


def ended(process: multiprocessing.Process) -> int:
    """Its exit status. On a busy machine what takes a second may take minutes; what hangs is killed, and has the status -9."""
    process.join(600)
    process.kill()
    process.join()
    return process.exitcode


def _alone(target: Callable, *arguments) -> None:
    """On one thread and quiet; torch's threads are not made before the fork, and kernels round alike in every process."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    figures.render(wanted=False)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    target(*arguments)


def run_in_place(
    entry: str, words: Sequence, said: Sequence, place: Path, environment: Mapping, path: Sequence
) -> None:
    """In a fork: the function `entry` ("module:function") as a script with the arguments `words`, its outputs in two files."""
    for descriptor, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.environ.update(environment)
    os.chdir(place)
    sys.path[:0] = map(str, path)
    module, _, name = entry.partition(":")
    sys.argv = ["dqo", *map(str, words)]
    getattr(importlib.import_module(module), name)()


def run(*words, entry: str = DQO, place=".", environment=None, path=()) -> subprocess.CompletedProcess:
    """`python -m dqo WORDS` in the directory `place`, with more environment variables and more on Python's path."""
    return _wait(entry, words, place, path, [environment or {}])[0]


def ranks(processes: int) -> list[dict[str, str]]:
    """The variables that each process of a launch finds."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [shared | {"OMP_NUM_THREADS": 1, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{name: str(value) for name, value in variables.items()} for variables in each]


def launch(*words, entry: str, processes: int = 2, place=".", environment=None, path=()) -> list:
    """As `run`, in processes that find the variables of a launch; like torchrun it ends all when one fails."""
    return _wait(entry, words, place, path, [variables | (environment or {}) for variables in ranks(processes)])


def _wait(entry, words, place, path, environments) -> list[subprocess.CompletedProcess]:
    with tempfile.TemporaryDirectory() as folder:
        said = [[f"{folder}/{rank}.out", f"{folder}/{rank}.err"] for rank in range(len(environments))]
        each = zip(said, environments)
        running = [start(run_in_place, entry, words, files, place, environment, path) for files, environment in each]
        waiting = {process.sentinel: process for process in running}
        while waiting:
            ended = connection.wait(waiting, timeout=600)
            for sentinel in ended:
                waiting.pop(sentinel).join()
            if not ended or any(process.exitcode for process in running):
                for process in waiting.values():
                    process.terminate()
                    process.join(30)
                    process.kill()
        texts = [[Path(file).read_text() for file in files] for files in said]
        return [subprocess.CompletedProcess(words, p.exitcode, *text) for p, text in zip(running, texts)]


SCRIPT = """#!/bin/bash
here=$(mktemp -d -p "{folder}")
printf '%s\\n' "$PWD" "$@" > "$here/words"
mkfifo "$here/status"
echo "$here" > "{folder}/calls"
read -r status < "$here/status"
cat "$here/out"
cat "$here/err" >&2
exit "$status"
"""


@contextlib.contextmanager
def python_for_scripts(folder: Path) -> Iterator[Path]:
    """A directory for the PATH of a shell script: in it `python -m dqo WORDS` is a fork, so that a script of ten is quick."""
    calls = folder / "calls"
    os.mkfifo(calls)
    (folder / "python").write_text(SCRIPT.format(folder=folder))
    (folder / "python").chmod(0o755)

    def answer() -> None:
        with open(os.open(calls, os.O_RDWR)) as file:  # for writing too: it has no end between two calls
            while here := file.readline().strip():
                place, *words = Path(here, "words").read_text().splitlines()
                done = run(*words[2:], place=place) if words[:2] == ["-m", "dqo"] else None
                Path(here, "out").write_text(done.stdout if done else "")
                Path(here, "err").write_text(done.stderr if done else f"not python -m dqo: {words}")
                Path(here, "status").write_text(f"{done.returncode if done else 1}\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield folder
    finally:
        calls.write_text("\n")
        thread.join()


class Popen(subprocess.Popen):
    """For a command in a fork that starts `python -m dqo WORDS` itself: as subprocess.Popen, but a fork of this process."""

    def __init__(self, command: Sequence[str], *, start_new_session: bool, **options):
        assert command[:3] == [sys.executable, "-m", "dqo"]
        self.new_session = start_new_session
        super().__init__(command, **options)

    def _execute_child(self, command, executable, preexec_fn, close_fds, pass_fds, *_) -> None:
        sys.stdout.flush()
        self.pid, self._child_created = os.fork(), True
        if self.pid:
            return
        status = 1
        try:
            for number in signals.SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signals._noted, signals._moment = 0, signals._END  # as the module is when it is imported
            if self.new_session:
                os.setsid()
            if preexec_fn:
                preexec_fn()
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor not in pass_fds and os.path.exists(f"/proc/self/fd/{descriptor}"):
                    os.close(descriptor)
            sys.argv = ["dqo", *command[3:]]
            from dqo.commands.base import main

            main()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def main_with_forks() -> None:
    """`dqo ...`, of which `dqo compare` forks its runs."""
    from dqo.commands.base import main
    from dqo.comparison import run as comparison

    comparison.subprocess = SimpleNamespace(Popen=Popen, TimeoutExpired=subprocess.TimeoutExpired)
    main()


def die() -> None:
    """Ends this process without flushing or cleaning anything."""
    os._exit(KILLED_HERE)


def train_with(options: list[str], place: Callable[[Path], None] | None = None) -> None:
    """`dqo train` with `options`; `place(output_dir)` arranges the end of the process at some moment."""
    from dqo.config.options import load_options
    from dqo.reference import columns as reference
    from dqo.train.run import train

    reference.FLUSH_TOKENS = 1  # a segment a batch, so that there are moments between them
    loaded = load_options(options)
    if place is not None:
        place(Path(loaded.train.output_dir))
    train(loaded)
