"""The options of a value model: an objective that fits one is a subclass of `ValueOptions`.

@dataclass(frozen=True)
class Mine(ValueOptions):                    the value model's options come before its own
class Mine(ValueOptions, OptionsBefore):     behind those of OptionsBefore, a frozen dataclass of fields, before its own
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dqo.objectives.base import IMPLICIT_BETA, Objective


@dataclass(frozen=True)
class ValueOptions(Objective):
    value_coef: float = 1.0
    """The value loss is multiplied by this factor."""
    value_loss: Literal["squared", "bce", "hl_gauss"] = "squared"
    """What fits the value model to returns: "squared" error, or a cross-entropy. "bce" is that of the probability of the greatest
    return against the least of the training data, "hl_gauss" that of a distribution over bins between the two."""
    value_model: str = "separate"
    """ "separate" trains a model of its own, from the policy's trunk and a zero head. "head" trains an MLP on the policy's
    hidden states. "implicit" trains a copy of the policy whose log-ratio to the reference is the logit of success. "none", where
    a method can do without one, takes soft values from the logsumexp. implied:RUN takes the values that the policy of a finished
    run implies, and trains nothing. The directory of a run, of its critic/ or of a model with one label begins from the value
    model there."""
    implicit_beta: float = IMPLICIT_BETA
    """The log-ratio of an implicit value model is multiplied by this."""

    value_kinds: ClassVar[tuple[str, ...]] = ("separate", "head", "implicit")
    """The words that value_model may be, of VALUE_KINDS."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems() + self.below(0, "value_coef")
        if not self.implicit_beta > 0:
            found.append(("implicit_beta", f"must be positive, got {self.implicit_beta}"))
        return found + ([] if self.implied_from else self.no_value_model(*self.value_kinds, "implied:RUN"))
