"""An evaluation: problems are answered, the answers graded and kept as they come, and at last summed up."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dqo.config.values import checked_config
from dqo.data.appending import Appended, begun_under
from dqo.data.chat import clock_at, reads_clock
from dqo.data.prompts import Prompt
from dqo.evaluation.compare import compared
from dqo.evaluation.options import EvalConfig
from dqo.evaluation.results import PROBLEMS_HASH, RESULTS, Answer, Evaluation, opened, problems_hash
from dqo.evaluation.scoring import Models, episode_of, load_models, scores
from dqo.evaluation.search import beam_search, separating_ids, step_search
from dqo.evaluation.summary import summary_of
from dqo.evaluation.tasks import read_tasks, task_ids
from dqo.files import write_whole
from dqo.grading.pool import VerifierPool
from dqo.models.generate import Request, Response, Sampling, text_of
from dqo.models.identity import check_holds_model, model_identity
from dqo.models.policy import load_config, load_policy, load_tokenizer
from dqo.sampling.backends import dtype_of, load_backend

_TIME = "time that the chat template was told"
Wanted = tuple[int, int]  # problem, sample
Answered = tuple[Wanted, Response]


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
    name = config.name or directory.resolve().name
    with opened(directory, name, config.verifier, work.binding, problems) as (evaluation, results, scored):
        with VerifierPool(config.verifier, timeout=config.verifier_timeout) as pool:
            work.keep(evaluation, results, pool)
            work.regrade()
            work.answer()
        work.score(scored)
        summary = summary_of(evaluation, config.num_generations or None)
        write_whole(directory / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False).encode())
    return evaluation, summary


class _Work:
    """The model and what it has been asked."""

    evaluation: Evaluation
    results: Appended
    pool: VerifierPool

    def __init__(self, config: EvalConfig, problems: list[Prompt], quiet: bool):
        self.config, self.problems, self.quiet = config, problems, quiet
        path = str(config.model_name_or_path)
        check_holds_model(path)
        model_config, tokenizer = load_config(path), load_tokenizer(path)
        dtype = dtype_of(config.dtype, path)
        self.binding = config.binding() | {
            "dtype": str(dtype).removeprefix("torch."),
            PROBLEMS_HASH: problems_hash(problems),
            "hash of the model": model_identity(path, model_config),
        }
        now = datetime.datetime.now().isoformat()
        if reads_clock(tokenizer):  # its prompts must come again when the evaluation goes on
            now = begun_under(Path(str(config.output_dir)) / RESULTS).get(_TIME) or now
            self.binding[_TIME] = now
        with clock_at(datetime.datetime.fromisoformat(now) if reads_clock(tokenizer) else None):
            self.prompts = task_ids(problems, tokenizer, model_config, config.max_completion_length)
        device = "cpu" if config.use_cpu or not torch.cuda.is_available() else "cuda"
        self.backend = load_backend(
            config.backend, path, dtype=config.dtype, batch_size=config.batch_size, device=device
        )
        policy = getattr(self.backend, "policy", None)
        self.models: Models | None = None
        if policy is None and (config.scorers or config.num_beams):
            policy = load_policy(path, device, dtype)
        if policy is not None:
            self.models = load_models(config, policy, tokenizer.pad_token_id)

    @property
    def policy(self) -> PreTrainedModel:
        assert self.models is not None  # what searches or scores has loaded it
        return self.models.policy

    def keep(self, evaluation: Evaluation, results: Appended, pool: VerifierPool) -> None:
        """Where answers go from now on."""
        self.evaluation, self.results, self.pool = evaluation, results, pool

    def regrade(self) -> None:
        """Grades again what another verifier has graded; nothing is sampled for that."""
        stored, size = list(self.evaluation.of_others.values()), 16 * self.config.batch_size
        for part in (stored[i : i + size] for i in range(0, len(stored), size)):
            self._store([(a.decoding, (a.problem, a.sample), _response(a), a.logprob) for a in part])

    def answer(self) -> None:
        """Every answer that is missing, decoding by decoding."""
        config = self.config
        if config.greedy:
            self._collect(
                "greedy", 1, self._drawn("greedy", Sampling(0.0, max_new_tokens=config.max_completion_length))
            )
        if config.num_generations:
            self._collect("sampling", config.num_generations, self._drawn("sampling", self._sampling))
        if config.num_beams:
            self._collect(f"beam-{config.num_beams}", 1, self._beams)
        if config.step_beams:
            for scorer in config.scorers:
                name = f"step-{config.step_beams}x{config.step_samples} {scorer}"
                self._collect(name, 1, lambda wanted, scorer=scorer: self._steps(wanted, scorer))

    @property
    def _sampling(self) -> Sampling:
        config = self.config
        return Sampling(config.temperature, config.top_k, config.top_p, config.max_completion_length, config.seed)

    def _collect(self, decoding: str, samples: int, answers: Any) -> None:
        """`answers` of those wanted that are not there, graded and stored in pieces of a batch."""
        wanted = [
            (problem, sample)
            for problem in range(len(self.problems))
            for sample in range(samples)
            if (decoding, problem, sample) not in self.evaluation.answers
        ]
        held: list[tuple[str, Wanted, Response, float | None]] = []
        for which, response, logprob in answers(wanted) if wanted else ():
            held.append((decoding, which, response, logprob))
            if len(held) >= self.config.batch_size:
                self._store(held)
                held = []
        self._store(held)

    def _store(self, found: list[tuple[str, Wanted, Response, float | None]]) -> None:
        if found:
            graded = self._graded(found)
            self.results.append([asdict(answer) for answer in graded])
            self.evaluation.add(graded)

    def _graded(self, found: list[tuple[str, Wanted, Response, float | None]]) -> list[Answer]:
        """An answer that never ended is wrong, and is not read."""
        texts = [text_of(self.backend.tokenizer, response) for _, _, response, _ in found]
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
                )
            )
        return answers

    def _drawn(self, decoding: str, sampling: Sampling) -> Any:
        def answers(wanted: list[Wanted]) -> Iterator[tuple[Wanted, Response, float]]:
            requests = [Request(self.prompts[problem], ("eval", problem, sample)) for problem, sample in wanted]
            made = self.backend.generate(requests, sampling, description=decoding, quiet=self.quiet)
            for at, response in made:
                yield wanted[at], response, sum(response.logprobs)

        return answers

    def _beams(self, wanted: list[Wanted]) -> Iterator[tuple[Wanted, Response, float]]:
        found = beam_search(
            self.policy,
            [self.prompts[problem] for problem, _ in wanted],
            width=self.config.num_beams,
            max_new_tokens=self.config.max_completion_length,
            stop_ids=self.backend.ends.stops,
            pad_id=self.backend.tokenizer.pad_token_id,
            batch_size=self.config.batch_size,
            quiet=self.quiet,
        )
        for at, best in found:
            yield wanted[at], Response(best.ids, [], best.ended), best.score

    def _steps(self, wanted: list[Wanted], scorer: str) -> Iterator[tuple[Wanted, Response, None]]:
        config, models = self.config, self.models
        assert models is not None
        separators = separating_ids(self.backend.tokenizer, config.step_separator or "\n")
        together = max(1, config.batch_size // (config.step_beams * config.step_samples))
        for begin in range(0, len(wanted), together):
            part = wanted[begin : begin + together]
            found = step_search(
                models.policy,
                [Request(self.prompts[problem], ("step", problem)) for problem, _ in part],
                lambda episodes: scores(models, [scorer], episodes)[scorer],
                self._sampling,
                beams=config.step_beams,
                samples=config.step_samples,
                separators=separators,
                stop_ids=self.backend.ends.stops,
                pad_id=models.pad_id,
                batch_size=config.batch_size,
            )
            for which, best in zip(part, found):
                yield which, Response(best.ids, [], best.ended), None

    def score(self, stored: Appended) -> None:
        """Every score of a sample that is missing."""
        if not self.config.scorers or not self.config.num_generations:
            return
        assert self.models is not None
        samples = [answer for key, answer in sorted(self.evaluation.answers.items()) if key[0] == "sampling"]
        for scorer in self.config.scorers:
            there = self.evaluation.scores.setdefault(scorer, {})
            missing = [answer for answer in samples if answer.key not in there]
            for begin in range(0, len(missing), 16 * self.config.batch_size):
                part = missing[begin : begin + 16 * self.config.batch_size]
                episodes = [
                    episode_of(self.prompts[a.problem], a.completion_ids, a.finish_reason == "stop") for a in part
                ]
                description = None if self.quiet else f"score by {scorer}"
                values = scores(self.models, [scorer], episodes, description)[scorer]
                keys = [{"decoding": a.decoding, "problem": a.problem, "sample": a.sample} for a in part]
                stored.append([key | {"scorer": scorer, "value": value} for key, value in zip(keys, values)])
                there |= {answer.key: value for answer, value in zip(part, values)}


def _response(answer: Answer) -> Response:
    return Response(answer.completion_ids, [], answer.finish_reason == "stop")
