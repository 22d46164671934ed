"""The options of `dqo score`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from dqo.config.values import LEAST_TEMPERATURE
from dqo.grading.pool import MEMORY, TIMEOUT
from dqo.grading.verifiers import expected_name, verifiers_help
from dqo.scoring.steps import SPLITTERS

KINDS = ("implicit", "value", "likelihood")  # of `by`


@dataclass(frozen=True)
class _Graded:
    data: Positional[str]
    """The responses are in this rollout file (.jsonl or .parquet), saved data set, or data set on the Hugging Face hub."""
    verifier: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"The verifier grades the responses. {verifiers_help()} None, with by alone, leaves their rewards as they are."
        ),
    ] = None
    output_file: str | None = None
    """The scored rows are written to this file (.jsonl). A run that was killed goes on there."""
    answers: str | None = None
    """The answers are in this file, for rows that have none. Its rows have answer, and prompt_id or prompt."""
    processes: int | None = None
    """The responses are graded by this many processes. None takes one for each core."""
    timeout: float = TIMEOUT
    """A response whose grading takes more than this many seconds counts as wrong."""
    memory_gb: float = MEMORY / 2**30
    """Grading may take this much memory in each process, beside what the verifier has when it is loaded."""
    existing_rewards: Literal["refuse", "keep", "replace"] = "refuse"
    """What becomes of rewards that the rows have already: refuse ends with an error, keep grades only rows without one, replace
    grades all."""
    truncated: Literal["wrong", "grade"] = "wrong"
    """What becomes of responses whose finish_reason is length: wrong gives them 0, grade lets the verifier decide."""
    steps: str | None = None
    """The responses are cut into these steps: lines, sentences, or python:module:function, a function of your own, which gets a
    response and returns its pieces in order. None keeps the steps that the rows have."""


@dataclass(frozen=True)
class _Told:
    by: str | None = None
    """A model rewards the steps: implicit:RUN sums beta times log-probability over the reference's, by the policy that a run
    trained; value:RUN takes what the run's value model says after a step, over what it said before; likelihood:MODEL sums
    log-probabilities. They become step_rewards."""
    by_as: Literal["sums", "potentials"] = "sums"
    """What step_rewards are made of them: sums pays each step its own, potentials adds up all steps so far, and writes
    prompt_value, for `dqo train --process_reward potential`."""
    ref_model_name_or_path: str | None = None
    """The reference of implicit:RUN is in this directory, or has this name on the hub. None takes that of the run."""


@dataclass(frozen=True)
class _Measured:
    prefix_values: int | None = None
    """The pass rates of prefixes are measured by this many continuations of each: of the prompt, and of the end of each step that
    is not the last. They become step_rewards and prompt_value, for `dqo train --process_reward potential`."""
    share: float = 1.0
    """The steps of this share of the rows are measured. The other rows get the values of prefixes that they share with those."""
    prefix_cache: str | None = None
    """The pass rates are kept in this file (.jsonl), from which later runs take them. None takes output_file.prefixes.jsonl."""
    model_name_or_path: str | None = None
    """The model that continues prefixes is in this directory, or has this name on the hub."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """This package generates the continuations. vllm needs the extra of its name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The weights of the models that continue prefixes, or reward the steps, have this type. auto takes the one in which they are
    stored."""
    batch_size: int | None = None
    """This many continuations are generated at once. None takes 64, and 4096 for vllm."""
    temperature: float = 1.0
    """The logits of continuations are divided by this. Pass rates are those of the policy that is trained at 1."""
    top_k: int = 0
    """Continuations are drawn from this many most likely tokens. 0 leaves the distribution whole."""
    top_p: float = 1.0
    """Continuations are drawn from the most likely tokens that have this probability together. 1 leaves it whole."""
    max_completion_length: int = 256
    """A prefix and its continuation have at most this many tokens, the prompt not counted. One that does not end by then has not
    passed."""
    seed: int = 0
    """Continuations, and the rows of a share, depend on this seed."""


@dataclass(frozen=True)
class ScoreConfig(_Measured, _Told, _Graded):
    """Grade stored responses: outcome rewards, steps, and rewards of steps by a model or by measured pass rates of prefixes."""

    @property
    def told_by(self) -> tuple[str, str]:
        """Kind and path of `by`."""
        kind, _, path = str(self.by).partition(":")
        return kind, path

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        found = []

        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                found.append((name, f"must be {expected}, got {getattr(self, name)}"))

        if self.verifier is None and self.by is None:
            found.append(
                ("verifier", "is missing: what grades the responses; or give by, a model that rewards their steps")
            )
        if self.output_file is None:
            found.append(("output_file", "is missing: the file of rows to write, .jsonl"))
        expected = expected_name(self.verifier) if self.verifier is not None else None
        need(expected is None, "verifier", expected or "")
        need(self.processes is None or self.processes >= 1, "processes", "at least 1")
        need(self.timeout > 0, "timeout", "positive")
        need(self.memory_gb > 0, "memory_gb", "positive")
        own = self.steps is None or self.steps in SPLITTERS or self.steps.startswith("python:")
        need(own, "steps", f"one of {', '.join(SPLITTERS)}, or python:module:function")
        need(self.prefix_values is None or self.prefix_values >= 1, "prefix_values", "at least 1")
        need(0 < self.share <= 1, "share", "in (0, 1]")
        of_distribution = f"at least {LEAST_TEMPERATURE}: pass rates are those of a distribution"
        need(self.temperature >= LEAST_TEMPERATURE, "temperature", of_distribution)
        need(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(self.batch_size is None or self.batch_size >= 1, "batch_size", "at least 1")
        for name, least in (("max_completion_length", 1), ("top_k", 0), ("seed", 0)):
            need(getattr(self, name) >= least, name, f"at least {least}")
        fields = self.__dataclass_fields__

        def need_absent(name: str, why: str) -> None:
            need(getattr(self, name) == fields[name].default, name, f"left out {why}")

        if self.verifier is None:
            for name in ("processes", "timeout", "memory_gb", "truncated", "prefix_values"):
                need_absent(name, "without verifier, for which it is")
        if self.by is None:
            for name in ("by_as", "ref_model_name_or_path"):
                need_absent(name, "without by, for which it is")
        else:
            kind, path = self.told_by
            need(kind in KINDS and bool(path), "by", "implicit:RUN, value:RUN or likelihood:MODEL")
            need_absent("prefix_values", "with by: both write step_rewards")
            if kind != "implicit":
                need_absent("ref_model_name_or_path", "but for implicit:RUN, which alone has a reference")
        if self.prefix_values is None:
            for name in _Measured.__dataclass_fields__:
                if name != "dtype" or self.by is None:
                    need_absent(name, "without prefix_values, for which it is")
        else:
            need(
                self.model_name_or_path is not None,
                "model_name_or_path",
                "given with prefix_values: it continues the prefixes",
            )
        return found
