"""`dqo zpg` on a tiny model."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dqo import signals
from dqo.commands.zpg import zpg_command
from dqo.errors import UserError
from dqo.evaluation.accuracy import Answered
from dqo.evaluation.evaluate import evaluate
from dqo.grading.grade import Grade
from dqo.models.generate import Response
from dqo.models.policy import load_policy
from dqo.zpg import run as module
from dqo.zpg.options import ZPGConfig
from dqo.zpg.run import zpg
from tests.dqo.zpg.verifiers import even

VERIFIER = "python:tests.dqo.zpg.verifiers:even"
OWN = {"parameters": ("norm",), "lora_r": 4, "lora_alpha": 8.0}


def options(files, output="out", **changes):
    rows = [{"prompt": f"{a}+{a % 7}=", "answer": str(a)} for a in range(10)]
    (files / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model_name_or_path": str(files / "model"), "tasks": str(files / "tasks.jsonl"), "verifier": VERIFIER}
    given |= {"output_dir": str(files / output), "max_steps": 6, "num_pairs": 12, "max_completion_length": 4}
    given |= {"save_steps": 2, "learning_rate": 0.01, "mu": 4.0, "lora_r": 1, "lora_alpha": 1.0, "use_cpu": True}
    return given | changes


def rows_of(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if not name.startswith("perf/")} for row in rows]


def _norms(directory):
    """What OWN trains."""
    found = [p.detach().flatten() for name, p in load_policy(str(directory)).named_parameters() if "norm" in name]
    return torch.cat(found).numpy()


def weights_of(directory):
    return {f"{path.name}/{n}": x for path in directory.glob("*.safetensors") for n, x in load_file(path).items()}


def same(one, other):
    ours, theirs = weights_of(one), weights_of(other)
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(x, theirs[n]) for n, x in ours.items())


class Here:
    """Grades in this process: to start others takes longer than these runs."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def grade(self, texts, problems):
        return [Grade(float(even(text, problem))) for text, problem in zip(texts, problems)]


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(module, "VerifierPool", Here)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(files, here, monkeypatch):
    changes = {"num_directions": 2, "judges": 3}
    whole = zpg(quiet=True, **options(files, "whole", **changes))
    rows = rows_of(files / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert (rows[-1]["queries"], rows[-1]["samples"]) == (whole.queries, whole.samples)
    assert whole.samples == 6 * 2 * 2 * 12 and 0 < whole.queries <= 3 * whole.samples / 2
    assert whole.queries == 3 * round(sum(row["queries/share"] * 2 * 12 for row in rows))
    assert len({row["update_norm"] for row in rows}) > 1

    put, left = module._put, [3 * 5 + 1]

    def dying(parameters, theta):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        put(parameters, theta)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # in the fourth step, its policy perturbed
        patch.setattr(module, "_put", dying)
        zpg(quiet=True, **options(files, "part", **changes))
    assert (files / "part" / "checkpoint-2").is_dir() and not (files / "part" / "checkpoint-4").exists()
    with (files / "part" / "metrics.jsonl").open("a") as file:
        file.write('{"step"')  # as if it had died inside of a line
    again = zpg(quiet=True, **options(files, "part", **changes))
    assert rows_of(files / "part") == rows
    assert (again.queries, again.samples) == (whole.queries, whole.samples)
    same(files / "whole", files / "part")
    assert sorted(p.name for p in (files / "part").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_signal_ends_the_step_and_keeps_it(files, here, monkeypatch):
    given = options(files, save_steps=100, max_steps=2, **OWN)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(signals, "noted", lambda: signal.SIGTERM)
        zpg(quiet=True, **given)
    assert ended.value.code == 128 + signal.SIGTERM and (files / "out" / "checkpoint-1").is_dir()
    assert zpg(quiet=True, **given).steps == 2
    zpg(quiet=True, **given | {"output_dir": str(files / "whole")})
    same(files / "whole", files / "out")


def test_its_steps_are_the_algorithm_written_as_loops(files, here, monkeypatch):
    seen = []
    put = module._put
    monkeypatch.setattr(module, "_put", lambda parameters, theta: seen.append(theta.copy()) or put(parameters, theta))
    given = options(
        files, difference="forward", max_steps=1, learning_rate=0.5, parameters=("norm",), lora_r=4, lora_alpha=8.0
    )
    zpg(quiet=True, **given)
    first, second, updated = seen
    (row,) = rows_of(files / "out")
    v = (second - first) / 4.0
    assert np.array_equal(first, _norms(files / "model")) and np.linalg.norm(v) == pytest.approx(1.0, abs=1e-5)
    sign = np.sign((updated - first) @ v)
    expected = 0.5 * len(v) / 4.0 * sign * row["value_difference/abs_mean"] * v
    assert np.allclose(updated - first, expected, atol=1e-5) and row["value_difference/abs_mean"] > 0
    assert np.array_equal(_norms(files / "out"), updated)


def test_it_climbs_where_the_value_is_known(files, here, monkeypatch):
    """A response is right with the probability sigmoid(a (theta - start)), |a| = 1; both policies share the random numbers."""
    start = _norms(files / "model")
    a = np.random.default_rng(0).standard_normal(len(start))
    a /= np.linalg.norm(a)

    def answers(self, chosen, k, pool):
        chance = 1 / (1 + np.exp(-(module._flat(self.parameters) - start) @ a))
        right = np.random.default_rng([self.counters["step"], k]).random(len(chosen)) < chance
        said = [Response([int(r)], [0.0], True) for r in right]
        return [Answered(self.problems[i], r, "", Grade(float(r.ids[0]))) for i, r in zip(chosen, said)]

    monkeypatch.setattr(module._Run, "_answers", answers)
    given = options(files, max_steps=40, num_pairs=100, mu=1.0, learning_rate=0.1, save_steps=40, **OWN)
    zpg(quiet=True, **given)
    rewards = [row["reward/mean"] for row in rows_of(files / "out")]
    assert rewards[0] < 0.65 and np.mean(rewards[-5:]) > 0.85
    assert (_norms(files / "out") - start) @ a > 1.5


def test_the_command_trains_and_what_it_writes_can_be_evaluated(files, capsys):
    given = options(files, max_steps=1, lora_r=2)
    words = [word for name, value in given.items() if name != "use_cpu" for word in (f"--{name}", str(value))]
    zpg_command([*words, "--use_cpu"])
    said = capsys.readouterr().out
    assert "1 steps, 24 samples" in said and "Next: dqo eval" in said
    assert (files / "out" / "adapter_model.safetensors").exists()
    found = evaluate(
        quiet=True, model_name_or_path=given["output_dir"], tasks=given["tasks"], verifier=VERIFIER, max_completion_length=4,
        output_dir=str(files / "eval"), greedy=False, num_generations=2, use_cpu=True,
    )  # fmt: skip
    assert found["problems"] == 10


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mu": 0.0}, "mu must be positive, got 0.0"),
        ({"num_pairs": 0}, "num_pairs must be at least 1, got 0"),
        ({"verifier": "nubmer"}, "verifier must be one of"),
        ({"judges": -1}, "judges must be at least 0"),
        ({"parameters": ("norm",)}, "lora_r must be left out with parameters"),
    ],
)
def test_options_out_of_range_are_named(files, changes, message):
    problems = ZPGConfig(**options(files, **changes)).problems()
    assert message in f"{problems[0][0]} {problems[0][1]}"


def test_what_does_not_fit_is_refused_before_anything_is_sampled(files, monkeypatch):
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("sampled"))

    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            zpg(quiet=True, **options(files, **changes))

    refused(
        "no parameter's name contains 'nrom'; there are model.embed", parameters=("nrom",), lora_r=4, lora_alpha=8.0
    )
    refused("no linear layer q_porj", lora_target_modules=("q_porj",))
    (files / "answerless.jsonl").write_text('{"prompt": "1+1="}\n')
    refused("answerless.jsonl:1: has no answer", tasks=str(files / "answerless.jsonl"))
    refused("holds model.safetensors|holds config.json", output_dir=str(files / "model"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("runs in one process")


def test_another_run_is_not_gone_on_with(files, here):
    zpg(quiet=True, **options(files, max_steps=1))
    with pytest.raises(UserError, match="checkpoint-1 belongs to another run: mu 4.0 then, 5.0 now"):
        zpg(quiet=True, **options(files, mu=5.0))
    with pytest.raises(UserError, match="another run: lora_target_modules None then, "):
        zpg(quiet=True, **options(files, lora_target_modules=("q_proj",)))
    shutil.copytree(files / "model", files / "other")
    (files / "other" / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="another run: model 'sha256:"):
        zpg(quiet=True, **options(files, model_name_or_path=str(files / "other")))
