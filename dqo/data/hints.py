"""Hints for a file without the columns of rollout rows: what it probably is, and how to make rollout rows of it."""

from __future__ import annotations

from collections.abc import Iterable

_GROUPED = "one row a prompt, with the lists completions (strings) and rewards (numbers)"
_CHOICE = "This looks like pairs with a choice: write prompt, chosen and rejected (the response that was chosen, and the other)"
_UNSAMPLED = "These look like problems without responses: sample responses and grade them first"

_STRUCTURES: tuple[tuple[set[str], str], ...] = (  # columns found -> what the file is; the first that fits
    ({"prompt", "completion", "sampling"}, "These are samples that nobody has graded: score them with `dqo score`"),
    ({"question", "ground_truth"}, "This looks like GSM8K's graded solutions: run `dqo convert gsm8k-solutions` on it"),
    ({"question", "label", "labeler"}, "This looks like PRM800K: run `dqo convert prm800k` on it"),
    ({"input", "label"}, "This looks like Math-Shepherd: run `dqo convert math-shepherd` on it"),
    ({"question", "reasoning_steps"}, "This looks like MATH-APS: run `dqo convert math-aps` on it"),
    ({"problem", "generations"}, "This looks like open-r1's data: run `dqo convert open-r1` on it"),
    ({"prompt", "data_source"}, "This looks like verl's data: run `dqo convert verl` on it"),
    (
        {"problem", "steps", "final_answer_correct"},
        "This looks like ProcessBench: rename problem to prompt, join steps to completion, rename final_answer_correct to label",
    ),
    *(
        ({name, "chosen", "rejected"}, f"This looks like preference data: rename {name} to prompt")
        for name in ("question", "input", "instruction", "query")
    ),
    (
        {"chosen"},
        "This looks like preference data: run `dqo convert trl-preference` on it, which moves what chosen and rejected share "
        "to a column prompt",
    ),
    *(
        ({f"{name}{first}", f"{name}{second}"}, _CHOICE)
        for name in ("response", "response_", "completion_", "output_", "answer_", "human_ref_", "conversation_")
        for first, second in ("ab", "AB", "01", "12")
    ),
    ({"summaries", "choice"}, _CHOICE),
    (
        {"messages"},
        "This looks like chat data: move the last assistant message to completion, the messages before it to "
        "prompt, and add a reward",
    ),
    (
        {"conversations"},
        "This looks like ShareGPT's chat data: move the last turn of gpt to completion, the turns before it to prompt, both as "
        'lists of {"role", "content"} with the roles system, user (human) and assistant (gpt), and add a reward',
    ),
    (
        {"message_id", "parent_id"},
        "This looks like a tree of messages: write one row an assistant message, the messages above it as prompt, it as "
        "completion, and add a reward",
    ),
    (
        {"message_1", "message_2"},
        "This looks like chat data: rename message_1 to prompt and message_2 to completion, and add a reward",
    ),
    (
        {"completions", "instruction"},
        f"This looks like UltraFeedback: write {_GROUPED}: instruction is the prompt, each item's response and overall_score "
        "are the lists",
    ),
    *(
        (
            {name, "answers"},
            f"This looks like ranked answers: write {_GROUPED}, which are a better answer's higher (a rank counts the other "
            "way)",
        )
        for name in ("prompt", "question")
    ),
    *(
        ({name}, f"These look like grouped rows: rename {name} to completions; grouped rows are {_GROUPED}")
        for name in ("responses", "generations", "outputs", "samples", "candidates")
    ),
    ({"prompt", "canonical_solution"}, _UNSAMPLED),
)

_PROMPTS = ("instruction", "question", "query", "problem", "input", "history", "context")
_COMPLETIONS = (
    "response",
    "output",
    "generated_solution",
    "generated_text",
    "generation",
    "model_output",
    "prediction",
)
_REFERENCES = ("answer", "solution")  # responses where they have a score, else what responses are graded by
_REWARDS = ("score", "rating", "overall_score", "reward_score", "helpfulness", "quality", "grade")
_LABELS = ("is_correct", "correct", "passed")
_IDS = {
    "prompt_ids": ("prompt_token_ids", "input_ids"),
    "completion_ids": (
        "completion_token_ids",
        "token_ids",
        "output_ids",
        "output_token_ids",
        "response_ids",
        "response_token_ids",
    ),
}


def structure_hint(found: set[str]) -> str:
    """What a file with these columns is, where it is known and has another structure than flat rows; else ""."""
    return next((hint for columns, hint in _STRUCTURES if columns <= found), "")


def renaming_hint(found: set[str]) -> str:
    """Which columns to rename and to add for flat rows, by the names that people give them; "" when none is known."""

    def first(*names: str) -> str:
        return next((name for name in names if name in found), "")

    graded = first("reward", *_REWARDS, "label", *_LABELS)
    prompt = first("prompt", *_PROMPTS)
    completion = first("completion", *_COMPLETIONS, *(_REFERENCES if graded else ()), *(("text",) if prompt else ()))
    if not completion:
        if not prompt:
            return (
                "These look like texts: cut each into prompt and completion, and add a reward"
                if "text" in found
                else ""
            )
        return _UNSAMPLED
    renamed = {prompt: "prompt", completion: "completion"} | {first(*names): field for field, names in _IDS.items()}
    renamed |= {graded: "label" if graded in ("label", *_LABELS) else "reward"}
    parts = [f"rename {old} to {new}" for old, new in renamed.items() if old and old != new]
    below = first("input", "context") if prompt == "instruction" else ""
    if below:
        parts.insert(1, f"put {below} below it")
    if not prompt:
        parts.append("add a prompt")
    if not graded:
        parts.append(
            "add a reward: grade the responses, or give every row the reward 1.0 to imitate all of them (supervised fine-tuning)"
        )
    kind = "demonstrations" if not graded else "graded responses"
    return f"This looks like {kind}: {', '.join(parts)}"


def prompt_hint(found: Iterable[str]) -> str:
    """Which column of a file without `prompt` holds the prompts, by the names that people give it; "" when none is known."""
    named = [name for name in _PROMPTS if name in found]
    if named:
        return f"; rename {named[0]} to prompt"
    return "; take the last assistant's message off messages, and rename it to prompt" if "messages" in found else ""
