"""Processes that begin with dqo and torch imported, so that a test can afford to kill many of them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from dqo.requirements import check_packages

check_packages()  # for all forks at once
os.fsync = os.fstat  # see tests/conftest.py
_CONTEXT = multiprocessing.get_context("forkserver")  # a process that imports once, runs no kernel, and forks
_CONTEXT.set_forkserver_preload(
    ["dqo.train", "scipy.stats", "transformers.models.llama.modeling_llama", "tests.dqo.helpers", "tests.dqo.forked"]
)
KILLED_HERE = 77  # exit status of a process that ended itself at a chosen place, as abruptly as SIGKILL does


def start(target: Callable, *arguments) -> multiprocessing.Process:
    process = _CONTEXT.Process(target=_alone, args=(target, *arguments))
    process.start()
    return process


def _alone(target: Callable, *arguments) -> None:
    """On one thread and quiet; torch's threads are not made before the fork, and kernels round alike in every process."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    target(*arguments)


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
