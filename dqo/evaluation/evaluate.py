"""An evaluation: problems are answered, the answers graded and kept as they come, and at last summed up."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dqo.config.values import checked_config
from dqo.data.appending import Appended, begun_under
from dqo.data.chat import clock_at, reads_clock
from dqo.data.episode import Episode
from dqo.data.prompts import Prompt
from dqo.evaluation.compare import compared
from dqo.evaluation.options import EvalConfig
from dqo.evaluation.results import PROBLEMS_HASH, RESULTS, Answer, Evaluation, opened, problems_hash
from dqo.evaluation.scoring import Models, episode_of, load_scorers, scorer_of, scores, stored_name
from dqo.evaluation.search import beam_search, separating_ids, step_search
from dqo.evaluation.summary import summary_of
from dqo.evaluation.tasks import read_tasks, task_ids
from dqo.files import write_whole
from dqo.grading.pool import VerifierPool
from dqo.grading.verifiers import source_of
from dqo.models.generate import Request, Response, Sampling, text_of
from dqo.models.identity import check_holds_model, model_identity
from dqo.models.named import load_config, load_tokenizer
from dqo.models.policy import load_policy
from dqo.sampling.backends import Backend, dtype_of, load_backend

_TIME = "time that the chat template was told"
Wanted = tuple[int, int]  # problem, sample
Answered = tuple[Wanted, Response, float | None]  # with its log-probability


def evaluate(quiet: bool = False, **options: Any) -> dict[str, Any]:
    """Answers problems with a model and grades the answers, as `dqo eval` does: evaluate(model_name_or_path="DIR",
    tasks="problems.jsonl", verifier="gsm8k", output_dir="eval/base"). A call that was killed goes on where it was. It is not
    called eval, which is Python's own.

    Args:
        quiet: without progress bars.
        options: those of `dqo.evaluation.options.EvalConfig`; with compare=[DIRECTORY, ...] the paired tests of evaluations.

    Returns:
        What summary.json holds, see `dqo.evaluation.summary.summary_of`; of compare `dqo.evaluation.compare.compare`'s tests.

    Raises:
        UserError: for options, problems or a model that do not fit, before any work.
    """
    config = checked_config(EvalConfig, options)
    return compared(config) if config.compare else evaluated(config, quiet)[1]


def evaluated(config: EvalConfig, quiet: bool = False) -> tuple[Evaluation, dict[str, Any]]:
    """Answers what `config.output_dir` does not hold yet.

    Returns:
        (all answers, their summary), which are on the disk as well: see `dqo.evaluation.results` and `summary.summary_of`.

    Raises:
        UserError: for problems, options, a model or a directory that do not fit, before anything is answered.
    """
    assert config.tasks and config.verifier and config.output_dir and config.model_name_or_path  # or it is refused
    problems = read_tasks(config.tasks, config.verifier)
    work = _Work(config, problems, quiet)
    directory = Path(config.output_dir)
    header: dict[str, str | None] = {"name": config.name or directory.resolve().name, "verifier": config.verifier}
    header |= {"verifier_source": source_of(config.verifier), "model": config.model_name_or_path}
    with opened(directory, header, work.binding, problems) as (evaluation, results, scored):
        work.begin(evaluation)
        with VerifierPool(config.verifier, timeout=config.verifier_timeout) as pool:
            work.keep(results, pool)
            work.regrade()
            work.answer()
        work.score(scored)
        summary = summary_of(evaluation, config.num_generations or None)
        write_whole(directory / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False).encode())
    return evaluation, summary


class _Work:
    """What has been asked, what is missing of it, and the models that answer."""

    evaluation: Evaluation
    results: Appended
    pool: VerifierPool
    backend: Backend
    policy: PreTrainedModel
    models: dict[str, Models] | None = None  # of each scorer; None: nothing has to be searched or scored

    def __init__(self, config: EvalConfig, problems: list[Prompt], quiet: bool):
        self.config, self.problems, self.quiet = config, problems, quiet
        path = self.path = str(config.model_name_or_path)
        check_holds_model(path)
        model_config, self.tokenizer = load_config(path), load_tokenizer(path)
        self.dtype = dtype_of(config.dtype, path)
        self.scorers = {stored_name(scorer): scorer for scorer in config.scorers}
        self.binding = config.binding() | {
            "dtype": str(self.dtype).removeprefix("torch."),
            PROBLEMS_HASH: problems_hash(problems),
            "hash of the model": model_identity(path, model_config),
        }
        now = datetime.datetime.now().isoformat()
        if reads_clock(self.tokenizer):  # its prompts must come again when the evaluation goes on
            now = begun_under(Path(str(config.output_dir)) / RESULTS).get(_TIME) or now
            self.binding[_TIME] = now
        with clock_at(datetime.datetime.fromisoformat(now) if reads_clock(self.tokenizer) else None):
            self.prompts = task_ids(problems, self.tokenizer, model_config, config.max_completion_length)

    def begin(self, evaluation: Evaluation) -> None:
        """Finds what is missing. Only then the model is loaded, with what the scorers need, before anything is answered."""
        self.evaluation, config = evaluation, self.config
        there = evaluation.answers.keys() | evaluation.of_others.keys()
        self.wanted = {
            decoding: [
                (problem, sample)
                for problem in range(len(self.problems))
                for sample in range(samples)
                if (decoding, problem, sample) not in there
            ]
            for decoding, samples in self._decodings().items()
        }
        # of those that are there; others are wanted
        samples = [key for key in there if key[0] == "sampling"] if config.num_generations else []
        unscored = any(key not in evaluation.scores.get(scorer, ()) for scorer in self.scorers for key in samples)
        if not any(self.wanted.values()) and not unscored:
            return
        device = "cpu" if config.use_cpu or not torch.cuda.is_available() else "cuda"
        self.backend = load_backend(
            config.backend, self.path, dtype=config.dtype, batch_size=config.batch_size, device=device
        )
        policy = getattr(self.backend, "policy", None)
        if policy is None and (config.scorers or config.num_beams):
            policy = load_policy(self.path, device, self.dtype)
        if policy is not None:
            self.policy = policy
            self.models = load_scorers(config, policy, self.tokenizer, self._separators())

    def _separators(self) -> frozenset[int]:
        """The tokens that end a step, where something reads them."""
        kinds = [scorer_of(scorer.partition(":")[0]) for scorer in self.config.scorers]
        if not self.config.step_beams and not any("separators" in kind.NEEDS for kind in kinds):
            return frozenset()
        return separating_ids(self.tokenizer, self.config.step_separator or "\n")

    def _decodings(self) -> dict[str, int]:
        """{decoding: answers a problem} of what the options ask for."""
        config = self.config
        found = {"greedy": 1} if config.greedy else {}
        found |= {"sampling": config.num_generations} if config.num_generations else {}
        found |= {f"beam-{config.num_beams}": 1} if config.num_beams else {}
        return found | {self._step_search(scorer): 1 for scorer in self.scorers if config.step_beams}

    def _step_search(self, scorer: str) -> str:
        return f"step-{self.config.step_beams}x{self.config.step_samples} {scorer}"

    def keep(self, results: Appended, pool: VerifierPool) -> None:
        """Where answers go from now on."""
        self.results, self.pool = results, pool

    def regrade(self) -> None:
        """Grades again what another verifier has graded, or this one before its file was changed; nothing is sampled for that."""
        stored, size = list(self.evaluation.of_others.values()), 16 * self.config.batch_size
        for part in (stored[i : i + size] for i in range(0, len(stored), size)):
            self._store([(a.decoding, (a.problem, a.sample), _response(a), a.logprob) for a in part])

    def answer(self) -> None:
        """Every answer that is missing, decoding by decoding, graded and stored in pieces of a batch."""
        ways: dict[str, Callable[[list[Wanted]], Iterator[Answered]]] = {
            self._step_search(scorer): partial(self._steps, scorer=scorer) for scorer in self.scorers
        }
        greedy = Sampling(0.0, max_new_tokens=self.config.max_completion_length)
        ways |= {"greedy": partial(self._drawn, sampling=greedy, description="greedy")}
        ways |= {"sampling": partial(self._drawn, sampling=self._sampling, description="sampling")}
        ways |= {f"beam-{self.config.num_beams}": self._beams}
        for decoding, wanted in self.wanted.items():
            held: list[tuple[str, Wanted, Response, float | None]] = []
            for which, response, logprob in ways[decoding](wanted) if wanted else ():
                held.append((decoding, which, response, logprob))
                if len(held) >= self.config.batch_size:
                    self._store(held)
                    held = []
            self._store(held)

    @property
    def _sampling(self) -> Sampling:
        config = self.config
        return Sampling(config.temperature, config.top_k, config.top_p, config.max_completion_length, config.seed)

    def _store(self, found: list[tuple[str, Wanted, Response, float | None]]) -> None:
        if found:
            graded = self._graded(found)
            self.results.append([asdict(answer) for answer in graded])
            self.evaluation.add(graded)

    def _graded(self, found: list[tuple[str, Wanted, Response, float | None]]) -> list[Answer]:
        """An answer that never ended is wrong, and is not read."""
        texts = [text_of(self.tokenizer, response) for _, _, response, _ in found]
        ended = [at for at, (_, _, response, _) in enumerate(found) if response.ended]
        told = [asdict(self.problems[found[at][1][0]]) for at in ended]
        grades = dict(zip(ended, self.pool.grade([texts[at] for at in ended], told)))
        answers = []
        for at, (decoding, (problem, sample), response, logprob) in enumerate(found):
            grade = grades.get(at)
            answers.append(
                Answer(
                    decoding=decoding,
                    problem=problem,
                    sample=sample,
                    response=texts[at],
                    completion_ids=response.ids,
                    finish_reason="stop" if response.ended else "length",
                    logprob=logprob,
                    verifier=str(self.config.verifier),
                    score=grade.score if grade else 0.0,
                    parsed=bool(grade and grade.parsed),
                    answer=grade.answer if grade else None,
                    error=grade.error if grade else None,
                    verifier_source=self.evaluation.verifier_source,
                )
            )
        return answers

    def _drawn(self, wanted: list[Wanted], sampling: Sampling, description: str) -> Iterator[Answered]:
        requests = [Request(self.prompts[problem], ("eval", problem, sample)) for problem, sample in wanted]
        for at, response in self.backend.generate(requests, sampling, description=description, quiet=self.quiet):
            yield wanted[at], response, sum(response.logprobs)

    def _beams(self, wanted: list[Wanted]) -> Iterator[Answered]:
        found = beam_search(
            self.policy,
            [self.prompts[problem] for problem, _ in wanted],
            width=self.config.num_beams,
            max_new_tokens=self.config.max_completion_length,
            stop_ids=self.backend.ends.stops,
            pad_id=self.tokenizer.pad_token_id,
            batch_size=self.config.batch_size,
            quiet=self.quiet,
        )
        for at, best in found:
            yield wanted[at], Response(best.ids, [], best.ended), best.score

    def _steps(self, wanted: list[Wanted], scorer: str) -> Iterator[Answered]:
        config, separators = self.config, self._separators()
        together = max(1, config.batch_size // (config.step_beams * config.step_samples))
        for begin in range(0, len(wanted), together):
            part = wanted[begin : begin + together]
            found = step_search(
                self.policy,
                [Request(self.prompts[problem], ("step", problem)) for problem, _ in part],
                partial(self._scores, scorer),
                self._sampling,
                beams=config.step_beams,
                samples=config.step_samples,
                separators=separators,
                stop_ids=self.backend.ends.stops,
                pad_id=self.tokenizer.pad_token_id,
                batch_size=config.batch_size,
            )
            for which, best in zip(part, found):
                yield which, Response(best.ids, [], best.ended), None

    def score(self, stored: Appended) -> None:
        """Every score of a sample that is missing."""
        if self.models is None or not self.config.num_generations:  # nothing is missing
            return
        samples = [answer for key, answer in sorted(self.evaluation.answers.items()) if key[0] == "sampling"]
        for scorer in self.scorers:
            there = self.evaluation.scores.setdefault(scorer, {})
            missing = [answer for answer in samples if answer.key not in there]
            for begin in range(0, len(missing), 16 * self.config.batch_size):
                part = missing[begin : begin + 16 * self.config.batch_size]
                episodes = [
                    episode_of(self.prompts[a.problem], a.completion_ids, a.finish_reason == "stop") for a in part
                ]
                description = None if self.quiet else f"score by {scorer}"
                values = self._scores(scorer, episodes, description)
                keys = [{"decoding": a.decoding, "problem": a.problem, "sample": a.sample} for a in part]
                stored.append([key | {"scorer": scorer, "value": value} for key, value in zip(keys, values)])
                there |= {answer.key: value for answer, value in zip(part, values)}

    def _scores(self, scorer: str, episodes: list[Episode], description: str | None = None) -> list[float]:
        """Of episodes by a scorer, under its name in the files."""
        assert self.models is not None  # what searches or scores has loaded them
        given = self.scorers[scorer]
        name = given.partition(":")[0]
        return scores(self.models[given], [name], episodes, description)[name]


def _response(answer: Answer) -> Response:
    return Response(answer.completion_ids, [], answer.finish_reason == "stop")
