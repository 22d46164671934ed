"""What a finished run keeps for its report: answers.jsonl, held_out.jsonl, and the rest of run.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dqo.credit.implied import implied_values, soft_return, starts
from dqo.credit.steps import step_sums
from dqo.data.batches import distinct
from dqo.data.episode import Episode
from dqo.evaluation.accuracy import Accuracy, Answered
from dqo.models import attention
from dqo.objectives.base import Objective
from dqo.processes import Processes
from dqo.report.schema import ValueTrace
from dqo.train.engine import Engine
from dqo.train.held_out import Tokens, log_ratios, of_each, tokens_of
from dqo.train.held_out_start import read_start
from dqo.train.record import ANSWERS_FILE, HELD_OUT_FILE, end_record, write_lines
from dqo.train.run import Run


def store_results(run: Run, accuracies: dict[str, Accuracy]) -> None:
    """Writes what only the models can tell. `accuracies`: of the base and of the trained model; {} without eval_tasks."""
    found: dict[str, Any] = {"seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "made": run.steps}
    found |= {"tokens_per_second": run.tokens_per_second, "held_out": run.held_out, "value_traces": [], "files": []}
    if accuracies:
        before, after = accuracies.values()
        write_lines(run.output_dir / ANSWERS_FILE, answer_rows(before, after))
        found["unread"] = {"before": before.unread(), "after": after.unread()}
        found["files"] += [ANSWERS_FILE]
    episodes = distinct(run.prepared.held_out)
    if episodes:
        tokens = _tokens(run, episodes)
        start = read_start(run.output_dir, episodes) or [{} for _ in episodes]
        write_lines(run.output_dir / HELD_OUT_FILE, map(held_out_row, episodes, tokens, start))
        found["files"] += [HELD_OUT_FILE]
        found["value_traces"] = value_traces(run.prepared.tokenizer, run.objective, episodes, tokens)
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


def _tokens(run: Run, episodes: Sequence[Episode]) -> list[Tokens]:
    prepared = run.prepared
    learner = prepared.learner
    batching = replace(prepared.batching, max_tokens=16_384, packed=attention.packs(learner.policy))
    return of_each(
        Engine(learner, learner, batching, Processes(device=learner.device)), tokens_of, episodes, "held out"
    )


def held_out_row(e: Episode, tokens: Tokens, start: dict[str, Any]) -> dict[str, Any]:
    """A line of held_out.jsonl: sums over the response, and scores of its steps. `start`: what the initial model said of it."""
    row: dict[str, Any] = {"source": e.source, "prompt": e.prompt_index, "label": e.label, "reward": e.reward}
    row |= {"prompt_length": len(e.prompt_ids), "length": e.action_count}
    row |= {"steps": len(e.step_ends), "first_wrong_step": e.first_wrong_step, "logps": float(tokens["logprobs"].sum())}
    if e.ref_logprobs is not None:
        ratios = log_ratios(e, tokens)
        row |= {"ref_logps": float(e.ref_logprobs.sum()), "ratio": float(ratios.sum())}
        row |= {"ratio_before_last": float(ratios[:-1].sum()), "step_ratios": step_sums(ratios, e.step_ends).tolist()}
    if "values" in tokens:
        values = tokens["values"]
        changes = np.append(np.diff(values), 0.0)  # what the last token changes is not the value model's to say
        row |= {"value_start": float(values[0]), "value_half": float(values[math.ceil(len(values) / 2) - 1])}
        row |= {"value_end": float(values[-1]), "step_values": step_sums(changes, e.step_ends).tolist()}
    return row | start


def _shown(episodes: Sequence[Episode], each: int = 3) -> list[int]:
    """The first correct and the first wrong responses of distinct prompts."""
    chosen: dict[bool, list[int]] = {True: [], False: []}
    prompts: set[int] = set()
    for i, e in enumerate(episodes):
        if len(chosen[e.label]) < each and e.prompt_index not in prompts:
            chosen[e.label].append(i)
            prompts.add(e.prompt_index)
    return chosen[True] + chosen[False]


def value_traces(
    tokenizer, objective: Objective, episodes: Sequence[Episode], tokens: list[Tokens]
) -> list[ValueTrace]:
    """The value along some of the responses: the value model's, and with a reference what the policy implies."""
    found = [_trace(tokenizer, episodes[i]) for i in _shown(episodes)]
    if "values" in tokens[0]:
        for trace, i in zip(found, _shown(episodes)):
            trace["values"] = tokens[i]["values"].tolist()
    if all(e.ref_logprobs is not None for e in episodes) and objective.discount_factor > 0:
        beta = getattr(objective, "beta", 1.0)
        advantages = [beta * log_ratios(e, said) for e, said in zip(episodes, tokens)]
        discounts = [e.discounts(objective.discount_factor, objective.discount_at) for e in episodes]
        returns = [
            soft_return(advantage, e.rewards, gamma) if e.terminated else math.nan
            for e, advantage, gamma in zip(episodes, advantages, discounts)
        ]
        critic = [float(said["values"][0]) for said in tokens] if "values" in tokens[0] else None
        begun = starts([e.prompt_index for e in episodes], returns, critic)
        for trace, i in zip(found, _shown(episodes)):
            implied = implied_values(advantages[i], episodes[i].rewards, begun[i].value, discounts[i])
            trace |= {"advantages": advantages[i].tolist(), "implied": implied.values.tolist()}
            trace["start"] = begun[i]._asdict()
    return found if found and {"values", "advantages"} & found[0].keys() else []


def _trace(tokenizer, episode: Episode) -> ValueTrace:
    return {
        "prompt": tokenizer.decode(episode.prompt_ids, skip_special_tokens=True),
        "tokens": [tokenizer.decode([token]) for token in episode.action_ids],
        "reward": episode.reward,
        "label": episode.label,
        "step_ends": [end + 1 for end in episode.step_ends],
        "first_wrong_step": episode.first_wrong_step,
    }
