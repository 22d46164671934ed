import json
import sys
from types import ModuleType, SimpleNamespace

import accelerate.tracking
import accelerate.utils
import pytest

from dqo.config.options import load_options, options_of
from dqo.errors import UserError
from dqo.processes import Processes
from dqo.train.run import train
from dqo.train.trackers import Trackers
from tests.dqo.helpers import arguments


@pytest.mark.slow
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


class Wandb(ModuleType):
    """Stands in for wandb: what is asked of it."""

    def __init__(self):
        super().__init__("wandb")
        self.asked, self.rows = {}, []
        self.config = SimpleNamespace(update=lambda values, **_: self.asked.update(config=values))

    def init(self, **asked):
        self.asked.update(asked)
        return SimpleNamespace(log=lambda values, step=None, **_: self.rows.append((step, values)), finish=lambda: None)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
@pytest.mark.parametrize(
    "changes, environment, project, name",
    [
        ({}, {}, "dqo", "out"),
        ({"run_name": "mine"}, {}, "dqo", "mine"),
        ({"run_name": "mine", "project": "ours"}, {"WANDB_PROJECT": "theirs"}, "ours", "mine"),
        ({}, {"WANDB_PROJECT": "theirs"}, "theirs", "out"),
    ],
)
def test_a_run_has_its_name_within_a_project(tmp_path, monkeypatch, tracker, changes, environment, project, name):
    module = Wandb()
    monkeypatch.setitem(sys.modules, tracker, module)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.utils.LoggerType(tracker)])
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    options = options_of({"report_to": tracker, "output_dir": str(tmp_path / "out"), **changes}, "test")
    trackers = Trackers(options, Processes())
    trackers.log({"step": 3, "loss": 0.5})
    assert (module.asked["project"], module.asked["name"]) == (project, name)
    assert module.rows == [(3, {"loss": 0.5})]
    assert module.asked["config"]["beta"] == 0.1


def test_a_tracker_that_is_not_installed_is_refused_before_training(files, monkeypatch):
    monkeypatch.setattr("dqo.train.inputs.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to needs the package wandb: pip install wandb"):
        train(load_options(arguments(files, report_to="wandb")))
    assert not (files / "out").exists()
