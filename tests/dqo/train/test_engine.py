"""Where memory runs out the micro-batches become smaller, and the run is the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dqo import DQOConfig, DQOTrainer
from dqo.config.options import load_options
from dqo.data.batches import Batch, Batching, groups_of
from dqo.errors import UserError
from dqo.processes import Processes
from dqo.train.engine import Engine
from dqo.train.learner import Learner
from dqo.train.run import train
from tests.dqo.helpers import arguments, episodes, policy

ERROR = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12")


def limit(monkeypatch, full):
    """`full(batch, number of the pass)` says where memory runs out."""
    forward, passes = Learner.forward, []

    def limited(self, work, *given, **options):
        batch = next(argument for argument in given if isinstance(argument, Batch))
        passes.append(batch)
        if full(batch, len(passes)):
            raise ERROR
        return forward(self, work, *given, **options)

    monkeypatch.setattr(Learner, "forward", limited)
    return passes


def run(files, **changes):
    return train(load_options(arguments(files, max_steps=3, logging_steps=1, **changes)))


def weights(directory):
    return {
        name: tensor
        for part in ("model.safetensors", "critic/model.safetensors")
        if (directory / part).exists()
        for name, tensor in load_file(directory / part).items()
    }


@pytest.mark.parametrize("method, when, tokens", [("dqo", 3, 80), ("dpo", 2, 160), ("kto", 3, 80)])
def test_a_run_that_ran_out_of_memory_equals_one_with_the_smaller_size(
    files, monkeypatch, caplog, method, when, tokens
):
    # in a pass of the first step before which another has left its gradients
    options = {"method": method, "eval_fraction": 0, "max_batch_tokens": tokens}
    run(files, output_dir=files / "unbroken", **options)
    caplog.clear()
    with monkeypatch.context() as patched:
        passes = limit(patched, lambda batch, number: number == when)
        run(files, output_dir=files / "broken", **options)
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("step 1: out of memory on cpu")
    size = int(said[0].rpartition(" ")[2])
    assert 20 <= size <= tokens // 2 and said[0].endswith(f"Begin with --max_batch_tokens {size}")
    assert passes[when - 1].positions > size
    assert all(batch.positions <= max(size, 2 * batch.positions / len(batch.episodes)) for batch in passes[when:])
    run(files, output_dir=files / "smaller", **options | {"max_batch_tokens": size})
    broken, smaller, unbroken = (weights(files / name) for name in ("broken", "smaller", "unbroken"))
    assert all(torch.equal(broken[name], smaller[name]) for name in smaller)  # bit for bit
    assert all(torch.allclose(broken[name], unbroken[name], atol=1e-5) for name in unbroken)
    losses = [
        [row["loss"] for row in map(json.loads, (files / name / "metrics.jsonl").read_text().splitlines())]
        for name in ("broken", "unbroken")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_response_that_does_not_fit_alone_ends_the_run_in_one_line(files, monkeypatch):
    limit(monkeypatch, lambda batch, number: batch.positions > 5)
    with pytest.raises(
        UserError, match=r"^step 1: out of memory on cpu \(peak .*each holds one response, or those that st"
    ):
        run(files, eval_fraction=0)


def test_evaluation_and_predictions_go_on_with_smaller_batches(files, monkeypatch, caplog):
    options = {"max_steps": 1, "method": "dqo", "output_dir": str(files / "out"), "eval_fraction": 0.5}
    trainer = DQOTrainer(str(files / "model"), DQOConfig(**options), str(files / "rollouts.jsonl"))
    whole, predicted = trainer.evaluate(), trainer.predict(str(files / "rollouts.jsonl")).predictions
    with monkeypatch.context() as patched:
        limit(patched, lambda batch, number: batch.positions > 100)
        again = trainer.evaluate()
        assert again.pop("eval_data/padding_frac") < whole.pop("eval_data/padding_frac")
        assert again == pytest.approx(whole, rel=1e-4, abs=1e-6)
        assert trainer._trainer.engine.batching.max_tokens <= 100
        trainer._trainer.engine.batching = trainer._trainer.prepared.batching
        found = trainer.predict(str(files / "rollouts.jsonl")).predictions
    assert all(found[name] == pytest.approx(predicted[name], rel=1e-4, abs=1e-6) for name in predicted)
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert [line.partition(":")[0] for line in said] == ["held-out loss", "predictions"]


def engine(world=1, coefficient=None):
    learner = Learner(policy(), router_aux_loss_coef=coefficient)
    return Engine(learner, learner, Batching(0, 60), Processes(world=world))


def test_several_processes_end_in_one_line_with_the_size_to_set():
    groups = groups_of(episodes(9), 1)

    def work():
        raise ERROR

    with pytest.raises(
        UserError, match=r"step 4: out of memory .* which several processes do not lower by themselves"
    ) as e:
        engine(world=2).in_memory(work, "step 4", groups)
    size = int(str(e.value).partition("--max_batch_tokens ")[2].partition(".")[0])
    assert 10 < size <= 30


def test_the_loss_that_depends_on_the_size_is_named(caplog):
    found, groups = engine(coefficient=0.1), groups_of(episodes(9), 1)

    def work():
        if found.batching.max_tokens == 60:
            raise ERROR

    found.in_memory(work, "step 1", groups)
    assert "the router's auxiliary loss alone depends on their size" in caplog.text
