"""Looks at the logged rows as a person would, and says early when a run goes wrong."""

from __future__ import annotations


class Watch:
    """Each warning is given once. `patience` rows in a row must show the same."""

    def __init__(self, patience: int = 3):
        self.patience = patience
        self.first_loss: float | None = None
        self.rows_of: dict[str, int] = {}  # how many rows in a row have shown it

    def _seen(self, name: str, shown: bool) -> bool:
        self.rows_of[name] = self.rows_of.get(name, 0) + 1 if shown else 0
        return self.rows_of[name] == self.patience

    def warnings(self, row: dict[str, float]) -> list[str]:
        """What the newest row of metrics.jsonl gives reason to say."""
        found = []
        if self.first_loss is None:
            self.first_loss = row["loss"]
        if self._seen("diverging", row["loss"] > 3.0 * abs(self.first_loss) + 1e-3):
            found.append(
                f"the loss has grown from {self.first_loss:.3g} to {row['loss']:.3g} (step {row['step']}): it diverges. Lower "
                "the learning rate or raise beta"
            )
        explained = row.get("value/explained_variance")
        if explained is not None and self._seen("worthless values", explained <= 0.0):
            found.append(
                f"the value model explains nothing of the returns (explained variance {explained:.3g} at step {row['step']}): "
                "raise critic_learning_rate, or let it learn first with value_warmup_steps"
            )
        if self._seen("far away", row.get("kl", 0.0) > 1.0):
            found.append(
                f"the policy is {row['kl']:.3g} nats a token away from its reference (step {row['step']}): lower the learning "
                "rate or raise beta"
            )
        return found
