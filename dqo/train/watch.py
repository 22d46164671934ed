"""Looks at the logged rows as a person would, and says early when a run goes wrong."""

from __future__ import annotations

from dqo.data.advice import LARGEST_RATIO

BEYOND = 3.0  # times the largest reward
FALLEN = 0.2  # nats a token that right responses have lost on average
STILL = 1e-5  # nats a token from the reference: log-probabilities differ by some thousandths
ENOUGH = 10  # steps after which a policy that learns is farther; a row tells of the policy before its last update


class Watch:
    """Each warning is given once. `patience` rows in a row must show the same.

    Args:
        beta: of the method; None where it has none.
        largest_reward: of a response, as it is trained on; None where the method does not fit beta * log(pi/ref) to rewards.
        trains_values: whether a value model is trained; else V is a frozen one's, or a soft value.
        likelihood: the method's option that keeps right responses likely, if it is 0; None where it has none, or is used.
        policy_from: the step from which on the policy is trained against the last reference.
    """

    def __init__(
        self,
        patience: int = 3,
        beta: float | None = None,
        largest_reward: float | None = None,
        trains_values: bool = True,
        likelihood: str | None = None,
        policy_from: int = 0,
    ):
        self.patience, self.beta, self.largest_reward = patience, beta, largest_reward
        self.trains_values, self.likelihood, self.policy_from = trains_values, likelihood, policy_from
        self.first_loss: float | None = None
        self.newest: dict[str, float] = {}
        self.rows_of: dict[str, int] = {}  # how many rows in a row have shown it

    def _seen(self, name: str, shown: bool) -> bool:
        self.rows_of[name] = self.rows_of.get(name, 0) + 1 if shown else 0
        return self.rows_of[name] == self.patience

    def warnings(self, row: dict[str, float]) -> list[str]:
        """What the newest row of metrics.jsonl gives reason to say."""
        found = []
        if self.first_loss is None:
            self.first_loss = row["loss"]
        self.newest = row
        if self._seen("diverging", row["loss"] > 3.0 * abs(self.first_loss) + 1e-3):
            found.append(
                f"the loss has grown from {self.first_loss:.3g} to {row['loss']:.3g} (step {row['step']}): it diverges. Lower "
                "the learning rate or raise beta"
            )
        explained = row.get("value/explained_variance")
        if explained is not None and self._seen("worthless values", explained <= 0.0):
            cure = "raise critic_learning_rate, or let it learn first with value_warmup_steps"
            if not self.trains_values:
                cure = "none is trained here; choose another --value_model, or train it"
            found.append(
                f"the value model explains nothing of the returns (explained variance {explained:.3g} at step {row['step']}): "
                f"{cure}"
            )
        if self._seen("far away", row.get("kl", 0.0) > 1.0):
            found.append(
                f"the policy is {row['kl']:.3g} nats a token away from its reference (step {row['step']}): {self._nearer()}"
            )
        return found + self._of_rewards(row)

    def at_end(self) -> list[str]:
        """What there is to say of the whole run."""
        kl = self.newest.get("kl", STILL)
        if kl >= STILL or self.newest["step"] - self.policy_from < ENOUGH:
            return []
        return [
            f"the policy has hardly moved: at the end it was {kl:.1g} nats a token away from its reference. Raise "
            "--learning_rate, or train longer"
        ]

    def _nearer(self) -> str:
        """What keeps a policy nearer to its reference. Against large rewards over beta the KL has no weight."""
        if self.beta is None or self.largest_reward is None or self.largest_reward / self.beta <= LARGEST_RATIO:
            return "lower the learning rate or raise beta"
        return (
            f"raise --beta (now {self.beta:g}, with which rewards of {self.largest_reward:.3g} ask for "
            f"{self.largest_reward / self.beta:.3g} nats a response) or lower --reward_scale"
        )

    def _of_rewards(self, row: dict[str, float]) -> list[str]:
        """beta * log(pi/ref) of right and of wrong responses: where it goes when a learning rate is too high."""
        implicit = [row[name] for name in ("rewards/chosen", "rewards/rejected") if name in row]
        if not implicit or self.beta is None:
            return []
        found = []
        largest = max(implicit, key=abs)
        beyond = self.largest_reward is not None and abs(largest) > BEYOND * self.largest_reward
        if self._seen("beyond rewards", beyond):
            found.append(
                f"the implicit reward beta * log(pi/ref) of a response is {largest:.3g} on average, and rewards are at most "
                f"{self.largest_reward:.3g} (step {row['step']}): the policy goes where no reward sends it. Lower --learning_rate"
            )
        nats = row.get("rewards/chosen", 0.0) / self.beta / row["completions/mean_length"]
        if self._seen("right ones fall", nats < -FALLEN):
            kept = f", or keep them likely by --{self.likelihood}" if self.likelihood else ""
            found.append(
                f"right responses have become less likely, by {-nats:.3g} nats a token (step {row['step']}): lower "
                f"--learning_rate or raise --beta{kept}"
            )
        return found
