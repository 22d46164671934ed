"""An inspection: rows are chosen, the run's models score them, and a page shows them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dqo.credit.implied import Start, implied_values, soft_return, starts
from dqo.data.episode import Episode
from dqo.data.ids import token_texts
from dqo.data.marks import Marks
from dqo.data.mixed import open_data
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.files import write_whole, writing
from dqo.inspection.page import rendered
from dqo.inspection.responses import Inspection, Response, chosen, siblings
from dqo.inspection.views import VIEWS, scale_of
from dqo.train.implied_run import fits_rewards
from dqo.train.inputs import ROW_CACHE
from dqo.train.run_rows import discounts_of, episodes_of
from dqo.train.saved import run_options
from dqo.train.token_scores import RunModels, load_run, token_scores

_SCORES = ("logprobs", "ref_logprobs", "lse", "ref_lse", "kl")


def inspect(
    run: str | Path,
    dataset_name: Any,
    *,
    responses: int = 6,
    rows: Sequence[str | int] = (),
    output_file: str | Path | None = None,
    overwrite: bool = False,
    ref_model_name_or_path: str | None = None,
    dtype: str = "float32",
    use_cpu: bool = False,
    quiet: bool = True,
) -> Inspection:
    """What a finished run says of each token of stored responses: inspect("out", "rollouts.jsonl", output_file="page.html").

    Args:
        run: a run's output_dir, a checkpoint in it, or what was exported of it.
        dataset_name: anything that training reads rows from: a file, a data set's name on the hub, a list of dicts.
        responses: how many are shown, right and wrong ones of distinct prompts. rows: lines of the file to show in their place.
        output_file: a page is written there. overwrite: whether one that exists is replaced.
        ref_model_name_or_path: the reference; None: the run's.
        quiet: without a progress bar.

    Raises:
        UserError: for a run without models or a reference, a reference with another tokenizer, rows that do not fit, and a page
            that exists or cannot be written; before any model is loaded where that can be known.
    """
    page = None if output_file is None else _page_path(Path(output_file), overwrite)
    if responses < 1:
        raise UserError(f"responses must be at least 1, got {responses}")
    options = run_options(Path(run))
    threshold, kept = options.get("reward_threshold"), _row_cache(Path(run), options)
    all_rows = open_data(dataset_name, root=kept, **({} if threshold is None else {"reward_threshold": threshold}))
    marks = Marks.of_rows(all_rows, options.get("process_reward"))
    shown = chosen(all_rows, responses, [str(line) for line in rows], marks)
    others = siblings(all_rows, shown)
    models = load_run(run, reference=ref_model_name_or_path, dtype=dtype, device="cpu" if use_cpu else None)
    found = _inspection(models, [all_rows[i] for i in shown], [all_rows[i] for i in others], marks, quiet)
    if page is not None:
        write_whole(page, rendered(found).encode())
    return found


def _row_cache(run: Path, options: dict[str, Any]) -> Path | None:
    """Where the run's training has kept checked rows; None where nothing is kept any more, or the run is another's."""
    own = options.get("row_cache_dir")
    places = [Path(own)] if own else [run / ROW_CACHE, run.parent / ROW_CACHE]  # of an output_dir, and of a checkpoint
    return next((path for path in places if path.is_dir() and os.access(path, os.W_OK)), None)


def _page_path(path: Path, overwrite: bool) -> Path:
    if path.is_dir():
        raise UserError(f"output_file {path} is a directory; name the page, such as {path / 'page.html'}")
    if path.exists() and not overwrite:
        raise UserError(f"output_file {path} exists; choose another, or replace it with --overwrite")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _inspection(models: RunModels, shown: list[Row], others: list[Row], marks: Marks, quiet: bool) -> Inspection:
    episodes = episodes_of(models, shown + others, marks)
    names = [*_SCORES, *(["values"] if models.value_model is not None else [])]
    description = None if quiet else "scoring"
    scores = token_scores(models, episodes[: len(shown)], names, description)
    scores += token_scores(models, episodes[len(shown) :], names[:2], description)
    gains = [models.beta * (s["logprobs"] - s["ref_logprobs"]) for s in scores]
    soft = [
        soft_return(gain, e.rewards, discounts_of(models, e)) if e.terminated else np.nan
        for gain, e in zip(gains, episodes)
    ]
    critic = None
    if models.value_model is not None:
        critic = [float(s["values"][0]) if "values" in s else np.nan for s in scores]
    begun = starts([e.prompt_index for e in episodes], soft, critic)
    found = [_response(models, *of_one) for of_one in zip(episodes[: len(shown)], scores, gains, begun)]
    views = [name for name in VIEWS if name in found[0].scores]
    scales = {name: scale_of(VIEWS[name], [r.scores[name] for r in found]) for name in views}
    method = str(models.options.get("method", "unknown"))
    return Inspection(str(models.directory), method, models.beta, found, scales, _notes(models, found, method))


def _response(
    models: RunModels, episode: Episode, scores: dict[str, np.ndarray], gain: np.ndarray, start: Start
) -> Response:
    tokenizer: Any = models.tokenizer
    kept = {"advantage": gain, "soft_value": models.beta * (scores["lse"] - scores["ref_lse"]), "kl": scores["kl"]}
    if "values" in scores:
        kept["value"] = scores["values"]
    discounts = discounts_of(models, episode)
    return Response(
        source=episode.source,
        prompt=tokenizer.decode(episode.prompt_ids, skip_special_tokens=True),
        label=episode.label,
        reward=episode.reward,
        texts=token_texts(tokenizer, episode.completion_ids),
        actions=episode.actions,
        scores=kept | {name: scores[name] for name in ("logprobs", "ref_logprobs")},
        rewards=episode.rewards,
        step_ends=episode.step_ends,
        first_wrong_step=episode.first_wrong_step,
        labelled=bool(episode.step_rewards),
        implied=implied_values(gain, episode.rewards, start.value, discounts) if (discounts > 0).all() else None,
        start=start,
        terminated=episode.terminated,
    )


def _notes(models: RunModels, responses: list[Response], method: str) -> list[str]:
    notes = []
    if models.options.get("beta") is None:
        who = f"Method {method} has no beta" if models.options else f"{models.directory} does not tell the run's beta"
        notes.append(f"{who}: the advantage is log(pi/ref), with a factor of 1.")
    elif not fits_rewards(method):
        notes.append(
            f"Method {method} fits comparisons or labels, not rewards: its implied values and what remains of them are on no "
            "scale of rewards."
        )
    if models.value_model is None:
        notes.append("The run has no value model.")
    without = sum(not r.step_ends for r in responses)
    if without:
        which = "the rows have" if without == len(responses) else f"{without} of {len(responses)} rows have"
        notes.append(f"There are no sums of steps where {which} no steps: dqo score --steps lines writes them.")
    if any(r.step_ends and not r.labelled for r in responses):
        notes.append("Where steps have no labels (step_rewards), which one is wrong is not known.")
    return notes
