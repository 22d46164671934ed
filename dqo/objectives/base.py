"""The contract of an objective: what it declares, which responses it trains on, and the loss of a batch of them.

    @dataclass(frozen=True)
    class Mine(Objective):                             its fields are its options: each has a type, a default and a docstring
        beta: float = 0.1
        def prepare(self, columns): ...                which responses, and which stay together; by default each alone
        def __call__(self, stats, rows, cu_seqlens): ...     the loss: plain torch

A module of this folder with one such class is a method, named as the module; `--method package.module:Class` names any other.
None of these files imports torch before it is called: `--help` and the checks of the options stay fast.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from dqo_kernels import TokenStats

UNITS = ("token", "response", "group")
VALUE_KINDS = ("separate", "head", "implicit", "q_model", "none")
IMPLIED = "implied:"  # of value_model, before the directory of a run
IMPLICIT_BETA = 0.5  # the default of implicit_beta
MODELS = ("policy", "critic")


class Columns(Protocol):
    """What is known of n responses before any model is asked: numpy arrays (n,), one entry a response, in the order of the data.
    They may lie in a file: read the columns that you need, and no row that you need not."""

    @property
    def prompt(self) -> np.ndarray:
        """int64: responses to one prompt share it."""

    @property
    def reward(self) -> np.ndarray:
        """float64: of the outcome, as it is trained on."""

    @property
    def label(self) -> np.ndarray:
        """bool: whether the response counts as correct."""

    @property
    def prompt_length(self) -> np.ndarray:
        """int64, in tokens."""

    @property
    def length(self) -> np.ndarray:
        """int64: tokens of the response that the model wrote, its end token included."""

    @property
    def truncated(self) -> np.ndarray:
        """bool: whether a length limit cut the response."""

    @property
    def has_logprobs(self) -> np.ndarray:
        """bool: whether its log-probabilities under the policy that wrote it are stored."""

    @property
    def has_step_rewards(self) -> np.ndarray:
        """bool: whether it has steps, and a reward of each."""

    @property
    def potential(self) -> np.ndarray:
        """float64, one for each token of all responses: of the state before the token, what the file has for the last step that
        has ended by then, or for the prompt; NaN where it has nothing."""

    @property
    def right_length(self) -> np.ndarray:
        """int64, in tokens: those before the first step that the file marks as wrong; without one all, if the response counts as
        correct, and else none."""

    @property
    def of_reference(self) -> np.ndarray:
        """bool: whether the row's `sampling` says that the reference wrote the response as it is, at temperature 1."""

    @property
    def same_as(self) -> np.ndarray:
        """int64: the first row with the same prompt and the same response; its own index where there is none before."""

    @property
    def source(self) -> Sequence[str]:
        """File and line, for messages."""


@dataclass(frozen=True)
class Selection:
    """What a method trains on, out of n responses.

    groups: indices of the responses that stay together: an array (G, K), or G arrays of any lengths. A response may be in
        several groups. An epoch is a permutation of the groups, and a step takes per_device_train_batch_size of them, times
        gradient_accumulation_steps, times processes.
    columns: {name: array} of what the loss reads beside the columns that are there: (n,), one number a response, which is put on
        each of its tokens, or one number a response token, of all responses in their order.
    companions: int64 (n,), -1 for none: the response whose completion is put behind this one's prompt, see `companion_sums`.
    """

    groups: np.ndarray | Sequence[np.ndarray]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    companions: np.ndarray | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of the run.

    steps: how many optimizer steps, below 1 a share of all of them (rounded up); None: all that are left.
    trains: the models that are trained, of "policy" and "critic" (the value model, where there is one). The others stay as they
        are, with the states of their optimizers, and are read without a gradient: where the critic is not among them, the column
        values is that of the critic as the phase found it.
    refreshes: what is computed anew from the models as they are at its begin: "reference", the columns ref_logprobs and ref_lse
        of all responses, those held out too: the policy of that step is the reference from then on.
    part: which groups are trained on, as shares of all in the order of `prepare`: (0, 0.5) is the first half. Phases that follow
        each other with the same part go on in its order; another part begins an order of its own.
    """

    name: str
    steps: float | None = None
    trains: tuple[str, ...] = MODELS
    refreshes: tuple[str, ...] = ()
    part: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Objective:
    """Answers that most objectives give; a subclass states the others."""

    unit: ClassVar[str] = "response"
    """What the loss is a sum over, and is divided by the number of in a step: "token", "response" or "group"."""
    group_size: ClassVar[int | None] = 1
    """Responses of a group: 1, 2 for pairs ..., None for lists of any lengths."""
    needs_contrast: ClassVar[bool] = True
    """Equal rewards everywhere leave it nothing to learn: such data are refused."""
    fits_rewards: ClassVar[bool] = False
    """It fits beta * log(pi/ref) to the size of rewards, so that rewards far above beta are worth a warning."""
    likelihood_option: ClassVar[str | None] = None
    """Its option that keeps correct responses likely where it is above 0."""
    earlier: ClassVar[dict[str, Any]] = {}
    """Of options that once were not there, what they are in a run that began without them, where that is not the default."""
    reads_rewards: ClassVar[str] = "size"
    """What it reads of outcome rewards: their "size", the "order" of those of one prompt, or at most their
    "labels"; an option that changes nothing of that is named as one without effect."""
    wants_process_reward: ClassVar[str | None] = None
    """What the option process_reward must be, for a method that reads step rewards in this sense; None: anything."""
    values_column: ClassVar[str | None] = None
    """The column of `prepare`, of numbers between 0 and 1, that the value model is fitted to; None: it is fitted to returns."""
    reads_models: ClassVar[tuple[str, ...]] = ()
    """Options that name a frozen language model each. The log-probabilities of the actions under it, computed once and cached,
    are the column OPTION_logprobs."""
    kl_to: ClassVar[str] = "reference"
    """What stats.kl is the KL to: "reference", or "critic", a value model of the kind q_model."""
    asks: ClassVar[bool] = False
    """It asks for the labels of some groups, by `asked`; the trainer counts each question once, in all checkpoints of the run."""
    nothing_left: ClassVar[str] = "no response to train on"
    """What to say when `prepare` gives no group."""

    @property
    def needs_reference(self) -> bool:
        """It reads ref_logprobs (and ref_lse)."""
        return True

    @property
    def value_kind(self) -> str:
        """Which value model is made, one of VALUE_KINDS, the directory that it begins from, or implied:RUN; of the option
        value_model, if any."""
        return getattr(self, "value_model", "none")

    @property
    def implied_from(self) -> str | None:
        """The run whose policy implies the values, of implied:RUN; they are read, and no model is fitted."""
        return self.value_kind[len(IMPLIED) :] if self.value_kind.startswith(IMPLIED) else None

    @property
    def values_loss(self) -> str:
        """What fits the value model: "squared", "bce" or "hl_gauss"; the option value_loss where there is one."""
        return getattr(self, "value_loss", "squared")

    @property
    def needs_values(self) -> bool:
        """It reads values."""
        return self.value_kind != "none"

    @property
    def needs_kl(self) -> bool:
        """It reads stats.kl, the exact KL(pi || ref) of every row, or that to `kl_to`, differentiable: the reference stays in
        memory."""
        return False

    @property
    def needs_steps(self) -> bool:
        """It reads step; a file with a response without steps is refused."""
        return False

    @property
    def needs_step_sums(self) -> bool:
        """It asks `step_sums` of the responses of every step, one forward pass more."""
        return False

    @property
    def discount_factor(self) -> float:
        """Of potentials among the rewards; the option gamma where there is one."""
        return getattr(self, "gamma", 1.0)

    @property
    def discount_at(self) -> str:
        """Where it acts: "tokens", each of the model's, or "turns", the last of each turn; of the option discount, if any."""
        return getattr(self, "discount", "tokens")

    @property
    def weight_level(self) -> str:
        """Over what its importance weights are products: the option is_level where there is one; "none": it has no weights.
        Where it is "auto" the trainer sets is_level, by what the rows tell of the policy that wrote them."""
        return getattr(self, "is_level", "none")

    @property
    def values_decay(self) -> float | None:
        """Decay of the moving average of the value model; None: there is none. The option target_ema where there is one."""
        return getattr(self, "target_ema", None)

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        beta = getattr(self, "beta", None)
        return [] if beta is None or beta > 0 else [("beta", f"must be positive, got {beta}")]

    def idle(self) -> tuple[str, tuple[str, ...]]:
        """Options of its own that the others switch off: why, as a clause, and their names."""
        return "", ()

    def below(self, least: float, *names: str) -> list[tuple[str, str]]:
        """(field, what is wrong) of those of these fields that are less than `least`; None passes where the type has it."""
        types = {f.name: str(f.type) for f in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in names}
        return [
            (name, f"must be at least {least:g}{' or None' if 'None' in types[name] else ''}, got {value}")
            for name, value in values.items()
            if not (value is None and "None" in types[name] or value is not None and value >= least)
        ]

    def no_value_model(self, *kinds: str) -> list[tuple[str, str]]:
        """The option value_model, where it is neither one of `kinds` nor a directory."""
        told = self.value_kind
        if told in kinds or (told not in VALUE_KINDS and os.path.isdir(told)):
            return []
        return [("value_model", f"must be {', '.join(kinds)}, or the directory of a value model, got {told!r}")]

    @property
    def reads_steps(self) -> str:
        """The option by which marks of wrong steps choose what is trained on, such as "imitate steps"; "" where they do not."""
        return ""

    def advice(self, labels: Sequence[bool], rewards: np.ndarray) -> list[str]:
        """Warnings, a line each, about rows with these labels and outcome rewards."""
        return []

    def phases(self, value_warmup: float) -> tuple[Phase, ...]:
        """The run's phases in their order; the last has no end.

        Args:
            value_warmup: the option value_warmup_steps, a number of steps or a share of them.
        """
        whole = Phase("training")
        return (Phase("value_warmup_steps", value_warmup, ("critic",)), whole) if self.needs_values else (whole,)

    def prepare(self, columns: Columns) -> Selection:
        """Which responses are trained on, and which stay together; the same whenever it is asked.

        Raises:
            UserError: for data that do not suit the method.
        """
        return Selection(np.arange(len(columns.prompt))[:, None])

    def companion_sums(self, stats: TokenStats, rows: dict[str, Tensor], cu_seqlens: Tensor) -> Tensor:
        """(2,): [sum, count] over companions, without a gradient; only asked where `prepare` gives companions. Those of a whole
        optimizer step, all micro-batches and processes, are added before its first loss; their mean is the column companion_mean,
        the same on every row. So the loss does not depend on the split into micro-batches."""
        raise NotImplementedError(f"{type(self).__name__} gives companions and has no companion_sums")

    def step_sums(self, stats: TokenStats, rows: dict[str, Tensor], cu_seqlens: Tensor) -> dict[str, Tensor]:
        """{name: (2,) [sum, count]} over the responses of an optimizer step, without a gradient; arguments as of `__call__`, only
        asked where `needs_step_sums`. Those of all micro-batches and processes are added before the step's first loss; the mean
        is the column `name`, the same on every row."""
        raise NotImplementedError(f"{type(self).__name__} needs step_sums and has none")

    def asked(self, stats: TokenStats, rows: dict[str, Tensor], cu_seqlens: Tensor) -> Tensor:
        """(groups,) bool: whose label is needed now, known or not; arguments as of `__call__`, only asked where it `asks`. In
        later steps the column known is 1 on every row of such a group, and of one with the same responses."""
        raise NotImplementedError(f"{type(self).__name__} asks and has no asked")

    def weights(self, log_ratio: Tensor, cu_seqlens: Tensor) -> Tensor | None:
        """The importance weights, (B,) of responses or (N,) of tokens; None where it weighs nothing.

        Args:
            log_ratio: (N,) log-probabilities of the policy less those of the policy that wrote the responses.
        """
        return None

    def evaluation(
        self, stats: TokenStats, rows: dict[str, Tensor], cu_seqlens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `__call__`, on held-out responses, with a loss that compares between steps and runs: without weights that the
        policy moves."""
        return self(stats, rows, cu_seqlens)

    def __call__(
        self, stats: TokenStats, rows: dict[str, Tensor], cu_seqlens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of whole groups, one response behind the other.

        Args:
            stats: of N response tokens, those of the environment left out: logprobs, lse, entropy (N,); kl where `needs_kl`.
            rows: columns (N,): rewards, label (1 on every token of a response that counts as correct), turn_end (1 on the last
                token of each turn, else 0), group (0, 1, ... of the response among those of this call), those of `prepare` and
                of `step_sums`, where it `asks` known (in training alone), where `needs_steps` step (0, 1, ... of the token's
                step in its response; what follows the end of the last step belongs to it), and where there are such
                ref_logprobs, ref_lse, behavior_logprobs, values (differentiable), bootstrap (V of the last state of a response
                that was cut, on its last row), target_values (of the value model's moving average), companion_mean, and with a
                `values_loss` other than squared value_outputs (N, K) (differentiable in the place of values) and value_range (N,
                2), or of a value model that is fitted to outcomes outcome_loss (differentiable in the place of values, on the
                last row of a response), see dqo.objectives.value_outputs. Of a q_model: q, Q of the token (differentiable in the
                place of values), and target_values, E_pi[Q] - beta * KL(pi || ref) of its moving average, or of itself without
                one.
            cu_seqlens: (B+1,) boundaries of the responses.

        Returns:
            (loss_sum, metrics): a sum over the units, and {name: (2,) tensor [sum, count]}, so that micro-batches and processes
            add; the trainer alone divides, by the step's count of units.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __call__")
