"""The options of `dqo zpg`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dqo.grading.verifiers import expected_name, verifiers_help

# What may differ when a run goes on.
FREE = {"output_dir", "max_steps", "save_steps", "verifier_timeout", "use_cpu", "model_name_or_path", "tasks"}


@dataclass(frozen=True)
class ZPGConfig:
    """Train a policy by preferences between samples of two perturbed copies of it. A run that was killed goes on where it was."""

    model_name_or_path: str | None = None
    """The model that training begins with is in this directory, or has this name on the hub."""
    tasks: str | None = None
    """The file of problems (.jsonl or .parquet) has prompt, a string or messages, and answer in each row."""
    verifier: Annotated[str | None, tyro.conf.arg(help=f"It says which response is preferred. {verifiers_help()}")] = (
        None
    )
    output_dir: str | None = None
    """The directory where checkpoints, metrics.jsonl and at last the model are written."""

    max_steps: int = 100
    """The policy is updated this many times."""
    num_pairs: int = 256
    """A comparison of two policies samples this many pairs of responses, each pair to one prompt."""
    num_directions: int = 1
    """The estimate of the gradient is a mean over this many random directions, with a comparison each; the paper has 1."""
    mu: float = 1.0
    """A perturbation has this length, in the space of all trained parameters."""
    difference: Literal["central", "forward"] = "central"
    """The value central compares the policies on both sides of the present one; forward, as in the paper, compares one side with
    the present one."""
    learning_rate: float = 1e-3
    """The estimate of the gradient is multiplied by this and added to the parameters."""
    judges: int = 0
    """This many judges vote on each pair, for a response with the probability sigmoid(the difference of the rewards). With 0 the
    verifier itself is asked once: the greater reward is preferred, and equal ones count half."""
    logit_bound: float = 1.0
    """The mean preference of a pair is kept between sigmoid(-bound) and sigmoid(bound) before its logit is taken. 1 fits rewards
    between 0 and 1."""

    lora_r: int = 4
    """The trained parameters are those of adapters of this rank in all linear layers."""
    lora_alpha: float = 8.0
    """The adapters are multiplied by this and divided by lora_r."""
    lora_target_modules: tuple[str, ...] | None = None
    """Only linear layers of these names get an adapter."""
    parameters: tuple[str, ...] = ()
    """In place of adapters the model's own parameters are trained whose names contain one of these words, such as norm."""

    max_completion_length: int = 256
    """A response has at most this many tokens. One that does not end earns 0."""
    batch_size: int = 256
    """This many responses are generated together."""
    save_steps: int = 10
    """A checkpoint is written every so many steps; the last two stay."""
    verifier_timeout: float = 10.0
    """The verifier may take this many seconds for a response, which then earns 0."""
    seed: int = 0
    """Directions, prompts, samples and votes depend on this seed."""
    use_cpu: bool = False
    """The model runs on the CPU although there is an accelerator."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        found = []

        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                found.append((name, f"must be {expected}, got {getattr(self, name)!r}"))

        for name in ("model_name_or_path", "tasks", "verifier", "output_dir"):
            need(getattr(self, name) is not None, name, "given")
        if self.verifier is not None and (expected := expected_name(self.verifier)):
            need(False, "verifier", expected)
        for name in ("max_steps", "num_pairs", "num_directions", "lora_r", "max_completion_length", "batch_size"):
            need(getattr(self, name) >= 1, name, "at least 1")
        need(self.save_steps >= 1, "save_steps", "at least 1")
        for name in ("mu", "learning_rate", "logit_bound", "lora_alpha", "verifier_timeout"):
            need(getattr(self, name) > 0, name, "positive")
        for name in ("judges", "seed"):
            need(getattr(self, name) >= 0, name, "at least 0")
        for name in ("lora_r", "lora_alpha", "lora_target_modules") if self.parameters else ():
            default = self.__dataclass_fields__[name].default
            need(getattr(self, name) == default, name, "left out with parameters, which take the place of adapters")
        return found

    def binding(self) -> dict:
        """The options that every update depends on."""
        return {name: value for name, value in vars(self).items() if name not in FREE}
