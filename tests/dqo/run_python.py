"""A Python program that trains with DQOTrainer, in one process or in each of a launch, and then evaluates other rows."""

import json
import sys
from pathlib import Path

from dqo import DQOConfig, DQOTrainer
from dqo.train import run_models, sharded


def evaluated(output_dir, options, rows):
    """What it logs, and what it says of `rows` after training, in found.json."""
    trainer = DQOTrainer(args=DQOConfig(output_dir=str(output_dir), **options))
    trainer.train()
    found = {"evaluate": trainer.evaluate(rows), "logged": trainer.log_history}
    predictions = trainer.predict(rows).predictions
    found["predict"] = {name: values.tolist() for name, values in predictions.items()}
    if trainer.is_world_process_zero():
        Path(output_dir, "found.json").write_text(json.dumps(found))


def whole(*_, **__):
    raise AssertionError("a process loads a whole model")


def main() -> None:
    """The runs of a JSON file, {output_dir: options}, on the rows of another; no model is loaded whole for training."""
    sharded.load_policy = run_models.load_policy = whole
    runs, rows = (json.loads(Path(name).read_text()) for name in sys.argv[1:])
    for output_dir, options in runs.items():
        evaluated(output_dir, options, rows)
