"""What a finished run keeps for its report: answers.jsonl, held_out.jsonl, and the rest of run.json."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from dqo.data.batches import distinct
from dqo.data.episodes import Episode
from dqo.evaluation.accuracy import Accuracy, Answered
from dqo.models import attention
from dqo.processes import Processes
from dqo.report.schema import ValueTrace
from dqo.train.engine import Engine
from dqo.train.held_out import predictions, value_traces
from dqo.train.record import ANSWERS_FILE, HELD_OUT_FILE, end_record, write_lines
from dqo.train.run import Run


def store_results(run: Run, accuracies: dict[str, Accuracy]) -> None:
    """Writes what only the models can tell. `accuracies`: of the base and of the trained model; {} without eval_tasks."""
    found: dict[str, Any] = {"seconds": run.seconds, "tokens_per_second": run.tokens_per_second, "made": run.steps}
    found |= {"held_out": run.held_out, "value_traces": [], "files": []}
    if accuracies:
        before, after = accuracies.values()
        write_lines(run.output_dir / ANSWERS_FILE, answer_rows(before, after))
        found["unread"] = {"before": before.unread(), "after": after.unread()}
        found["files"] += [ANSWERS_FILE]
    episodes = distinct(run.prepared.held_out)
    if episodes:
        rows, traces = _held_out(run, episodes)
        write_lines(run.output_dir / HELD_OUT_FILE, rows)
        found["files"] += [HELD_OUT_FILE]
        if traces:
            tokenizer = run.prepared.tokenizer
            found["value_traces"] = [_trace(tokenizer, episodes[i], traces[i]) for i in _shown(episodes)]
    end_record(run.output_dir, found)


def answer_rows(before: Accuracy, after: Accuracy) -> list[dict]:
    """One row a problem."""

    def said(greedy: Answered, sampled: list[Answered]) -> dict:
        return {"greedy": greedy.right, "text": greedy.text, "sampling": [answered.right for answered in sampled]}

    return [
        {
            "prompt": _shown_prompt(was.problem.row["prompt"]),
            "before": said(was, was_sampled),
            "after": said(now, now_sampled),
        }
        for was, was_sampled, now, now_sampled in zip(before.greedy, before.sampling, after.greedy, after.sampling)
    ]


def _shown_prompt(prompt: str | list[dict]) -> str:
    """Messages one below the other, each under its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _held_out(run: Run, episodes: list[Episode]) -> tuple[list[dict], list[list[float]]]:
    """A row for each held-out response, and V at each of its states ([] without a value model)."""
    prepared = run.prepared
    learner = prepared.learner
    batching = replace(prepared.batching, max_tokens=16_384, packed=attention.packs(learner.policy))
    engine = Engine(learner, learner, batching, Processes(device=learner.device))
    columns, _ = predictions(engine, episodes)
    traces = [] if learner.value_model is None else value_traces(engine, episodes)
    rows = []
    for i, e in enumerate(episodes):
        row: dict[str, Any] = {"source": e.source, "prompt": e.prompt_index, "label": e.label, "reward": e.reward}
        row |= {"prompt_length": len(e.prompt_ids), "length": e.action_count}
        row |= {name: float(columns[name][i]) for name in ("logps", "ref_logps") if name in columns}
        if traces:
            middle = math.ceil(len(traces[i]) / 2) - 1
            row |= {"value_start": traces[i][0], "value_half": traces[i][middle], "value_end": traces[i][-1]}
        rows.append(row)
    return rows, traces


def _shown(episodes: list[Episode], each: int = 3) -> list[int]:
    """The first correct and the first wrong responses of distinct prompts."""
    chosen: dict[bool, list[int]] = {True: [], False: []}
    prompts: set[int] = set()
    for i, e in enumerate(episodes):
        if len(chosen[e.label]) < each and e.prompt_index not in prompts:
            chosen[e.label].append(i)
            prompts.add(e.prompt_index)
    return chosen[True] + chosen[False]


def _trace(tokenizer, episode: Episode, values: list[float]) -> ValueTrace:
    wrong = [i for i, reward in enumerate(episode.step_rewards) if reward < 0]
    return {
        "prompt": tokenizer.decode(episode.prompt_ids, skip_special_tokens=True),
        "tokens": [tokenizer.decode([token]) for token in episode.action_ids],
        "values": values,
        "reward": episode.reward,
        "step_ends": [end + 1 for end in episode.step_ends],
        "first_wrong_step": wrong[0] if wrong else None,
    }
