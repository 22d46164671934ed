"""Commands: `dqo-train` trains (or, without options, demonstrates); `dqo <command>` does everything.

torch is imported only by what needs it, so that help and wrong options answer at once.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dqo import signals
from dqo.errors import UserError, did_you_mean, printable

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


def train_main() -> None:
    """Entry point of `dqo-train`."""
    _run(lambda: train_command(sys.argv[1:], "dqo-train"))


def main() -> None:
    """Entry point of `dqo`."""
    _run(lambda: dqo_command(sys.argv[1:]))


class _Formatter(logging.Formatter):
    """Warnings may quote data."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _run(command: Callable[[], None]) -> None:
    signals.install()
    level = logging.WARNING if FIRST_PROCESS else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level)
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
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


def train_command(arguments: list[str], prog: str = "dqo train") -> None:
    """Train on your rollouts; without any option of training, the built-in demonstration."""
    from dqo.demo.run import DemoConfig

    flags = {a[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for a in arguments if a.startswith("--")}
    if "-h" not in arguments and flags <= {f.name for f in dataclasses.fields(DemoConfig)}:
        return demo_command(arguments, prog)
    from dqo.config.launcher import obey
    from dqo.config.options import dump_options, load_options
    from dqo.train.inputs import check_options, load_rows, read_tasks

    options = obey(load_options(arguments, prog))

    check_options(options)
    tasks = read_tasks(options.train.eval_tasks, options.train.verifier)
    rows = load_rows(options)
    if options.train.dry_run:
        train_rows, held_out = rows
        print(dump_options(options), end="")
        print(f"# {len(train_rows):,} rows to train on, {len(held_out):,} held out; nothing was loaded or written")
        return None
    if FIRST_PROCESS:
        print(
            f"dqo-train: {options.train.method} on {options.train.dataset_name} -> {options.train.output_dir}",
            flush=True,
        )
    from dqo.report.run import check_tasks, finish  # torch from here on
    from dqo.train.loop import train

    if tasks:
        check_tasks(options, None, None, tasks)
    run = train(options, rows=rows)
    processes = run.prepared.processes
    processes.leave()
    if processes.main:
        print(finish(options, run, tasks))
    processes.end()


def demo_command(arguments: list[str], prog: str = "dqo demo") -> None:
    """Compare base, continued SFT, RFT, DPO and DQO on a built-in task, from nothing to report.html."""
    from dqo.config.options import parse_flags
    from dqo.demo.run import DemoConfig, run_demo
    from dqo.requirements import check_packages

    config = parse_flags(DemoConfig, arguments, prog)
    check_packages()
    logging.getLogger("dqo").setLevel(logging.ERROR)  # samples of a small model repeat each other: nothing to warn of
    print(
        f"dqo: demonstration (seed {config.seed}) -> {config.output_dir}; `dqo-train --help` for your own data",
        flush=True,
    )
    print(f"report: {run_demo(config)}")


def convert_command(arguments: list[str]) -> None:
    """Turn a public data format into a rollout file."""
    from dqo.commands.options import ConvertConfig
    from dqo.config.options import parse_flags
    from dqo.convert.entry import convert

    config = parse_flags(ConvertConfig, arguments, "dqo convert")
    for name, value in convert(**dataclasses.asdict(config)).items():
        several = isinstance(value, dict)
        shown = ", ".join(f"{key} {share:.4g}" for key, share in value.items()) if several else _short(value)
        print(f"{name:>32}  {shown}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_command(arguments: list[str]) -> None:
    """Check rollout files and show what training will see of them."""
    from dqo.commands.check import CheckConfig, check
    from dqo.config.options import parse_flags

    check(parse_flags(CheckConfig, arguments, "dqo check"))


def init_command(arguments: list[str]) -> None:
    """Make a small random model with a tokenizer trained on a rollout file."""
    from dqo.commands.options import InitConfig
    from dqo.config.options import parse_flags

    config = parse_flags(InitConfig, arguments, "dqo init")
    from dqo.data.chat import completion_text
    from dqo.data.rows import read_rows

    rows = read_rows(config.dataset_name)
    from dqo.models import new as new_model  # torch from here on

    texts = list({row.prompt: None for row in rows if isinstance(row.prompt, str)}) + [completion_text(r) for r in rows]
    tokenizer = new_model.bpe_tokenizer(texts, config.vocab_size)
    size = {"hidden_size": config.hidden_size, "layers": config.layers, "heads": config.heads}
    model = new_model.new_llama(tokenizer, **size, max_length=config.max_length, seed=config.seed)
    new_model.save(model, tokenizer, Path(config.output_dir))
    print(f"{config.output_dir}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")


COMMANDS = {
    "train": train_command,
    "demo": demo_command,
    "convert": convert_command,
    "check": check_command,
    "init": init_command,
}


def dqo_command(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: dqo <command> [options]; `dqo <command> --help` for its options\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10}{command.__doc__}")
        return
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; commands are {', '.join(COMMANDS)}.{did_you_mean(name, COMMANDS)}")
    COMMANDS[name](arguments[1:])
