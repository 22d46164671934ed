"""Base models, their samples, and the rollout files of the tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.study import transformations as made_of
from benchmarks.evidence.study.pieces import SAMPLES, Piece
from benchmarks.evidence.study.settings import ABLATED, MISLABELLED, ROWS
from benchmarks.evidence.study.sizes import BASES, LENGTH, TASKS, Base, Task
from dqo.config.options import options_of
from dqo.data.rows import Row, read_rows, write_rows
from dqo.demo.half_right import by_prompt, half_right, noisy_steps
from dqo.demo.rollouts import distinct_problems, graded_rows, rng_of
from dqo.grading.arith import VOCABULARY, ArithTask

CONTINUATIONS = 4  # of a prefix whose value is measured
NOISE, POSITIVES, WITHOUT = 0.2, 0.1, 0.75
HOT = 1.3  # the temperature of the third behaviour policy
SHARES = (3, 3, 2)  # of the 8 samples of a problem: the base, the other author's model, the hot base


def model_of(name: str, seed: int, root: Path) -> Path:
    return root / Piece("base", name, seed).place / "model"


def problems_of(base: Base, seed: int) -> tuple[list[str], list[str], set[str]]:
    """Problems of the evaluation, and to sample responses to; and both, which no demonstration may have."""
    taken: set[str] = set()
    evaluation = distinct_problems(base.arith, rng_of(seed, "evaluation"), base.evaluation, taken)
    return evaluation, distinct_problems(base.arith, rng_of(seed, "rollouts"), base.prompts, taken), taken


def make_base(name: str, seed: int, root: Path) -> dict[str, Any]:
    """The model, and the first file of its samples."""
    from dqo.models.new import character_tokenizer, new_llama, save
    from dqo.train.run import train

    base, place = BASES[name], root / Piece("base", name, seed).place
    place.mkdir(parents=True, exist_ok=True)
    _, problems, taken = problems_of(base, seed)
    if base.after is None:
        start = place / "initial"
        if not start.exists():
            tokenizer = character_tokenizer(VOCABULARY)
            size = {"hidden_size": base.hidden_size, "layers": base.layers, "heads": 4}
            size |= {"intermediate_size": 2 * base.hidden_size}
            save(new_llama(tokenizer, **size, initializer_range=0.05, max_length=LENGTH, seed=seed), tokenizer, start)
    else:
        start = model_of(base.after, seed, root)
    rng = rng_of(seed, f"demonstrations of {name}")
    asked = distinct_problems(base.arith, rng, base.demonstrations, taken)
    demonstrations = place / "demonstrations.jsonl"
    write_rows(demonstrations, [Row(prompt=p, completion=base.arith.demonstration(p, rng), reward=1.0) for p in asked])
    fitting = {
        "method": "sft", "model_name_or_path": str(start), "dataset_name": str(demonstrations),
        "output_dir": str(place / "model"), "eval_fraction": 0.0, "max_length": LENGTH, "seed": seed,
        "per_device_train_batch_size": base.batch, "learning_rate": base.learning_rate, "lr_scheduler_type": "cosine",
        "warmup_steps": base.warmup, "adam_beta2": 0.99, "save_steps": 200, "save_total_limit": 1,
    }  # fmt: skip
    train(options_of(fitting, "the base model's options"), f"base {name}")
    demonstrations.unlink()
    if name == "other":
        return {}
    rows = sampled(base, model_of(name, seed, root), problems, 8, seed)
    as_text = [dataclasses.replace(row, prompt_ids=None, completion_ids=None, logprobs=None) for row in rows]
    write_rows(place / SAMPLES, as_text)
    return {"rows": len(rows), "right": sum(row.label for row in rows) / len(rows)}


def sampled(
    base: Base,
    model: Path,
    problems: Sequence[str],
    samples: int,
    seed: int,
    temperature: float = 1.0,
) -> list[Row]:
    """Graded samples of a model with their log-probabilities. `base`: of the problems, and how they are graded."""
    from dqo.models.generate import Request, Sampling, generate, in_order, text_of
    from dqo.models.identity import model_identity
    from dqo.models.named import load_config, load_tokenizer
    from dqo.models.policy import load_policy

    policy, tokenizer = load_policy(str(model)), load_tokenizer(str(model))
    ids = tokenizer(list(problems))["input_ids"]
    asked = [(i, k) for i in range(len(problems)) for k in range(samples)]
    found = generate(
        policy,
        [Request(ids[i], (problems[i], k)) for i, k in asked],
        Sampling(temperature=temperature, max_new_tokens=base.max_new_tokens, seed=seed),
        stop_ids=[tokenizer.eos_token_id],
        pad_id=tokenizer.pad_token_id,
    )
    told = {"model": str(model), "model_hash": model_identity(str(model), load_config(str(model)))}
    told |= {"temperature": temperature, "seed": seed}
    rows = []
    for (i, _), response in zip(asked, in_order(found)):
        text = text_of(tokenizer, response)
        own = {"prompt_ids": ids[i], "completion_ids": response.ids, "logprobs": response.logprobs}
        rows += [
            dataclasses.replace(row, **own)
            for row in graded_rows(base.arith, problems[i], [(text, response.ended)], told)
        ]
    return made_of.strictly(rows) if base.strict else rows


def make_data(name: str, seed: int, root: Path) -> dict[str, Any]:
    """The files of a task, made of the samples of its base model, or sampled by others."""
    task, place = TASKS[name], root / Piece("data", name, seed).place
    place.mkdir(parents=True, exist_ok=True)
    files = files_of(name, task, seed, root)
    for file, rows in files.items():
        write_rows(place / file, rows)
    if name == "d":
        measure(files[ROWS], place, model_of(task.base, seed, root), BASES[task.base], seed)
    rows = files[ROWS]
    right = sum(row.label for row in rows) / len(rows)
    return {"rows": len(rows), "prompts": len(by_prompt(rows)), "right": right}


def files_of(name: str, task: Task, seed: int, root: Path) -> dict[str, list[Row]]:
    """{file: rows}."""
    if task.other:
        return {ROWS: of_others(name, task, seed, root)}
    samples = read_rows(str(root / Piece("base", task.base, seed).place / SAMPLES))
    prompts = list(by_prompt(samples))[: task.prompts]
    rows = [row for row in samples if row.prompt in set(prompts)]
    if name == "c":
        rows = made_of.few_positives(rows, rng_of(seed, "few positives"), WITHOUT, task.rows)
    if name == "d":
        rows = half_right(rows, rng_of(seed, "half right"), POSITIVES, task.rows)
        noisy = noisy_steps(rows, rng_of(seed, "noise"), NOISE)
        files = {ROWS: rows, "steps.jsonl": rows, MISLABELLED: noisy, "prefixes.jsonl": made_of.right_prefixes(rows)}
        return files | {"mislabelled-whole.jsonl": made_of.right_answers_and_prefixes(noisy)}
    if name == "f":
        rows = made_of.stitching(rows)
        return {
            ROWS: rows,
            "steps.jsonl": made_of.paid_at_steps(rows),
            "prefixes.jsonl": made_of.right_prefixes(rows),
        }
    if name in ABLATED:
        return {ROWS: rows} | {f"samples-{count}.jsonl": made_of.first_samples(rows, count) for count in (2, 4)}
    return {ROWS: rows}


def of_others(name: str, task: Task, seed: int, root: Path) -> list[Row]:
    """Samples of the other author's model, or of three policies; with the log-probabilities of the policy that wrote each."""
    assert task.other is not None
    base = BASES[task.base]
    own, other = model_of(task.base, seed, root), model_of(task.other, seed, root)
    problems = problems_of(base, seed)[1][: task.prompts]
    if name == "e1":
        return sampled(base, other, problems, task.samples, seed)
    parts = [
        sampled(base, own, problems, SHARES[0], seed),
        sampled(base, other, problems, SHARES[1], seed + 1),  # the draws of one seed would go with those of the base
        sampled(base, own, problems, SHARES[2], seed + 2, temperature=HOT),
    ]
    return [row for found in by_prompt([row for part in parts for row in part]).values() for row in found]


def measure(rows: Sequence[Row], place: Path, model: Path, base: Base, seed: int) -> None:
    """measured.jsonl: the rows with the pass rates of their prefixes in the place of the labels of their steps."""
    from dqo.scoring.run import score

    unlabelled = place / "unlabelled.jsonl"
    write_rows(unlabelled, [dataclasses.replace(row, step_rewards=None) for row in rows])
    score(
        data=str(unlabelled),
        verifier="arith",
        output_file=str(place / "measured.jsonl"),
        existing_rewards="keep",
        processes=1,
        prefix_values=CONTINUATIONS,
        model_name_or_path=str(model),
        batch_size=1024,
        max_completion_length=base.max_new_tokens,
        seed=seed,
    )


def right(arith: ArithTask, strict: bool, prompt: str, completion: str) -> bool:
    """Whether an answer counts as right in a task."""
    grade = arith.grade(prompt, completion)
    return grade.correct and (not strict or all(grade.step_correct))
