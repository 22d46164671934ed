import json

import pytest

from dqo.config import load_options
from dqo.errors import UserError
from dqo.train import train
from tests.dqo.helpers import arguments


def test_the_rows_of_the_metrics_file_reach_tensorboard(files):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(load_options(arguments(files, report_to="tensorboard", run_name="mine")))
    (written,) = [path.parent for path in files.glob("out/mine/**/events.out.tfevents.*") if "hparam" not in str(path)][
        :1
    ]
    read = events.EventAccumulator(str(written))
    read.Reload()
    rows = [json.loads(line) for line in (files / "out" / "metrics.jsonl").read_text().splitlines()]
    expected = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [(event.step, pytest.approx(event.value)) for event in read.Scalars("loss")] == expected


def test_a_tracker_that_is_not_installed_is_refused_before_training(files, monkeypatch):
    monkeypatch.setattr("dqo.inputs.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to needs the package wandb: pip install wandb"):
        train(load_options(arguments(files, report_to="wandb")))
    assert not (files / "out").exists()
