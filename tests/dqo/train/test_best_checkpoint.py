"""The best checkpoint when its files are damaged, and when another metric says which is the best."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.dqo.train.test_callbacks import BEST, Scores, trainer, weights_at


@pytest.mark.slow
@pytest.mark.parametrize("way", ["altered", "cut", "deleted", "gone"])
def test_a_damaged_best_checkpoint_is_not_loaded(files, way, capsys):
    class Damages(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            path = files / "out" / "checkpoint-3" / "model.safetensors"
            if state.global_step == 6:
                content = path.read_bytes()
                if way == "altered":
                    path.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
                elif way == "cut":
                    path.write_bytes(content[:99])
                else:
                    path.unlink() if way == "deleted" else shutil.rmtree(path.parent)

    callbacks = [Scores([9, 2, 1, 7, 5, 3, 4]), Damages()]
    output = trainer(files, callbacks, **BEST, load_best_model_at_end=True).train()
    what = {"gone": "is gone", "deleted": "is damaged: model.safetensors is missing"}
    assert f"checkpoint-3 {what.get(way, 'is damaged: model.safetensors was altered or cut')}. It is" in (
        printed := capsys.readouterr().out
    )
    assert "the best by made_up; the last step's models stay" in printed
    assert output.metrics["eval_made_up"] == 4
    written = load_file(files / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in weights_at(files, 6).items())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 6])
@pytest.mark.parametrize("first", [{"metric_for_best_model": "loss"}, {"metric_for_best_model": None}])
def test_another_metric_is_not_compared_with_the_first_ones_best(files, steps, first):
    scores = Scores([0, 0.02, 0.05, 0.04, 0.03, 0.01, 0.02])
    options = {"eval_steps": 1, "save_steps": 1, "save_total_limit": 9}
    stop = Stops(steps)
    trainer(files, [scores, stop], **options | first).train()
    if steps == 3:
        shutil.rmtree(files / "out" / "checkpoint-2")  # the best of those that are left is 3
    made = trainer(files, [scores], **options, metric_for_best_model="made_up", load_best_model_at_end=True)
    assert made.train().global_step == 6
    best = 3 if steps == 3 else 2
    assert (made.state.best_metric, made.state.best_global_step) == (scores.values[best], best)
    written = load_file(files / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in weights_at(files, best).items())


class Stops(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = state.global_step == self.step
