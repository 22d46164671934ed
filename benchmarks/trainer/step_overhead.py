"""Where a training step's time goes: forward, backward, optimizer, and the trainer itself.

    python -m benchmarks.trainer.step_overhead

DQO with a separate value model through the whole trainer (batches, metrics, logging every 10 steps; no checkpoints), on the
arithmetic task: the demonstration's model, and one of 5 million parameters. The head's gradient is made in the forward.
"""

from __future__ import annotations

import random
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from dqo.config.options import options_of
from dqo.grading.arith import VOCABULARY, ArithTask
from dqo.models.new import character_tokenizer, new_llama
from dqo.train import optim
from dqo.train.inputs import Given
from dqo.train.learner import Learner
from dqo.train.run import begin

MODELS = {
    "64 wide, 2 layers, 256 responses": ({"hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 128}, 256),
    "256 wide, 6 layers, 64 responses": ({"hidden_size": 256, "layers": 6, "heads": 4}, 64),
}
STEPS = 40


@contextmanager
def timed(owner: object, name: str, spent: dict[str, float], what: str):
    """Adds the time of every call of owner.name to spent[what]."""
    original = getattr(owner, name)

    def call(*arguments, **options):
        begun = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            spent[what] = spent.get(what, 0.0) + time.perf_counter() - begun

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def rows(count: int) -> list[dict]:
    task, rng = ArithTask(6, 10), random.Random(0)
    problems = [task.problem(rng) for _ in range(count)]
    return [{"prompt": p, "completion": task.solution(p), "reward": float(rng.random() < 0.5)} for p in problems]


def measure(size: dict, batch: int, output: Path) -> dict[str, float]:
    """Shares of the steps' time."""
    tokenizer = character_tokenizer(VOCABULARY)
    options = options_of(
        {
            "output_dir": str(output),
            "value_model": "separate",
            "per_device_train_batch_size": batch,
            "max_steps": STEPS,
            "max_length": 256,
            "eval_fraction": 0.0,
            "save_steps": 10 * STEPS,
        },
        "step_overhead",
    )
    model = new_llama(tokenizer, **size, max_length=256)
    trainer = begin(options, Given(dataset=rows(2048), model=model, tokenizer=tokenizer))
    trainer.save = lambda: None
    spent: dict[str, float] = {}
    with (
        timed(Learner, "forward", spent, "forward"),
        timed(torch.Tensor, "backward", spent, "backward"),
        timed(optim, "apply", spent, "optimizer"),
    ):
        begun = time.perf_counter()
        trainer.run("steps")
        total = time.perf_counter() - begun
    trainer.finish()
    shares = {name: seconds / total for name, seconds in spent.items()}
    return {"ms a step": 1e3 * total / STEPS, **shares, "trainer": 1.0 - sum(shares.values())}


def main() -> None:
    print("| model | ms a step | forward | backward | optimizer | trainer |")
    print("|---|---|---|---|---|---|")
    for name, (size, batch) in MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            found = measure(size, batch, Path(directory) / "out")
        shares = " | ".join(f"{found[part]:.1%}" for part in ("forward", "backward", "optimizer", "trainer"))
        print(f"| {name} | {found['ms a step']:.0f} | {shares} |")


if __name__ == "__main__":
    main()
