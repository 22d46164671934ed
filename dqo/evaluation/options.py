"""The options of `dqo eval`. Imports no torch."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dqo.config.values import LEAST_TEMPERATURE
from dqo.grading.verifiers import expected_name, verifiers_help

_SCORERS = Path(__file__).parent / "scorers"
SCORER_NAMES = tuple(sorted(found.name for found in pkgutil.iter_modules([str(_SCORERS)])))
# What may differ when an evaluation goes on: it changes no stored answer. Problems and model are bound by their hashes.
FREE = {
    "output_dir",
    "tasks",
    "model_name_or_path",
    "name",
    "batch_size",
    "greedy",
    "num_generations",
    "verifier",
    "verifier_timeout",
    "compare",
}
FREE |= {"num_beams", "step_beams", "step_samples", "scorers", "use_cpu"}


@dataclass(frozen=True)
class EvalConfig:
    """Answer problems with a model and grade the answers; with --compare, test finished evaluations against each other."""

    model_name_or_path: str | None = None
    """The model to evaluate is in this directory, or has this name on the hub. An adapter is merged into its base."""
    tasks: str | None = None
    """The file of problems (.jsonl or .parquet) has prompt, a string or messages, and answer in each row."""
    verifier: Annotated[str | None, tyro.conf.arg(help=f"The verifier grades the answers. {verifiers_help()}")] = None
    output_dir: str | None = None
    """The directory where answers, grades and summary.json are written. The same command goes on with what is there."""
    name: str | None = None
    """The tables show the evaluation under this name. None takes the name of output_dir."""
    compare: tuple[str, ...] = ()
    """The directories of finished evaluations of the same problems, which are tested against each other, pair by pair. Nothing
    is answered then."""

    greedy: bool = True
    """Every problem is answered once by greedy decoding."""
    num_generations: int = 8
    """Every problem is answered this many times by sampling. 0 samples nothing."""
    temperature: float = 1.0
    """The samples are drawn at this temperature."""
    top_k: int = 0
    """The samples are drawn from this many most probable tokens. 0 takes all."""
    top_p: float = 1.0
    """The samples are drawn from the fewest tokens whose probabilities sum to this."""
    max_completion_length: int = 256
    """An answer has at most this many tokens."""
    seed: int = 0
    """The samples depend on this seed."""

    num_beams: int = 0
    """Every problem is answered by the most probable response that a beam search of this width finds. 0 searches nothing."""
    scorers: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="The samples are ranked by these scores, and the best one's accuracy is shown: likelihood is the mean "
            "log-probability of a token; implicit is the sum of beta times log-probability of the model over the reference, and "
            "implicit_min that of its lowest step; value is the value model's estimate at the last state. NAME:RUN takes the "
            "models of another training run, such as implicit:out."
        ),
    ] = ()
    step_beams: int = 0
    """A search step by step keeps this many beginnings of an answer, the best by each of the scorers. 0 searches nothing."""
    step_samples: int = 4
    """The search step by step samples this many next steps of every beginning that it keeps."""
    step_separator: str | None = None
    """A step, of the search and of the scorer implicit_min, ends with the first token that has this text in it. None takes the
    end of a line."""
    ref_model_name_or_path: str | None = None
    """The reference of the scorer implicit is in this directory, or has this name on the hub. None takes that of the training
    run that wrote the model."""
    beta: float | None = None
    """The factor of the scorer implicit, which changes no ranking. None takes that of the training run, or 1."""
    value_model: str | None = None
    """The value model of the scorer value is in this directory. None takes model_name_or_path/critic."""

    backend: Literal["transformers", "vllm"] = "transformers"
    """The greedy answer and the samples come from this program. The searches always use transformers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The weights have this type. The value auto takes the one in which they are stored."""
    batch_size: int = 64
    """This many answers are generated together."""
    verifier_timeout: float = 10.0
    """The verifier may take this many seconds for an answer, which then counts as wrong."""
    use_cpu: bool = False
    """The model runs on the CPU although there is an accelerator."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        found = []

        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                found.append((name, f"must be {expected}, got {getattr(self, name)!r}"))

        if self.compare:
            need(len(self.compare) > 1, "compare", "at least two directories")
            for name, field in self.__dataclass_fields__.items():
                given = name not in ("compare", "output_dir") and getattr(self, name) != field.default
                need(not given, name, "left out with compare, which answers nothing")
            return found
        for name in ("model_name_or_path", "tasks", "verifier", "output_dir"):
            need(getattr(self, name) is not None, name, "given (or --compare with two or more directories)")
        if self.verifier is not None and (expected := expected_name(self.verifier)):
            need(False, "verifier", expected)
        for name in ("num_generations", "top_k", "seed", "num_beams", "step_beams", "temperature"):
            need(getattr(self, name) >= 0, name, "at least 0")
        need(self.num_beams != 1, "num_beams", "0, or at least 2 (a width of 1 is the greedy answer)")
        for name in ("max_completion_length", "step_samples", "batch_size"):
            need(getattr(self, name) >= 1, name, "at least 1")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(self.temperature > 0 or self.num_generations <= 1, "temperature", "above 0 with more than one sample")
        need(not 0 < self.temperature < LEAST_TEMPERATURE, "temperature", f"0, or at least {LEAST_TEMPERATURE}")
        need(self.verifier_timeout > 0, "verifier_timeout", "positive")
        need(self.step_separator != "", "step_separator", "at least one character, or None for the end of a line")
        known = all(name in SCORER_NAMES and (path or not colon) for name, colon, path in map(_parts, self.scorers))
        need(known, "scorers", f"some of {', '.join(SCORER_NAMES)}, each alone or as NAME:RUN")
        own = {name for name, colon, _ in map(_parts, self.scorers) if not colon}
        for option, names in (
            ("ref_model_name_or_path", {"implicit", "implicit_min", "value"}),
            ("value_model", {"value"}),
        ):
            others = bool(self.scorers) and not own & names
            need(
                getattr(self, option) is None or not others,
                option,
                f"left out without the scorer {min(names)} of the model itself",
            )
        need(
            not self.step_beams or bool(self.scorers), "scorers", "given with step_beams, which keeps the best by them"
        )
        need(
            not self.scorers or self.step_beams > 0 or self.num_generations > 1,
            "num_generations",
            "above 1 with scorers",
        )
        searched = self.greedy or self.num_generations or self.num_beams or self.step_beams
        need(bool(searched), "num_generations", "above 0 where nothing else is asked for")
        return found

    def binding(self) -> dict:
        """The options that every stored answer depends on."""
        found = {name: value for name, value in vars(self).items() if name not in FREE}
        return found


def _parts(scorer: str) -> tuple[str, str, str]:
    return scorer.partition(":")
