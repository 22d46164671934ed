"""Answers to some of eval_tasks during training: their accuracy among the metrics, a few of them in generations.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dqo.config.options import Options
from dqo.data.ends import ends_of
from dqo.data.prompts import Prompt
from dqo.evaluation.accuracy import Answered, Problem, graded
from dqo.evaluation.run import problems_of
from dqo.files import write_whole
from dqo.grading.pool import VerifierPool
from dqo.models.generate import Request, Response, Sampling, generate
from dqo.models.named import stop_ids
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

    It returns eval_accuracy, of greedy answers, and eval_unparsed, the share that the verifier could not read. Greedy decoding
    uses up no random number of the training.
    """
    config = options.train
    if not tasks or config.eval_steps == 0 or config.eval_task_problems == 0:
        return None
    asked = some_of(tasks, config.eval_task_problems)
    path = Path(config.output_dir) / "generations.jsonl"

    def answers(policy: PreTrainedModel, tokenizer: Any, step: int, processes: Processes) -> dict[str, float]:
        problems = problems_of(asked, tokenizer)
        responses = _responses(policy, tokenizer, problems, config.max_completion_length, processes)

        def grade() -> list[Answered]:
            with VerifierPool(str(config.verifier)) as pool:
                return graded(tokenizer, problems, responses, pool.grade)

        found = processes.from_main(grade)
        if processes.main:
            _log(path, step, [_row(step, answered) for answered in found[:LOGGED]])
        return {
            "eval_accuracy": sum(answered.right for answered in found) / len(found),
            "eval_unparsed": sum(not answered.grade.parsed for answered in found) / len(found),
        }

    return answers


def _responses(
    policy: PreTrainedModel, tokenizer: Any, problems: list[Problem], max_new_tokens: int, processes: Processes
) -> list[Response]:
    """Greedy responses, each process having answered a part; of sharded weights all, since every token gathers them anyway."""
    mine = range(len(problems)) if processes.fsdp else range(processes.rank, len(problems), processes.world)
    found = generate(
        policy,
        [Request(problems[i].prompt_ids, (i,)) for i in mine],
        Sampling(temperature=0.0, max_new_tokens=max_new_tokens),
        stop_ids=ends_of(tokenizer, stop_ids(policy)).stops,
        pad_id=tokenizer.pad_token_id,
        batch_size=_BATCH,
        description="eval_tasks",
        quiet=not processes.main,
    )
    answered = [(mine[at], response) for at, response in found]
    by_place = dict(answered if processes.fsdp else gather_objects(answered, processes))
    return [by_place[i] for i in range(len(problems))]


def _row(step: int, answered: Answered) -> dict[str, Any]:
    return {
        "step": step,
        **{name: answered.problem.row[name] for name in ("source", "prompt", "answer")},
        "response": answered.text,
        "finish_reason": "stop" if answered.response.ended else "length",
        "right": answered.grade.right,
        "parsed": answered.grade.parsed,
    }


def _log(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """`rows` in the place of what a run that was killed after `step` left behind it."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    made = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    write_whole(path, b"".join(line + b"\n" for line in [*kept, *made]))
