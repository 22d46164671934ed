r"""Published step labels: PRM800K (openai/prm800k), Math-Shepherd (peiyi9979/Math-Shepherd), MATH-APS (openreasoner/MATH-APS).

In all three a row has reward 1 when the response ended and its answer is right, else 0. A response that did not end (a step
that a labeller went no further from, a prefix without a continuation) has finish_reason "length": nobody knows how it would have
ended, so train with `--truncation bootstrap` or `drop`, which do not take its reward of 0 for a verdict.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from pathlib import Path

from dqo.convert.source import Converted, list_of, prompt_of, source_records, text_of
from dqo.data.forms import Record, joined, shown
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.grading.answers import boxed, same_answer

logger = logging.getLogger(__name__)

_PRM800K_ANSWER = re.compile(r"# Answer\s+(.*)\s*\Z", re.DOTALL)
_SHEPHERD_MARK = "ки"
_SHEPHERD_FIRST = re.compile(r"Step 1:|step 1:")
_LISTED = 5  # rows named in a message about what is left out


# ---------------------------------------------------------------------------------------------------------------- PRM800K


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
        rows += [_prm800k_row(record, path, chosen) for path, chosen in _prm800k_paths(record, steps, counts)]
    _warn_unended(rows)
    return Converted(
        rows, {f"left_out_{k}" if k != "trees" and k != "human_steps" else k: n for k, n in counts.items()}
    )


def _prm800k_paths(record: Record, steps: list[dict], counts: Counter) -> list[tuple[list[tuple[str, int]], bool]]:
    """(steps with their ratings, whether it is the chosen path) of every leaf."""
    paths, before = [], []
    for depth, step in enumerate(steps):
        leaves, after = [], None
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


def _prm800k_row(record: Record, path: list[tuple[str, int]], chosen: bool) -> Row:
    text, spans = joined([text for text, _ in path])
    truth = record.values["question"].get("ground_truth_answer")
    answer = _PRM800K_ANSWER.search(path[-1][0])
    solved = chosen and record.values["label"].get("finish_reason") == "solution"
    right = bool(answer) and (solved or (isinstance(truth, str) and same_answer(answer[1], truth)))
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


# ----------------------------------------------------------------------------------------------------------- Math-Shepherd


def convert_math_shepherd(source: str | Path) -> Converted:
    """`input` is question and steps, each step ended by a mark, `label` the same text with + or - for each mark.

    The question ends where "Step 1:" begins; a step reaches to its mark, a newline takes the place of what is between the marks
    and the next step. step_rewards are 1 and 0: whether some completion from there was right, so they serve as potentials.
    A solution ended when its last step says "The answer is", and is right when its last label is + as well. Rows whose input
    and label do not match mark by mark, or that have a mark inside the question, are named and left out.
    """
    _, records = source_records(source)
    rows, bad = [], []
    for record in records:
        try:
            rows.append(_shepherd_row(record))
        except _Mislabelled as fault:
            bad.append(f"{record.source} ({fault})")
    if bad:
        logger.warning(
            "%d mislabelled rows are left out: %s", len(bad), ", ".join([*bad[:_LISTED], *["..."][: len(bad) - 5]])
        )
    _warn_unended(rows)
    return Converted(rows, {"left_out_mislabelled": len(bad), "by_task": _shares_by(rows, "task")})


class _Mislabelled(Exception):
    pass


def _shepherd_row(record: Record) -> Row:
    given, labelled = text_of(record, "input"), text_of(record, "label")
    *pieces, rest = given.split(_SHEPHERD_MARK)
    if not pieces:
        raise UserError(f'{record.source}: input has no mark "{_SHEPHERD_MARK}"; expected one after every step')
    signs, position = [], 0
    for piece in pieces:
        position += len(piece)
        sign = labelled[position : position + 1]
        if labelled[position - len(piece) : position] != piece or sign not in ("+", "-"):
            raise _Mislabelled(f"mark {len(signs) + 1} has no + or - in label")
        signs.append(sign == "+")
        position += 1
    if rest.strip() or labelled[position:].strip():
        raise _Mislabelled("text after the last mark")
    first = _SHEPHERD_FIRST.search(given)
    if not first:
        raise _Mislabelled('no "Step 1:"')
    if first.start() > len(pieces[0]):
        raise _Mislabelled("a mark inside the question")
    question, pieces[0] = given[: first.start()], given[first.start() : len(pieces[0])]
    steps = [piece.strip() for piece in pieces]
    if not question.strip() or not all(steps):
        raise _Mislabelled("an empty question or step")
    text, spans = joined(steps)
    ended = "The answer is" in steps[-1]
    right = ended and signs[-1]
    task = record.values.get("task")
    return Row(
        prompt=prompt_of(question),
        completion=text,
        reward=float(right),
        label=right,
        steps=spans,
        step_rewards=[float(sign) for sign in signs],
        finish_reason="stop" if ended else "length",
        sampling={"task": task} if isinstance(task, str) else None,
        source=record.source,
    )


def _shares_by(rows: list[Row], name: str) -> dict[str, float]:
    """Share of right rows for each value of a field of `sampling`."""
    labels = defaultdict(list)
    for row in rows:
        labels[(row.sampling or {}).get(name, "?")].append(row.label)
    return {value: sum(found) / len(found) for value, found in labels.items()}


# ---------------------------------------------------------------------------------------------------------------- MATH-APS


def convert_math_aps(source: str | Path) -> Converted:
    r"""A line is a question with prefixes of solutions, each with mc_value, the share of its completions that were right.

    The prefixes are a tree. One row a leaf; its steps end where the prefixes on the way to it end, and step_rewards are their
    mc_values: potentials, for `--process_reward potential`. A prefix that was measured twice has the mean. The question's own
    mc_value is not kept: Phi of a prompt is 0, which shifts values and nothing else. White space before the first step and
    after the last is dropped.
    A leaf has ended when nothing follows its last \boxed{} but the rest of a line, and is right when that box holds
    final_answer; mc_value calls some leaves right that go on after their answer until they are cut, or that end in another
    answer: those are counted as `graded_right_without_the_answer`.
    """
    _, records = source_records(source)
    rows, disputed, merged = [], 0, 0
    for record in records:
        question, truth = text_of(record, "question"), text_of(record, "final_answer")
        values = _aps_values(record, question)
        merged += sum(len(found) - 1 for found in values.values())
        for chain in _chains(list(values)):
            row = _aps_row(record, question, truth, chain, values)
            disputed += not row.label and row.step_rewards[-1] == 1.0
            rows.append(row)
    _warn_unended(rows)
    return Converted(rows, {"merged_prefixes": merged, "graded_right_without_the_answer": disputed})


def _aps_values(record: Record, question: str) -> dict[str, list[float]]:
    """{what follows the question, without the white space around it: its mc_values}."""
    values = defaultdict(list)
    for i, step in enumerate(list_of(record, "reasoning_steps")):
        prefix, value = (step.get("solution_prefix"), step.get("mc_value")) if isinstance(step, dict) else (None, None)
        if not isinstance(prefix, str) or not prefix.startswith(question):
            raise UserError(
                f"{record.source}: reasoning_steps[{i}].solution_prefix is {shown(prefix)}; expected the question and what "
                "follows it"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(
                f"{record.source}: reasoning_steps[{i}].mc_value is {shown(value)}; expected a share in [0, 1]"
            )
        if prefix[len(question) :].strip():
            values[prefix[len(question) :].strip()].append(float(value))
    return values


def _chains(prefixes: list[str]) -> list[list[str]]:
    """From the first prefix to each leaf, every prefix on the way; in sorted order a prefix comes before what it begins."""
    chains, way = [], []
    ordered = sorted(prefixes)
    for i, prefix in enumerate(ordered):
        while way and not prefix.startswith(way[-1]):
            way.pop()
        way.append(prefix)
        if i + 1 == len(ordered) or not ordered[i + 1].startswith(prefix):
            chains.append(list(way))
    return chains


def _aps_row(record: Record, question: str, truth: str, chain: list[str], values: dict[str, list[float]]) -> Row:
    text = chain[-1]
    ends = [len(prefix) for prefix in chain]
    box = boxed(text)
    ended = box is not None and not re.search(r"\n[^\n]*\w", text[box[1] :])
    right = ended and same_answer(box[0], truth)
    number = record.values.get("question_id", record.index)
    return Row(
        prompt=prompt_of(question),
        completion=text,
        reward=float(right),
        label=right,
        steps=list(zip([0, *ends], ends)),
        step_rewards=[sum(values[prefix]) / len(values[prefix]) for prefix in chain],
        finish_reason="stop" if ended else "length",
        answer=truth,
        prompt_id=f"math-aps/{number}",
        source=record.source,
    )


def _warn_unended(rows: list[Row]) -> None:
    cut = sum(row.finish_reason == "length" for row in rows)
    if cut:
        logger.warning(
            "%d of %d responses did not end: their reward of 0 is no verdict; train with --truncation bootstrap or drop",
            cut,
            len(rows),
        )
