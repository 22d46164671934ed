"""What the runs of `benchmarks.evidence.objectives` learned and took: their measures, the tables and the plot."""

from __future__ import annotations

import ast
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.methods import DECODINGS, PANELS, per_problem, plot
from benchmarks.evidence.objective_options import BUDGET, COMMON, PROBLEMS, SAMPLES, own_options
from benchmarks.harness.environment import commit
from dqo.credit.quality import Judged, quality_of
from dqo.data.episodes import make_episodes
from dqo.data.rows import Row, read_rows
from dqo.stats import accuracy_interval
from dqo.train.metrics import read_metrics

RESULTS = Path(__file__).parents[1] / "results"
OBJECTIVE_FILES = Path(__file__).parents[2] / "dqo" / "objectives"
READS = {"rto": "dpo"}  # a method, and the one whose policy it reads
# What dqo/objectives/base.py, as it was first written, did not have; their commits tell
BEYOND = {
    "curry_dpo": "phases that train on a part of the pairs and refresh the reference",
    "dapo": "a critic that is fitted to a column, and the file's pass rates as that column",
    "ppo": "means over a whole step, known before its losses; whether log-probabilities are stored",
    "rto": "a frozen third model, asked once",
    "etpo": "a language model as critic, and the exact KL to it",
}
SHOWN = PANELS | {"auc": ("credit AUC", 1, (0.3, 1))}


def code_lines(path: Path) -> int:
    """Lines that hold code: no comments, docstrings, help texts of options, or blank lines."""
    text = path.read_text()
    tree = ast.parse(text)
    texts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in texts for i, line in lines)


def measured(run: Path, base: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """What the policy knows of these responses by log(pi/base), and the exact KL(pi || base) in their states."""
    from dqo.train.token_scores import load_run, token_scores

    models = load_run(run, reference=str(base))
    size = models.policy.get_input_embeddings().weight.shape[0]
    episodes = make_episodes(list(rows), models.tokenizer, vocab_size=size, max_length=COMMON["max_length"])
    told = token_scores(models, episodes, ["logprobs", "ref_logprobs", "kl"], run.name)
    judged = [
        Judged(e.prompt_index, e.label, said["logprobs"] - said["ref_logprobs"], e.step_ends, e.first_wrong_step)
        for e, said in zip(episodes, told)
    ]
    found = quality_of(judged)._asdict()
    row = {name: None if interval is None else _as_dict(interval) for name, interval in found.items()}
    return row | {"kl": float(np.mean([said["kl"].sum() for said in told]))}


def _as_dict(interval: Any) -> dict[str, float]:
    return {name: float(getattr(interval, name)) for name in ("mean", "low", "high")}


def answered(run: Path, when: str) -> dict[str, Any]:
    """Accuracies of the model "before" or "after" training."""
    lines = [json.loads(line)[when] for line in (run / "answers.jsonl").read_text().splitlines()]
    return {name: _as_dict(accuracy_interval(per_problem([line[name] for line in lines]))) for name in DECODINGS}


def cost(run: Path) -> dict[str, float]:
    record = json.loads((run / "run.json").read_text())
    begins = [phase["begin"] for phase in record["phases"] if "policy" in phase["trains"]]
    found = {"updates": record["made"] - begins[0], "updates_of_critic_alone": begins[0]}
    found |= {name: record[name] for name in ("seconds", "cpu_seconds", "tokens_per_second")}
    peaks = [row["perf/peak_memory_gb"] for row in read_metrics(run / "metrics.jsonl") if "perf/peak_memory_gb" in row]
    return found | {"peak_memory_gb": max(peaks)}


def rows_of(methods: Sequence[str], demonstration: Path, output: Path) -> list[dict[str, Any]]:
    """A row for the base, and one for each of these finished methods."""
    held_out, base = read_rows(str(demonstration / "data" / "held_out.jsonl")), demonstration / "base"
    runs = {method: output / f"{method}-seed{BUDGET['seed']}" for method in methods}
    rows: list[dict[str, Any]] = [{"method": "base", **answered(next(iter(runs.values())), "before")}]
    for method, run in runs.items():
        row = {"method": method, **answered(run, "after"), **measured(run, base, held_out), **cost(run)}
        row["code_lines"] = code_lines(OBJECTIVE_FILES / f"{method}.py")
        rows.append(row | {"beyond_the_contract": BEYOND.get(method, "nothing")})
    by_name = {row["method"]: row for row in rows}
    for row in rows[1:]:
        needed = by_name.get(READS.get(row["method"], ""), {"cpu_seconds": 0.0})
        row["cpu_seconds_with_needs"] = row["cpu_seconds"] + needed["cpu_seconds"]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was learned, and what it took."""
    titles = ["method", "greedy, %", "sampling, %", "credit AUC", "first wrong step, %", "KL"]
    titles += ["updates", "CPU s", "memory, GB", "lines"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["method"] if row["method"] == "base" else f"`{row['method']}`"]
        cells += [_cell(row[name], 100, 1) for name in DECODINGS]
        if row["method"] == "base":
            cells += [""] * 7
        else:
            cells += [_cell(row["auc"], 1, 3), _cell(row["first_wrong_step"], 100, 1), f"{row['kl']:.2g}"]
            alone = row["updates_of_critic_alone"]
            cells.append(f"{row['updates']}" + (f" + {alone}" if alone else ""))
            both = row["cpu_seconds_with_needs"]
            cells.append(f"{row['cpu_seconds']:.0f}" + (f" ({both:.0f})" if both > row["cpu_seconds"] else ""))
            cells += [f"{row['peak_memory_gb']:.2f}", str(row["code_lines"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: dict[str, float] | None, factor: int, digits: int) -> str:
    if found is None:
        return ""
    mean, low, high = (f"{factor * found[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low}–{high})"


def write_results(methods: Sequence[str], demonstration: Path, output: Path, command: str) -> None:
    """objectives.json, objectives.svg, and the table on the terminal."""
    if not methods:
        return
    rows = rows_of(methods, demonstration, output)
    record = json.loads((output / f"{methods[0]}-seed{BUDGET['seed']}" / "run.json").read_text())
    facts = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": record["device"],
        "versions": record["versions"],
        "problems": PROBLEMS,
        "samples": SAMPLES,
        "common_options": COMMON | BUDGET,
        "options": {method: own_options(method) for method in methods},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "objectives.json").write_text(json.dumps(facts, indent=1) + "\n")
    plot(rows, RESULTS / "objectives.svg", SHOWN)
    print(table(rows))
