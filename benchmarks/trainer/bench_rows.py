"""Rows against time and memory: `dqo check` and ten steps of training on files of many rows, in processes that are watched.

    python -m benchmarks.trainer.bench_rows --rows 10000 200000 --processes 1 2
    python -m benchmarks.trainer.bench_rows --rows 10000 200000 --code OTHER_CHECKOUT --label before
    python -m benchmarks.trainer.bench_rows --rows 1000000 --tokens 500 --processes 1 2 --share_tables

Results join benchmarks/results/rows.json under their commit, and the table of docs/benchmarks.md is printed. Memory is the peak
of a process over samples of /proc: all of it ("resident", with the pages of mapped files, which the kernel takes back when it
needs them), and what no file backs ("own"). Of several processes it is that of the largest.

The model has two layers, and a token for each character. Its tokenizer is the demonstration's. That of rows of more than 256
tokens needs a third of the time: the tokenizers library is not what they measure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness.environment import commit, device_name, today
from dqo.files import write_whole

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "rows.json"
STEPS, BATCH = 10, 16
CHARACTERS = "0123456789+-*=\n#"


def write_model(directory: Path, tokens: int) -> None:
    """A new model that reads rows of so many tokens."""
    from tokenizers import Tokenizer

    from dqo.models import new

    tokenizer = new.character_tokenizer(CHARACTERS)
    if tokens > 256:
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        told["model"] = {"type": "BPE", "vocab": told["model"]["vocab"], "merges": [], "unk_token": new.PAD}
        tokenizer = new._fast(Tokenizer.from_str(json.dumps(told | {"pre_tokenizer": None})))
    model = new.new_llama(tokenizer, hidden_size=64, layers=2, heads=4, max_length=tokens + 64)
    new.save(model, tokenizer, directory)


def write_rows(path: Path, count: int, tokens: int) -> None:
    """Rows of the arith task's characters, four to a prompt, of about so many tokens of a tokenizer of characters."""
    rng = random.Random(0)
    equations = [f"{a}{sign}{b}={c}\n" for a in range(10) for sign in "+-*" for b in range(10) for c in range(10)]
    starts = [f"{a}{sign}" for a in range(10) for sign in "+-*"]
    with path.open("w") as file:
        for _ in range(count // 4):
            prompt = "".join(rng.choices(starts, k=9)) + f"{rng.randint(0, 9)}="
            for _ in range(4):
                text = "".join(rng.choices(equations, k=(tokens - len(prompt) - 3) // 6)) + f"#{rng.randint(0, 9)}"
                row = {"prompt": prompt, "completion": text, "reward": float(rng.random() < 0.5)}
                file.write(json.dumps(row) + "\n")


def _children(pid: int) -> list[int]:
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [inner for child in found for inner in _children(child)]


def _memory(pid: int) -> tuple[int, int]:
    """Bytes: resident, and those without a file."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        resident, own = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    except (OSError, KeyError, ValueError):  # it has ended
        return 0, 0
    return resident, own


def watched(command: list[str], code: Path) -> dict[str, float]:
    """Runs a command; seconds on the clock and of the CPU, and the peaks of memory in MB."""
    environment = {**os.environ, "PYTHONPATH": str(code)}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    resident = own = 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=code, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for pid in (process.pid, *_children(process.pid)):
                found = _memory(pid)
                resident, own = max(resident, found[0]), max(own, found[1])
            time.sleep(0.05)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said.read().decode()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {
        "seconds": time.monotonic() - begun,
        "cpu_seconds": cpu,
        "resident_mb": resident / 1e6,
        "own_mb": own / 1e6,
    }
    return {name: round(value, 1) for name, value in found.items()}


def commands(
    file: Path, model: Path, output: Path, processes: int, tables: Path | None, held_out: float
) -> dict[str, list[str]]:
    check = [sys.executable, "-m", "dqo", "check", str(file), "--model_name_or_path", str(model), "--rows", "0"]
    check += [] if tables is None else ["--row_cache_dir", str(tables)]
    options = {} if tables is None else {"row_cache_dir": tables}
    options |= {
        "dataset_name": file,
        "model_name_or_path": model,
        "output_dir": output,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "eval_fraction": held_out,
        "use_cpu": True,
    }
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    train = [sys.executable, *(launch if processes > 1 else []), "-m", "dqo.train"]
    train += [part for name, value in options.items() for part in (f"--{name}", str(value)) if value is not True]
    train += [f"--{name}" for name, value in options.items() if value is True]
    name = f"train, {processes} process{'es' * (processes > 1)}" + ", nothing held out" * (not held_out)
    return {name: train} | ({"check": check} if processes == 1 else {})


def measure(arguments: argparse.Namespace) -> list[dict]:
    code, found = Path(arguments.code).resolve(), []
    for count in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            file = Path(scratch) / "rollouts.jsonl"
            write_rows(file, count, arguments.tokens)
            model = Path(scratch) / "model"
            write_model(model, arguments.tokens)
            tables = Path(scratch) / "tables" if arguments.share_tables else None
            for processes in arguments.processes:
                output = Path(scratch) / f"out-{processes}"
                todo = commands(file, model, output, processes, tables, arguments.held_out)
                for name, command in todo.items():
                    if name.split(",")[0] in arguments.what:
                        row = {"label": arguments.label, "rows": count, "tokens": arguments.tokens, "what": name}
                        found.append(row | {"file_mb": round(file.stat().st_size / 1e6, 1)} | watched(command, code))
                        print(json.dumps(found[-1]), flush=True)
    return found


def table(entries: list[dict]) -> str:
    lines = [
        "| rows | tokens a row | what | code | CPU s | resident MB | own MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in sorted(entries, key=lambda e: (e["rows"], e["tokens"], e["what"], e["label"] != "before")):
        lines.append(
            f"| {e['rows']:,} | {e['tokens']} | {e['what']} | {e['label']} | {e['cpu_seconds']:,.0f} | "
            f"{e['resident_mb']:,.0f} | {e['own_mb']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 200_000])
    parser.add_argument("--tokens", type=int, default=190)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--what", nargs="+", default=["check", "train"], choices=["check", "train"])
    parser.add_argument(
        "--held_out",
        type=float,
        default=0.0005,
        help="of the prompts; 0, to see what a row takes: small files have none",
    )
    parser.add_argument("--share_tables", action="store_true", help="the first command writes the tables of all")
    parser.add_argument("--code", default=str(ROOT), help="the checkout that is measured")
    parser.add_argument("--commit", help="its commit, where it is another than this")
    parser.add_argument("--label", default="now", help="what the table calls it")
    parser.add_argument("--scratch", default=None, help="a directory with room for the files")
    arguments = parser.parse_args()
    import torch

    told = {"commit": arguments.commit or commit(), "device": device_name(torch.device("cpu")), "date": today()}
    entries = [told | row for row in measure(arguments)]
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    same = {(e["label"], e["rows"], e["tokens"], e["what"]) for e in entries}
    entries += [e for e in before if (e["label"], e["rows"], e["tokens"], e["what"]) not in same]
    write_whole(RESULTS, (json.dumps(entries, indent=1) + "\n").encode())
    print(table(entries))


if __name__ == "__main__":
    main()
