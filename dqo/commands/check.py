"""Rollout files, looked at before training: the same checks, what the rows hold, and what a model's tokenizer makes of them."""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional

from dqo.commands.check_view import view
from dqo.config.flags import parse_flags
from dqo.config.rows import RowOptions
from dqo.credit.steps import marked
from dqo.data.advice import row_warnings
from dqo.data.behavior import ReferenceName, known_behavior, reference_samples, weight_level, weights_line
from dqo.data.episodes import Episodes, open_episodes
from dqo.data.marks import Marks
from dqo.data.mixed import names_of, open_data, sources_of, weights_of
from dqo.data.rows import Row
from dqo.data.stored import FINISHES, OPTIONAL, StoredRows, column, paid_by_turns, process_rewards, several
from dqo.data.table import token_table
from dqo.data.together import check_process_reward, duplicate_count
from dqo.errors import UserError, printable
from dqo.objectives.base import Objective
from dqo.objectives.registry import DEFAULT_METHOD, objective_class

PLACE = 4
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class _Checked:
    data: Positional[tuple[str, ...]]
    """The rollout files, folders of saved data sets, or names on the Hugging Face hub to check. Several that one training reads
    together stand in one argument, as for dataset_name."""
    model_name_or_path: str | None = None
    """The tokenizer of this model places the rows on tokens. None checks the rows alone."""
    rows: int = 3
    """This many rows, from all over the file, are shown on their tokens."""


@dataclass(frozen=True)
class CheckConfig(RowOptions, _Checked):
    """Check rollout files and show what training will see of them; exits with 2 when they do not fit.

    Options mean what they mean in `dqo train`. Without a model the rows alone are checked."""

    gamma: float = 1.0
    """The discount of the method, which the differences of potentials depend on."""
    discount: Literal["tokens", "turns"] = "tokens"
    """Where gamma acts: at each token that the model wrote, or at the last of each turn alone."""
    method: str | None = None
    """The warnings are of what this method makes of the rows, and with a model it is told what the method finds to train on or
    lacks, as its defaults are. None warns of what any method may."""
    beta: float | None = None
    """The KL temperature of the method. None takes the method's default."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        found = [
            (name, f"must be at least {least}, got {getattr(self, name)}")
            for name, least in (("rows", 0), ("max_length", 1))
            if getattr(self, name) < least
        ]
        if self.beta is not None and self.beta <= 0:
            found.append(("beta", f"must be positive, got {self.beta}"))
        return found if 0 <= self.gamma <= 1 else [*found, ("gamma", f"must be in [0, 1], got {self.gamma}")]


def check_command(arguments: list[str], prog: str = "dqo check") -> None:
    """Check rollout files and show what training will see of them."""
    check(parse_flags(CheckConfig, arguments, prog))


def check(config: CheckConfig) -> None:
    """Prints what the files hold.

    Raises:
        UserError: what training would raise for the first file that does not fit.
    """
    if not config.data:
        raise UserError("no file to check; give one or more: dqo check rollouts.jsonl")
    objective = _objective(config)
    prompts: dict[str, np.ndarray] = {}
    root = None if config.row_cache_dir is None else Path(config.row_cache_dir)
    for path in config.data:
        rows = open_data(path, skip_bad_rows=config.skip_bad_rows, reward_threshold=config.reward_threshold, root=root)
        _table(path, summary(rows, config.process_reward))
        if config.model_name_or_path is None:
            _sources(rows)
        if line := _weights_line(rows, config, objective or objective_class(DEFAULT_METHOD)()):
            print(printable(line))
        _warn(row_warnings(rows, config, objective))
        if config.process_reward is None and (column(rows, "paid") >= 0).any():
            _warn(
                [
                    "there are step_rewards or turn_rewards: training wants to know what they do, --process_reward additive, "
                    "potential or none"
                ]
            )
        else:
            check_process_reward(rows, path, config.process_reward)
        if config.model_name_or_path is not None:
            _on_tokens(rows, config, config.model_name_or_path, objective)
        own = np.unique(column(rows, "prompt"))
        for other, keys in prompts.items():
            shared = int(np.isin(own, keys).sum())
            _warn(
                [f"{shared:,} prompts are in {other} too: training refuses held-out rows of its own prompts"]
                * bool(shared)
            )
        prompts[path] = own


def _weights_line(rows: Sequence[Row], config: CheckConfig, objective: Objective) -> str:
    """What training will say of the importance weights; "" for a method without them, and where only the model can tell."""
    path = config.model_name_or_path
    if objective.weight_level == "none" or (path is None and not _present(rows, "logprobs").all()):
        return ""
    option, behavior = objective.weight_level, known_behavior(rows, _reference(path))
    return weights_line(option, weight_level(option, behavior), behavior)


def _reference(path: str | None) -> ReferenceName:
    def identity() -> str:
        from dqo.models.identity import model_identity  # transformers from here on
        from dqo.models.named import load_config

        return model_identity(str(path), load_config(str(path)))

    return ReferenceName(path, identity)


def _objective(config: CheckConfig) -> Objective | None:
    if config.method is None:
        if config.beta is not None:
            raise UserError("--beta is an option of a method; give --method too")
        return None
    made = objective_class(config.method)
    if config.beta is None:
        return made()
    if "beta" not in {f.name for f in dataclasses.fields(made)}:
        raise UserError(f"method {config.method} has no beta; remove --beta")
    objective = made(**{"beta": config.beta})
    for name, what in objective.problems():
        raise UserError(f"{name} {what}")
    return objective


def summary(rows: Sequence[Row], process_reward: str | None = None) -> dict[str, str]:
    """What rows hold, without a tokenizer; name -> text. `process_reward`: the option."""
    count, right = len(rows), int(column(rows, "label").sum())
    prompts, mixed = several(column(rows, "prompt"), column(rows, "reward"))
    ends = Counter(column(rows, "finish_reason").tolist())
    found = {
        "rows": f"{count:,} of {prompts:,} prompts",
        "correct": f"{right / count:.1%} ({right:,})",
        "rewards": _mix(column(rows, "reward")),
        "mixed prompts": f"{mixed:,} of {prompts:,} have responses with different rewards",
        "finish_reason": ", ".join(f"{FINISHES[end] or 'not given'} {n:,}" for end, n in ends.most_common()),
        "duplicates": f"{duplicate_count(rows):,}",
    }
    turns = column(rows, "turns")
    if turns.max() > 1:
        found["turns"] = f"{_range(turns)} a row, in {(turns > 1).sum():,} rows several"
    rewards, of_turns = process_rewards(rows), paid_by_turns(rows)
    if of_turns.any():
        found["turn rewards"] = f"{_mix(rewards[of_turns])}; mean {statistics.fmean(rewards[of_turns]):.3g}"
    steps = column(rows, "steps")
    if (steps >= 0).any():
        found["steps"] = f"{_range(steps[steps >= 0])} a row, in {(steps >= 0).sum():,} rows"
        if not of_turns.all():
            found["step rewards"] = f"{_mix(rewards[~of_turns])}; mean {statistics.fmean(rewards[~of_turns]):.3g}"
            marks = Marks.of_rows(rows, process_reward)
            row_of = np.repeat(np.arange(count), np.maximum(column(rows, "paid"), 0))
            wrong = len(np.unique(row_of[~of_turns][marked(rewards[~of_turns], marks.steps)]))
            how = {"negative": "by a reward below 0", "zero": "by a reward of 0", "none": "by no reward"}[marks.steps]
            found["wrong steps"] = f"marked {how}, in {wrong:,} rows"
    present = {name: int(_present(rows, name).sum()) for name in OPTIONAL}
    found["other fields"] = ", ".join(f"{name} {count:,}" for name, count in present.items() if count) or "none"
    return found


def _sources(rows: Sequence[Row], tokens: np.ndarray | None = None) -> None:
    """Of several data sets: rows, tokens and share of each."""
    names, weights = names_of(rows), weights_of(rows)
    if not names:
        return
    counts = np.bincount(sources_of(rows), minlength=len(names))
    found = {}
    for k, (name, count) in enumerate(zip(names, counts.tolist())):
        share = count / len(rows) if weights is None else weights[k]
        times = "" if weights is None else f", each read {share * len(rows) / count:.3g} times an epoch"
        size = f"{count:,} rows" + ("" if tokens is None else f" with {int(tokens[k]):,} tokens")
        found[name] = f"{share:.1%} of a run; {size}{times}"
    _table("data sets", found)


def _present(rows: Sequence[Row], name: str) -> np.ndarray:
    """bool (n,): whether rows have one of the optional fields."""
    return (column(rows, "present") >> OPTIONAL.index(name) & 1).astype(bool)


def _on_tokens(rows: StoredRows, config: CheckConfig, model: str, objective: Objective | None) -> None:
    from dqo.data.ends import ends_of
    from dqo.data.selection import EpisodeColumns
    from dqo.models.limits import check_positions, check_tokenizer  # torch from here on, and no class of models
    from dqo.models.named import load_config, load_tokenizer, stop_ids

    tokenizer, model_config = load_tokenizer(model), load_config(model)
    check_tokenizer(tokenizer, rows, model_config)
    stops = stop_ids(model)
    ends = ends_of(tokenizer, stops, messages=not isinstance(rows[0].prompt, str))

    vocab_size = model_config.get_text_config().vocab_size
    table = token_table(rows, tokenizer, ends, vocab_size)

    def made(max_length: int) -> Episodes:
        return open_episodes(
            rows,
            tokenizer,
            table=table,
            vocab_size=vocab_size,
            max_length=max_length,
            stop_ids=stops,
            skip_bad_rows=config.skip_bad_rows,
            process_reward=config.process_reward or "none",
            process_coef=config.process_coef,
            gamma=config.gamma,
            discount=config.discount,
            truncation=config.truncation,
            allow_truncation=config.allow_truncation,
            reward_scale=config.reward_scale,
            reward_shift=config.reward_shift,
        )

    episodes = made(sys.maxsize)
    columns = EpisodeColumns(episodes)
    lengths, responses = columns.tokens, columns.tokens - columns.prompt_length
    written = int(responses.sum())
    masked = written - int(columns.length.sum())
    environment = {"environment": f"{masked:,} of {written:,} tokens of responses are no actions"} if masked else {}
    over = int((lengths > config.max_length).sum())
    _table(
        f"tokens of {model}",
        {
            "prompts": _range(columns.prompt_length),
            "responses": _range(responses),
            **environment,
            "together": f"{_range(lengths)}; {int(lengths.sum()):,} in all",
            "end": _ends_text(tokenizer, ends),
            "over max_length": f"{over / len(lengths):.1%} ({over:,}) have more than {config.max_length:,}",
        },
    )
    _sources(rows, np.bincount(sources_of(rows)[episodes.places], lengths, len(names_of(rows))))
    print(histogram(lengths.tolist()))
    if tokenizer.chat_template is not None and isinstance(rows[0].prompt, str):
        _warn(
            [
                "the tokenizer has a chat template, and the prompts are strings: they are used as they are, without it. For a "
                "chat model give messages (dqo convert --messages)"
            ]
        )
    if over:  # refused, or cut
        episodes = made(config.max_length)
    check_positions(model_config, episodes)
    if objective is not None:
        _for_method(objective, config, episodes, partial(reference_samples, rows, _reference(model)))
    shown = sorted({round(i) for i in np.linspace(0, len(episodes) - 1, min(config.rows, len(episodes)))})
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for i in shown:
        print(f"\n{view(episodes[i], tokenizer, colour)}")


def _for_method(
    objective: Objective, config: CheckConfig, episodes: Episodes, of_reference: Callable[[], Collection[str]]
) -> None:
    """What the method, with the defaults of its options, finds to train on; else a warning of what it lacks."""
    from dqo.data.selection import called, nothing_selected, selected
    from dqo.train.order import order_of

    method, wanted = config.method, objective.wants_process_reward
    if wanted not in (None, config.process_reward):
        _warn(
            [f"method {method} reads step rewards in the sense of --process_reward {wanted}: training wants it given"]
        )
    _warn([f"method {method} reads another model: training wants --{name}" for name in objective.reads_models])
    try:
        groups = selected(objective, episodes, of_reference)
        shares = order_of(groups, 1, 0).told(called(objective)) if groups else []
    except UserError as error:
        _warn([f"method {method}, as its defaults are: {error}"])
        return
    if not groups:
        _warn([f"method {method}: {nothing_selected(objective, episodes)}"])
        return
    print(f"{'trained on':>20}  {len(groups):,} {called(objective)}, as the defaults of {printable(str(method))} are")
    for line in shares:
        print(f"{'':>20}  {printable(line)}")


def _ends_text(tokenizer, ends: Any) -> str:
    def named(token: int) -> str:
        return f"{tokenizer.convert_ids_to_tokens(token)} ({token})"

    others = ", ".join(named(token) for token in sorted(ends.stops - {ends.trained}))
    return f"{named(ends.trained)} is trained" + (f"; {others} ends a response too" if others else "")


def histogram(lengths: list[int], bins: int = 10) -> str:
    """Bars of counts in ranges of equal width, the last one with the longest."""
    width = max(1, -(-max(lengths) // bins))
    counts = Counter((length - 1) // width for length in lengths)
    lines = []
    for i in range(max(counts) + 1):
        bar = "#" * -(-_BAR * counts[i] // max(counts.values()))
        lines.append(f"{f'{i * width + 1:,}-{(i + 1) * width:,}':>20}  {bar} {counts[i]:,}".rstrip())
    return "\n".join(lines)


def _mix(values: np.ndarray) -> str:
    """Each value with its count, or the range when there are many."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 6:
        return ", ".join(f"{value:g} x {count:,}" for value, count in zip(distinct.tolist(), counts.tolist()))
    return f"{len(distinct):,} values, {_range(values)}"


def _range(values: np.ndarray) -> str:
    least, most, median = float(values.min()), float(values.max()), float(np.median(values))
    return f"{least:,g}" if least == most else f"{least:,g} to {most:,g} (median {median:,g})"


def _table(title: str, rows: dict[str, str]) -> None:
    print(f"{printable(title)}:")
    for name, text in rows.items():
        print(f"{printable(name):>20}  {printable(text)}")


def _warn(messages: list[str]) -> None:
    for message in messages:
        print(f"{'warning':>20}  {printable(message)}")
