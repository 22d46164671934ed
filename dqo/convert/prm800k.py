"""PRM800K (openai/prm800k): trees of steps that people rated."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from dqo.convert.source import Converted, prompt_of, source_records, text_of, warn_unended
from dqo.data.forms import Record, joined, shown
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.grading.answers import same_answer

_ANSWER = re.compile(r"# Answer\s+(.*)\s*\Z", re.DOTALL)


def convert_prm800k(source: str | Path) -> Converted:
    """A line is a tree: at each step one completion is chosen and goes on, the others are leaves. One row a leaf.

    The path to a leaf holds the chosen completions before it; steps are joined by newlines; step_rewards are the ratings, -1, 0
    or 1, and 1 for a step that the labeller wrote (the instructions ask for a right one). A completion that is flagged or has no
    rating is left out, with what follows it. Quality-control and screening questions, which every labeller saw, are left out.
    A path has ended when its last step has a "# Answer". It is right when that answer equals ground_truth_answer, or when it is
    the chosen path of a label with finish_reason "solution", which says that the labeller found the correct answer there.
    """
    _, records = source_records(source)
    rows, counts = [], Counter(trees=0, quality_control=0, flagged_steps=0, unrated_steps=0, human_steps=0)
    for record in records:
        text_of(record, "question.problem")
        steps = record.values.get("label", {}).get("steps") if isinstance(record.values.get("label"), dict) else None
        if not isinstance(steps, list):
            raise UserError(f"{record.source}: label.steps is {shown(steps)}; expected a list")
        if record.values.get("is_quality_control_question") or record.values.get("is_initial_screening_question"):
            counts["quality_control"] += 1
            continue
        counts["trees"] += 1
        rows += [_row(record, path, chosen) for path, chosen in _paths(record, steps, counts)]
    warn_unended(rows)
    return Converted(
        rows, {f"left_out_{k}" if k != "trees" and k != "human_steps" else k: n for k, n in counts.items()}
    )


def _paths(record: Record, steps: list[dict], counts: Counter) -> list[tuple[list[tuple[str, int]], bool]]:
    """(steps with their ratings, whether it is the chosen path) of every leaf."""
    paths: list[tuple[list[tuple[str, int]], bool]] = []
    before: list[tuple[str, int]] = []
    for depth, step in enumerate(steps):
        leaves: list[list[tuple[str, int]]] = []
        after: list[tuple[str, int]] | None = None
        completions = (step.get("completions") or []) if isinstance(step, dict) else None
        if not isinstance(completions, list) or not all(isinstance(completion, dict) for completion in completions):
            raise UserError(
                f"{record.source}: label.steps[{depth}] is {shown(step)}; expected completions, each with text and rating"
            )
        chosen = step.get("chosen_completion")
        for i, completion in enumerate(completions):
            text, rating = completion.get("text"), completion.get("rating")
            if completion.get("flagged"):
                counts["flagged_steps"] += 1
            elif rating not in (-1, 0, 1) or not isinstance(text, str) or not text.strip():
                counts["unrated_steps"] += 1
            elif i == chosen:
                after = [*before, (text, rating)]
            else:
                leaves.append([*before, (text, rating)])
        human = step.get("human_completion")
        if (
            chosen is None
            and isinstance(human, dict)
            and not human.get("flagged")
            and (human.get("text") or "").strip()
        ):
            counts["human_steps"] += 1
            after = [*before, (human["text"], 1)]
        paths += [(leaf, False) for leaf in leaves]
        if after is None:  # nothing goes on from here
            if before and not leaves:
                paths.append((before, False))
            return paths
        before = after
    return [*paths, (before, True)] if before else paths


def _row(record: Record, path: list[tuple[str, int]], chosen: bool) -> Row:
    text, spans = joined([text for text, _ in path])
    truth = record.values["question"].get("ground_truth_answer")
    answer = _ANSWER.search(path[-1][0])
    solved = chosen and record.values["label"].get("finish_reason") == "solution"
    right = answer is not None and (solved or (isinstance(truth, str) and same_answer(answer[1], truth)))
    return Row(
        prompt=prompt_of(record.values["question"]["problem"]),
        completion=text,
        reward=float(right),
        label=right,
        steps=spans,
        step_rewards=[float(rating) for _, rating in path],
        finish_reason="stop" if answer else "length",
        answer=truth if isinstance(truth, str) else None,
        source=record.source,
    )


FORMATS = {"prm800k": convert_prm800k}
