"""What makes each piece: the product's own commands, from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.pieces import attempted, made
from benchmarks.evidence.real_model.plan import (
    BASE,
    CONTINUED_TO,
    MEASURED,
    METHODS,
    SIZES,
    Piece,
    model_of,
    options_for,
    result_of,
    spec_of,
)
from benchmarks.evidence.real_model.problems import split
from benchmarks.evidence.study.settings import ROWS
from benchmarks.evidence.study.training import train_once
from dqo.data.rows import Row, read_rows

EXAMPLE = Path(__file__).parents[3] / "examples" / "real_model.py"
VERIFIER = "number"
PROBLEMS, TEST, SAMPLES = "problems.jsonl", "test.jsonl", "samples.jsonl"


def make(piece: Piece, root: Path, given: Path | None = None) -> dict[str, Any]:
    """Makes a piece of which everything that it needs is there, and returns its result. One that was killed goes on. `given`:
    the directory of another model."""
    place = root / piece.place

    def work() -> dict[str, Any]:
        if piece.kind == "model":
            return make_model(place, given)
        if piece.kind == "data":
            return make_data(place, piece.seed, model_of(root))
        return measure(piece, root) if piece.kind == "measured" else run(piece, root)

    return made(place, spec_of(piece, root), work)


def precision() -> str:
    """bfloat16 where the machine multiplies it fast, else float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


def make_model(place: Path, given: Path | None) -> dict[str, Any]:
    from dqo.models.identity import model_identity
    from dqo.models.named import load_config

    path = given or place / "checkpoint"
    if given is None:
        subprocess.run([sys.executable, str(EXAMPLE), "model", str(path)], check=True)
    return {"path": str(path), "hash": model_identity(str(path), load_config(str(path))), "dtype": precision()}


def generation(model: dict[str, Any], seed: int) -> dict[str, Any]:
    """Options that all commands share which generate."""
    options = {"dtype": model["dtype"], "seed": seed, "batch_size": SIZES.generated_together}
    return options | {"temperature": SIZES.temperature, "max_completion_length": SIZES.max_new_tokens}


def make_data(place: Path, seed: int, model: dict[str, Any]) -> dict[str, Any]:
    """Problems for training and test, and graded samples of the model."""
    from dqo.api import sample, score

    for name, problems in zip((PROBLEMS, TEST), split(seed, SIZES.train_problems, SIZES.test_problems)):
        (place / name).write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    sample(
        model_name_or_path=model["path"],
        prompts=str(place / PROBLEMS),
        output_file=str(place / SAMPLES),
        num_generations=SIZES.samples,
        quiet=True,
        **generation(model, seed),
    )
    score(data=str(place / SAMPLES), verifier=VERIFIER, output_file=str(place / ROWS), processes=1)
    return described(read_rows(str(place / ROWS)))


def described(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and shares of a file of graded responses; "right" by kind of problem too."""
    ids = [(row.prompt_ids or [], row.completion_ids or []) for row in rows]
    by_kind: dict[str, list[bool]] = {}
    for row in rows:
        by_kind.setdefault(str(row.prompt_id).partition(":")[0], []).append(bool(row.label))
    return {
        "rows": len(rows),
        "tokens": sum(len(prompt) + len(completion) for prompt, completion in ids),
        "response_tokens": sum(len(completion) for _, completion in ids),
        "right": sum(bool(row.label) for row in rows) / len(rows),
        "ended": sum(row.finish_reason == "stop" for row in rows) / len(rows),
        "right_by_kind": {kind: sum(found) / len(found) for kind, found in sorted(by_kind.items())},
    }


def measure(piece: Piece, root: Path) -> dict[str, Any]:
    """Pass rates of the prefixes, beside the samples: the reference's log-probabilities are those of the same responses."""
    from dqo.scoring.run import score

    data = root / Piece("data", piece.seed).place
    model = model_of(root)
    score(
        data=str(data / SAMPLES),
        verifier=VERIFIER,
        output_file=str(data / MEASURED),
        steps="sentences",
        processes=1,
        prefix_values=SIZES.continuations,
        model_name_or_path=model["path"],
        **generation(model, piece.seed) | {"max_completion_length": CONTINUED_TO},
    )
    rows = read_rows(str(data / MEASURED))
    values = [value for row in rows for value in row.step_rewards or ()]
    return {"steps": len(values), "mean": sum(values) / max(1, len(values))}


def run(piece: Piece, root: Path) -> dict[str, Any]:
    """Trains and evaluates: greedy (P,) and sampling (P, k) of 0/1, and the processor's seconds of the updates."""
    data, model = root / Piece("data", piece.seed).place, model_of(root)
    trained, failed = None, None
    if piece.method != BASE:
        options = options_for(METHODS[piece.method]) | {"bf16": model["dtype"] == "bfloat16"}
        output = root / piece.place / "run"
        trained, failed = attempted(lambda: train_once(options, data, Path(model["path"]), output, piece.seed))
    if failed is not None:
        of_base = result_of(Piece("run", piece.seed, BASE), root)
        assert of_base is not None  # it was needed
        return {name: of_base[name] for name in ("greedy", "sampling", "unread")} | {
            "cpu_seconds": 0.0,
            "failed": failed.replace(str(root), "DIRECTORY"),
        }
    found = evaluated(str(trained.output_dir if trained else model["path"]), data, model, piece, root)
    return found | {"cpu_seconds": trained.cpu_seconds if trained else 0.0, "failed": None}


def evaluated(path: str, data: Path, model: dict[str, Any], piece: Piece, root: Path) -> dict[str, Any]:
    """Answers to the seed's test problems, as `dqo eval` gives and keeps them."""
    from dqo.config.values import checked_config
    from dqo.evaluation.evaluate import evaluated as answered
    from dqo.evaluation.options import EvalConfig
    from dqo.evaluation.summary import per_problem

    places = {"model_name_or_path": path, "tasks": str(data / TEST), "output_dir": str(root / piece.place / "eval")}
    options = places | {"verifier": VERIFIER, "num_generations": SIZES.test_samples, "name": piece.method}
    evaluation, summary = answered(checked_config(EvalConfig, options | generation(model, piece.seed + 1)), quiet=True)
    found = per_problem(evaluation, SIZES.test_samples)
    return {"greedy": found["greedy"], "sampling": found["pass@1"], "unread": summary["unread"]}
