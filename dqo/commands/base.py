"""What every command stands on: the table of commands, and running one so that an error is one line.

    exit code 0    the command did what was asked
              1    nobody reads its output any more (`| head`), or a fault of this program, with its traceback
              2    the user's input does not fit, or the machine (a full disk, no permission): one line, "error: ..."

A command NAME is a module of this folder with a function `NAME_command(arguments, prog)`, whose docstring is its line of
`dqo --help`, and a number PLACE, by which that list is sorted. torch is imported only by what needs it, after the options are
checked, so that help and wrong options answer at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Callable

from dqo import peers, signals
from dqo.environment import version_line
from dqo.errors import UserError, did_you_mean, is_out_of_memory, printable
from dqo.modules import modules_in

# What a machine does to any command, and no traceback explains.
_ENVIRONMENT = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOSPC,
    errno.EPERM,
}
_ENVIRONMENT |= {errno.EROFS, errno.ESTALE}
FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # of those that a launcher starts: it speaks for all


def main() -> None:
    """Entry point of `dqo`."""
    run(lambda: dqo_command(sys.argv[1:]))


def dqo_command(arguments: list[str]) -> None:
    """`dqo NAME ...`, or the list of commands."""
    table = commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: dqo <command> [options]; `dqo <command> --help` for its options\n")
        for name, command in table.items():
            print(f"  {name:<10}{command.__doc__}")
        return
    name = arguments[0]
    if name == "--version":
        print(version_line())
        return
    if name not in table:
        raise UserError(f"unknown command {name!r}; commands are {', '.join(table)}.{did_you_mean(name, table)}")
    table[name](arguments[1:], f"dqo {name}")


def commands() -> dict[str, Callable[[list[str], str], None]]:
    """{name: function of the arguments and of the name that help gives the program}, in the order of `dqo --help`."""
    found = []
    for module in modules_in("dqo.commands"):
        name = module.__name__.rpartition(".")[2]
        if command := getattr(module, f"{name}_command", None):
            found.append((module.PLACE, name, command))
    return {name: command for _, name, command in sorted(found)}


def run(command: Callable[[], None]) -> None:
    """Runs a command as a program: signals, warnings and errors as lines on stderr, exit codes."""
    signals.install()
    level = logging.WARNING if FIRST_PROCESS else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level)
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if peers.several_machines():
            from dqo.processes import tell

            tell(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit):
        if signals.noted():
            signals.leave()
        raise
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # where no smaller batch helps: while models are loaded, say
        if peers.is_lost(error):
            print(f"error: {peers.loss(error)}", file=sys.stderr, flush=True)
            time.sleep(peers.STAY_SECONDS)
            os._exit(2)  # an ordinary exit would wait for the lost one
        if not is_out_of_memory(error):
            raise
        what = " ".join(str(error).split())[:200] or type(error).__name__
        print(
            f"error: out of memory: {printable(what)}. A smaller model, --use_peft or --bf16 needs less",
            file=sys.stderr,
        )
        sys.exit(2)


class _Formatter(logging.Formatter):
    """Warnings may quote data."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
