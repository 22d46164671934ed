"""transformers' callbacks around the loop: every class, event and switch; the best checkpoint; early stopping and resume."""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from dqo import DQOConfig, DQOTrainer
from dqo.config.options import options_of
from dqo.errors import UserError
from dqo.processes import Processes
from dqo.train.callback_args import CallbackArguments
from dqo.train.callbacks import Callbacks
from dqo.train.checkpoint import checkpoints, surplus
from dqo.train.loop import Trainer

pytestmark = pytest.mark.slow

ALONE = Processes()
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
SHORT = {"max_steps": 6, "logging_steps": 2, "learning_rate": 1e-3, "critic_learning_rate": 1e-2, "eval_fraction": 0.2}
BEST = {"eval_steps": 1, "metric_for_best_model": "made_up", "save_steps": 100}


def trainer(files, callbacks=(), name="out", **changes):
    options = {"per_device_train_batch_size": 8, "output_dir": str(files / name)} | SHORT | changes
    return DQOTrainer(
        str(files / "model"), DQOConfig(**options), str(files / "rollouts.jsonl"), callbacks=list(callbacks)
    )


def rows(files, name="out"):
    return [json.loads(line) for line in (files / name / "metrics.jsonl").read_text().splitlines()]


def callback_classes():
    """Every callback class of transformers that needs no service: those of its integrations do, but for tensorboard's."""
    modules = (transformers.trainer_callback, transformers.trainer_jit_checkpoint)
    found = {c for module in modules for c in vars(module).values() if inspect.isclass(c)}
    found |= {getattr(transformers, name) for name in dir(transformers) if name.endswith("Callback")}
    found = {c for c in found if issubclass(c, TrainerCallback)} - {TrainerCallback, CallbackHandler}
    return sorted(found | {integration_utils.TensorBoardCallback}, key=lambda c: c.__name__)


CLASSES = callback_classes()


def test_the_classes_that_need_no_service_are_among_those_tried():
    names = {c.__name__ for c in CLASSES}
    assert names >= {"DefaultFlowCallback", "EarlyStoppingCallback", "PrinterCallback", "ProgressCallback"}
    assert JITCheckpointCallback in CLASSES


@pytest.mark.parametrize("callback", CLASSES, ids=lambda c: c.__name__)
def test_a_callback_of_transformers_changes_nothing_but_what_it_is_for(files, callback, plain_weights):
    made = trainer(files, [callback], eval_steps=3, metric_for_best_model="loss", save_steps=100)
    assert made.train().global_step == 6
    assert [row["step"] for row in rows(files) if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows(files) if "eval_loss" in row] == [0, 3, 6]
    found = load_file(files / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in plain_weights.items())


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    from dqo.models.new import save
    from tests.dqo.helpers import policy, rollout_rows, tokenizer

    files = tmp_path_factory.mktemp("plain")
    save(policy(), tokenizer(), files / "model")
    (files / "rollouts.jsonl").write_text("\n".join(json.dumps(row) for row in rollout_rows(prompts=12, samples=4)))
    trainer(files).train()
    return load_file(files / "out" / "model.safetensors")


def test_tensorboard_has_the_rows(files):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(files, [integration_utils.TensorBoardCallback]).train()
    (written,) = files.glob("out/**/events.out.tfevents.*")
    read = events.EventAccumulator(str(written.parent))
    read.Reload()
    assert [e.step for e in read.Scalars("train/loss")] == [2, 4, 6]
    assert [e.step for e in read.Scalars("eval/loss")] == [0, 6]


class Record(TrainerCallback):
    """Writes down every event, with the step; `at` maps an event and a step to the switches to set there."""

    def __init__(self, at=None):
        self.seen, self.at = [], at or {}


def _event(name):
    def called(self, args, state, control, **others):
        self.seen.append((name.removeprefix("on_"), state.global_step))
        for switch, value in self.at.get((name, state.global_step), {}).items():
            setattr(control, switch, value)
        return control

    return called


for _name in EVENTS:
    setattr(Record, _name, _event(_name))


def test_every_event_of_transformers_is_called_in_its_order(files):
    record = Record()
    made = trainer(files, [record], per_device_train_batch_size=12, max_steps=5, logging_steps=5, max_batch_tokens=200)
    made.train()
    made.predict(str(files / "rollouts.jsonl"))
    assert {event for event, _ in record.seen} == {name.removeprefix("on_") for name in EVENTS} - {"push_begin"}
    events = [event for event, step in record.seen if event not in ("substep_end", "prediction_step")]
    step = ["step_begin", "pre_optimizer_step", "optimizer_step", "step_end"]
    epochs = made._begin().per_epoch
    assert 1 < epochs < 5
    expected = ["init_end", "train_begin", "log", "evaluate"]
    for i in range(5):
        expected += (["epoch_begin"] if i % epochs == 0 else []) + step
        expected += ["log"] if i == 4 else []
        expected += ["epoch_end"] if (i + 1) % epochs == 0 or i == 4 else []
    assert events == [*expected, "save", "log", "evaluate", "train_end", "predict"]


def test_gradients_are_there_at_the_optimizers_events(files):
    class Look(TrainerCallback):
        norms, before, after = [], [], []

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **others):
            self.norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
            self.before.append(model.lm_head.weight.detach().clone())
            assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}

        def on_optimizer_step(self, args, state, control, model=None, **others):
            assert model.lm_head.weight.grad is not None
            self.after.append(model.lm_head.weight.detach().clone())

    trainer(files, [Look()], max_grad_norm=0.01, max_steps=2).train()
    assert Look.norms == pytest.approx([0.01, 0.01], rel=1e-3)  # after clipping
    assert not torch.equal(Look.before[0], Look.after[0]) and torch.equal(Look.after[0], Look.before[1])


def test_every_switch_is_obeyed(files):
    record = Record(
        {
            ("on_step_end", 1): {"should_log": True, "should_evaluate": True, "should_save": True},
            ("on_step_end", 2): {"should_log": False},
            ("on_epoch_end", 4): {"should_save": True},
            ("on_step_end", 5): {"should_epoch_stop": True},
        }
    )
    made = trainer(files, [record], per_device_train_batch_size=12, max_steps=12, save_total_limit=9)
    made.train()
    assert made._begin().per_epoch == 4
    # the epoch that stopped at its first step leaves out three: 9 steps are made of 12
    assert [row["step"] for row in rows(files) if "loss" in row] == [1, 4, 6, 8, 9]
    assert [row["step"] for row in rows(files) if "eval_loss" in row] == [0, 1, 9]
    assert [path.name for path in checkpoints(files / "out")] == ["checkpoint-1", "checkpoint-4", "checkpoint-9"]
    ends = [step for event, step in record.seen if event == "epoch_end"]
    assert ends == [4, 5, 9]


def test_a_run_whose_epoch_was_stopped_goes_on_where_it_was(files):
    def run(name, **changes):
        record = Record({("on_step_end", 2): {"should_epoch_stop": True, "should_save": True}})
        made = trainer(
            files, [record], name, per_device_train_batch_size=12, max_steps=8, save_total_limit=9, **changes
        )
        made.train()
        return load_file(files / name / "model.safetensors")

    whole = run("whole")
    shutil.copytree(files / "whole", files / "out")
    shutil.rmtree(files / "out" / "checkpoint-6")
    resumed = run("out")
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
    assert [row["step"] for row in rows(files)] == [row["step"] for row in rows(files, "whole")]


class Scores(TrainerCallback):
    """Adds a metric whose value at each step is given."""

    def __init__(self, values):
        self.values = values

    def on_evaluate(self, args, state, control, metrics=None, **others):
        metrics["eval_made_up"] = self.values[state.global_step]

    def on_log(self, args, state, control, logs=None, **others):
        logs["mine"] = torch.tensor(float(state.global_step))
        logs["yours"] = np.float32(0.5)


def weights_at(files, step, name="out"):
    return load_file(files / name / f"checkpoint-{step}" / "model.safetensors")


@pytest.mark.parametrize("greater, best", [(None, 3), (False, 2)])
def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(files, greater, best):
    scores = Scores([9, 2, 1, 7, 5, 3, 4])
    made = trainer(files, [scores], **BEST, load_best_model_at_end=True, greater_is_better=greater, save_total_limit=1)
    output = made.train()
    assert [path.name for path in checkpoints(files / "out")] == [f"checkpoint-{best}", "checkpoint-6"]
    written, best_ones = load_file(files / "out" / "model.safetensors"), weights_at(files, best)
    assert all(torch.equal(written[name], tensor) for name, tensor in best_ones.items())
    assert not all(torch.equal(written[name], tensor) for name, tensor in weights_at(files, 6).items())
    assert all(torch.equal(made.model.state_dict()[name], tensor) for name, tensor in best_ones.items())
    row = next(row for row in rows(files) if row["step"] == best and "eval_loss" in row)
    assert output.metrics["eval_loss"] == pytest.approx(row["eval_loss"], rel=1e-5)
    state = made._begin().callbacks.state
    assert (state.best_metric, state.best_global_step) == (scores.values[best], best)
    before = (files / "out" / "metrics.jsonl").read_bytes()
    again = trainer(files, [scores], **BEST, load_best_model_at_end=True, greater_is_better=greater, save_total_limit=1)
    assert again.train().metrics == output.metrics
    assert (files / "out" / "metrics.jsonl").read_bytes() == before  # nothing is evaluated twice


def test_a_last_step_that_is_the_best_is_known_as_the_best(files):
    made = trainer(files, [Scores([0, 1, 2, 3, 4, 5, 6])], **BEST, load_best_model_at_end=True)
    made.train()
    assert made._begin().callbacks.state.best_global_step == 6


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
@pytest.mark.parametrize("best", [None, 1, 3, 4])
def test_the_newest_and_the_best_are_never_too_many(tmp_path, keep, best):
    paths = [tmp_path / f"checkpoint-{n}" for n in range(1, 5)]
    kept = [p for p in paths if p not in surplus(paths, keep, best and paths[best - 1])]
    assert paths[-1] in kept and (best is None or paths[best - 1] in kept)
    assert len(kept) == min(4, max(keep, 2 if best in (1, 3) else 1))
    rest = [p for p in paths if best is None or p != paths[best - 1]]
    others = [p for p in kept if p in rest]
    assert others == rest[len(rest) - len(others) :]


def stopping(patience=2):
    return [Scores([0, 5, 4, 6, 5, 5, 9, 9, 9, 9, 9, 9, 9]), EarlyStoppingCallback(patience)]


def test_early_stopping_stops_and_a_stopped_run_stays_stopped(files):
    made = trainer(files, stopping(), **BEST, load_best_model_at_end=True, max_steps=12)
    assert made.train().global_step == 5  # best at 3; 4 and 5 are worse
    assert made._begin().callbacks.state.best_global_step == 3
    before = {path.name for path in checkpoints(files / "out")}
    assert before == {"checkpoint-3", "checkpoint-5"}
    again = trainer(files, stopping(), **BEST, load_best_model_at_end=True, max_steps=12)
    assert again.train().global_step == 5
    patient = trainer(files, stopping(5), **BEST, load_best_model_at_end=True, max_steps=12)
    assert patient.train().global_step == 11  # 6 is the best, and five after it are not


@pytest.mark.parametrize("killed_at", [2, 4])
def test_early_stopping_resumes_exactly(files, monkeypatch, killed_at):
    def made(name):
        return trainer(files, stopping(), name, **BEST | {"save_steps": 1}, save_total_limit=9, max_steps=12)

    made("whole").train()
    original = Trainer.train_step

    def stop(self, step, groups):
        if step == killed_at:
            raise KeyboardInterrupt
        return original(self, step, groups)

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        made("out").train()
    monkeypatch.undo()
    resumed = made("out")
    assert resumed.train().global_step == 5
    history = resumed._begin().callbacks.state.log_history
    assert [row["step"] for row in history] == [row["step"] for row in rows(files, "whole")]
    assert rows(files)[0]["eval_loss"] == rows(files, "whole")[0]["eval_loss"]
    assert [row["step"] for row in rows(files)] == [row["step"] for row in rows(files, "whole")]


def test_what_callbacks_add_is_in_the_file(files):
    trainer(files, [Scores([0.5] * 7)], eval_steps=2).train()
    found = rows(files)
    assert all(row["mine"] == row["step"] and row["yours"] == 0.5 for row in found)
    assert [row["eval_made_up"] for row in found if "eval_loss" in row] == [0.5] * 4


def test_what_is_no_number_is_refused_with_its_name(files):
    class Bad(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **others):
            logs["grads"] = torch.zeros(3)

    with pytest.raises(UserError, match="a callback logged 'grads' as a Tensor; expected one number or a string"):
        trainer(files, [Bad]).train()


@pytest.mark.parametrize(
    "callbacks, changes, message",
    [
        ([EarlyStoppingCallback], {}, "EarlyStoppingCallback needs eval_steps and metric_for_best_model"),
        ([EarlyStoppingCallback()], {"eval_steps": 1}, "EarlyStoppingCallback needs metric_for_best_model"),
        ([print], {}, "callbacks: <built-in function print> is a builtin_function_or_method; expected"),
        ([], BEST | {"metric_for_best_model": "los"}, "metric_for_best_model 'los' is not .*Did you mean 'eval_loss'"),
        ([], BEST | {"metric_for_best_model": "loss", "eval_fraction": 0.0}, "no response is held out"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(files, callbacks, changes, message):
    with pytest.raises(UserError, match=message):
        trainer(files, callbacks, **changes).train()
    assert not checkpoints(files / "out")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"load_best_model_at_end": True}, "eval_steps must be above 0 with load_best_model_at_end"),
        ({"metric_for_best_model": "loss"}, "eval_steps must be above 0 with metric_for_best_model"),
        ({"greater_is_better": True}, "greater_is_better must be None without metric_for_best_model"),
    ],
)
def test_options_of_the_best_model_need_each_other(changes, message):
    with pytest.raises(UserError, match=message):
        DQOConfig(**changes)


def test_args_answer_by_every_name_of_options_and_of_transformers(tmp_path):
    options = options_of({"eval_steps": 5, "metric_for_best_model": "kl", "beta": 0.3}, "test")
    args = CallbackArguments(options, ALONE)
    for name, value in options.flat().items():
        if name not in ("greater_is_better",):  # transformers' callbacks read the resolved one
            assert getattr(args, name) == value
    for name in transformers.TrainingArguments.__dataclass_fields__:
        getattr(args, name)
    assert (args.eval_strategy, args.greater_is_better, args.world_size, args.fp16) == ("steps", True, 1, False)
    assert json.loads(args.to_json_string())["beta"] == 0.3
    assert all(isinstance(value, (bool, int, float, str)) for value in args.to_sanitized_dict().values())
    with pytest.raises(AttributeError, match="args has no 'learning_rat'.* Did you mean 'learning_rate'"):
        _ = args.learning_rat
    assert CallbackArguments(options_of({}, "test"), ALONE).eval_strategy == "no"


def test_states_go_to_callbacks_of_their_class_only(tmp_path):
    class Other(TrainerCallback, ExportableState):
        def state(self):
            return {"args": {}, "attributes": {"count": 3}}

    from tests.dqo.helpers import policy, tokenizer

    def made(*given):
        from dqo.train.learner import Learner

        return Callbacks(list(given), options_of({}, "test"), Learner(policy()), tokenizer(), ALONE)

    stored = json.loads(json.dumps(made(EarlyStoppingCallback(3), Other()).stored()))
    other, early = Other(), EarlyStoppingCallback(3)
    assert made(early, other).restore(stored | {"stopped": True}, tmp_path, [])
    assert other.count == 3
    assert not made(Other(), EarlyStoppingCallback(3)).restore(stored | {"stopped": True}, tmp_path, [])
    assert not made(EarlyStoppingCallback(4), Other()).restore(stored | {"stopped": True}, tmp_path, [])
    assert not made().restore({}, tmp_path, [])
