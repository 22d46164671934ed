"""The other processes of a launch: where they run, and which of them are gone when the processes lose each other.

Each process keeps a socket open that nobody serves: the kernel takes connections to it as long as the process lives. So whoever
finds a collective broken can ask which process was lost, without a thread or a heartbeat. torch is not imported here.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from dqo.errors import UserError

CONNECT_SECONDS = 5.0  # a machine without power does not answer at all
STAY_SECONDS = 5.0  # who noticed a loss stays so long, so that others do not take him for lost
BESIDE_SECONDS = 10.0  # processes beside the first of a machine speak so much later, and are mostly ended before

# How gloo, nccl and the store of torch say that another process is not there any more.
_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket Timeout"),
    *("Timed out waiting", "timed out", "remote process exited", "NCCL communicator was aborted", "failed to recv"),
)


class Peer(NamedTuple):
    host: str
    address: str
    port: int


_listener: socket.socket | None = None
_peers: list[Peer] = []  # in the order of their ranks
_rank = 0
_has_lost = False  # since a UserError told of it
Function = TypeVar("Function", bound=Callable)


def several_machines(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launch has processes on other machines."""
    return environment.get("WORLD_SIZE", "1") != environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1"))


def listen() -> Peer:
    """Where other processes can ask whether this one lives. The address is the one by which it reaches the first machine."""
    global _listener
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, _, _, _, place = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect(place)
        address = way.getsockname()[0]
    _listener = _listener or socket.create_server(("", 0), family=family)
    return Peer(socket.gethostname(), address, _listener.getsockname()[1])


def know(peers: list[Peer], rank: int) -> None:
    """The processes of this launch, in the order of their ranks; this one is number `rank`."""
    global _peers, _rank
    if not _peers:
        atexit.register(_end)
    _peers, _rank = peers, rank


def called(rank: int) -> str:
    """ "process 3 on node7 (10.0.0.7)"."""
    return f"process {rank} on {_peers[rank].host} ({_peers[rank].address})" if _peers else f"process {rank}"


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a collective of several processes broke."""
    return bool(_peers) and isinstance(error, RuntimeError) and any(mark in str(error) for mark in _LOST)


def lost() -> list[int]:
    """The ranks of the processes that do not live any more, or that cannot be reached."""

    def gone(rank: int) -> bool:
        try:
            socket.create_connection(_peers[rank][1:], CONNECT_SECONDS).close()
        except OSError:
            return True
        return False

    others = [rank for rank in range(len(_peers)) if rank != _rank]
    with ThreadPoolExecutor(len(others)) as pool:
        return [rank for rank, is_gone in zip(others, pool.map(gone, others)) if is_gone]


def loss(error: BaseException) -> str:
    """One line on what was lost, where `is_lost(error)`."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(BESIDE_SECONDS)
    found = lost()
    if not found:
        said = " ".join(str(error).split("] ", 1)[-1].split())[:120]
        what = f"the connection between the {len(_peers)} processes broke ({said})"
    else:
        where = [called(rank) for rank in found[:4]] + [f"{len(found) - 4} more"] * (len(found) > 4)
        what = f"lost {', '.join(where)}, of {len(_peers)} processes"
    return f"{what}; see what it said last there. The same command goes on from what is whole"


def told(function: Function) -> Function:
    """`function`, for a Python program: where another process is lost it raises a UserError with one line in the place of the
    collective's error. When the program then ends, as it does where it does not catch that, it ends with status 2 and at once."""

    @functools.wraps(function)
    def telling(*arguments: Any, **options: Any) -> Any:
        global _has_lost
        try:
            return function(*arguments, **options)
        except RuntimeError as error:
            if not is_lost(error):
                raise
            line = loss(error)
        _has_lost = True
        raise UserError(line)

    return telling  # type: ignore[return-value]  # of the same arguments


def told_by_methods(of: type) -> type:
    """A class whose own methods are all `told`."""
    for name, value in list(vars(of).items()):
        if callable(value) and not name.startswith("__"):
            setattr(of, name, told(value))
    return of


def _end() -> None:
    if _has_lost:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(STAY_SECONDS)
        os._exit(2)  # an ordinary exit would wait for the lost one
