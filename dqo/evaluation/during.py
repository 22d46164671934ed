"""Answers to some of eval_tasks while a model is trained: their accuracy among the metrics, a few of them in generations.jsonl."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dqo.config.options import Options
from dqo.data.ends import ends_of
from dqo.data.prompts import Prompt, prompt_token_ids
from dqo.files import write_whole
from dqo.grading.grade import Grade
from dqo.grading.pool import VerifierPool
from dqo.models.generate import Request, Response, Sampling, generate, text_of
from dqo.models.policy import stop_ids
from dqo.processes import Processes, gather_objects
from dqo.train.loop import Answers

LOGGED = 5  # generations of an evaluation
_BATCH = 64


def some_of(tasks: list[Prompt], count: int) -> list[Prompt]:
    """`count` of them, evenly spread, the same ones each time."""
    count = min(count, len(tasks))
    return [tasks[i * len(tasks) // count] for i in range(count)]


def answering(options: Options, tasks: list[Prompt]) -> Answers | None:
    """What a trainer calls at every evaluation; None where nothing is to be answered during training.

    It returns eval_accuracy, of greedy answers, and eval_unparsed, the share that the verifier could not read. Decoding is greedy:
    no random number of the training is used up.
    """
    config = options.train
    if not tasks or config.eval_steps == 0 or config.eval_task_problems == 0:
        return None
    asked = some_of(tasks, config.eval_task_problems)
    path = Path(config.output_dir) / "generations.jsonl"
    said: list[bool] = []

    def answers(policy: PreTrainedModel, tokenizer: Any, step: int, processes: Processes) -> dict[str, float]:
        if processes.fsdp:
            if not said:
                said.append(True)
                processes.say("WARNING: eval_tasks are answered after training alone: the weights are sharded (fsdp)")
            return {}
        responses = _responses(policy, tokenizer, asked, config.max_completion_length, processes)
        texts = [text_of(tokenizer, response) for response in responses]
        grades = processes.from_main(lambda: _grades(str(config.verifier), asked, responses, texts))
        if processes.main:
            _log(path, step, [_row(step, *found) for found in zip(asked[:LOGGED], responses, texts, grades)])
        count = len(asked)
        return {
            "eval_accuracy": sum(grade.right for grade in grades) / count,
            "eval_unparsed": sum(not grade.parsed for grade in grades) / count,
        }

    return answers


def _responses(
    policy: PreTrainedModel, tokenizer: Any, asked: list[Prompt], max_new_tokens: int, processes: Processes
) -> list[Response]:
    """Greedy responses, each process having answered a part."""
    ids = prompt_token_ids(tokenizer, asked)
    mine = range(processes.rank, len(asked), processes.world)
    found = generate(
        policy,
        [Request(ids[i], (i,)) for i in mine],
        Sampling(temperature=0.0, max_new_tokens=max_new_tokens),
        stop_ids=ends_of(tokenizer, stop_ids(policy)).stops,
        pad_id=tokenizer.pad_token_id,
        batch_size=_BATCH,
        description="eval_tasks",
        quiet=not processes.main,
    )
    by_place = dict(gather_objects([(mine[at], response) for at, response in found], processes))
    return [by_place[i] for i in range(len(asked))]


def _grades(verifier: str, asked: list[Prompt], responses: list[Response], texts: list[str]) -> list[Grade]:
    """An answer that never ended is wrong, and is not read."""
    ended = [i for i, response in enumerate(responses) if response.ended]
    with VerifierPool(verifier) as pool:
        made = dict(zip(ended, pool.grade([texts[i] for i in ended], [asdict(asked[i]) for i in ended])))
    return [made.get(i, Grade(0.0, parsed=False)) for i in range(len(responses))]


def _row(step: int, problem: Prompt, response: Response, text: str, grade: Grade) -> dict[str, Any]:
    return {
        "step": step,
        "source": problem.source,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "response": text,
        "finish_reason": "stop" if response.ended else "length",
        "right": grade.right,
        "parsed": grade.parsed,
    }


def _log(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """`rows` in the place of what a run that was killed after `step` left behind it."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    made = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    write_whole(path, b"".join(line + b"\n" for line in [*kept, *made]))
