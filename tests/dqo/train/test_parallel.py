"""Two processes (gloo) train what one process trains: DDP, and FSDP2's shards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqo.config.options import load_options
from dqo.train.parallel import like, whole
from dqo.train.run import train
from tests.dqo.helpers import arguments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]

# what each run changes; the number of responses in a step stays 8
RUNS = {
    "dqo": {"value_warmup_steps": 4, "max_steps": 8},
    "head": {"value_model": "head"},
    "soft": {"value_model": "none"},
    "dpo": {"method": "dpo"},
    "sft": {"method": "sft"},
    "kto": {"method": "kto"},  # with the mean over the companions of the whole step
    "oreo": {"method": "oreo"},  # with the reference's logits
    "form": {
        "value_loss": "hl_gauss",
        "value_input": "ref_logprob",
        "value_init": "mean_return",
        "value_warmup_steps": 2,
        "max_steps": 6,
    },
    "average": {"target_ema": 0.8, "lam": 0.5},
    "implicit": {"value_model": "implicit"},
    "reference": {"ref_model_name_or_path": "other"},  # of another model, which is sharded too
    "offload": {"fsdp_cpu_offload": True},  # under FSDP2; shards in main memory
    "packed": {"padding_free": "True", "max_batch_tokens": 60},
    "adapter": {"use_peft": True, "lora_r": 2, "kl_coef": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    # the greatest loss is an early one: weights of an earlier step are put back into the wrapped models
    "best": {
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": "True",
    },
    "one group a step": {"per_device_train_batch_size": 1, "max_steps": 4},  # one process has nothing of it
}


def flags(files, output, **changes):
    plain = {name: value for name, value in changes.items() if value is not True}
    return [*arguments(files, output_dir=output, **plain), *(f"--{name}" for name, v in changes.items() if v is True)]


def launch(*command):
    environment = {"OMP_NUM_THREADS": "1", "PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*LAUNCH, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run by one process, by two, and by two with shards; {(name, kind): directory}."""
    from dqo.models.new import save
    from tests.dqo.helpers import policy, rollout_rows, tokenizer

    files = tmp_path_factory.mktemp("runs")
    save(policy(), tokenizer(), files / "model")
    save(policy(seed=5), tokenizer(), files / "other")
    lines = [json.dumps(row) for row in rollout_rows(prompts=12, samples=4)]
    (files / "rollouts.jsonl").write_text("\n".join(lines))
    found, lists = {}, []
    for name, changes in RUNS.items():
        changes = {"logging_steps": 2, "max_steps": 6} | changes
        if "ref_model_name_or_path" in changes:
            changes["ref_model_name_or_path"] = files / "other"
        offload = changes.pop("fsdp_cpu_offload", False)
        alone = {"per_device_train_batch_size": 8} | changes
        if name == "one group a step":  # over two processes 1 each is a step of 2: here one group of it would do
            alone["per_device_train_batch_size"] = 2
        found[name, "one"] = train(load_options(flags(files, files / f"{name}-one", **alone))).output_dir
        for kind in ("ddp", "fsdp"):
            found[name, kind] = files / f"{name}-{kind}"
            both = {"per_device_train_batch_size": 4} | changes | ({"fsdp": True} if kind == "fsdp" else {})
            if kind == "fsdp" and offload:
                both["fsdp_cpu_offload"] = True
            lists.append(flags(files, found[name, kind], **both))
    (files / "runs.json").write_text(json.dumps(lists))
    launch("--multi_gpu", "-m", "tests.dqo.run_many", str(files / "runs.json"))
    return found


def logged(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    skipped = ("perf/", "eval_data/", "data/padding_frac")  # speeds, and what depends on who is padded with whom
    return [{name: value for name, value in row.items() if not name.startswith(skipped)} for row in rows]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_log_and_learn_what_one_does(runs, name, kind):
    expected, found = logged(runs[name, "one"]), logged(runs[name, kind])
    assert len(expected) == len(found)
    for one, two in zip(expected, found):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=2e-5), key
    for file in runs[name, "one"].rglob("*model.safetensors"):
        one, two = load_file(file), load_file(runs[name, kind] / file.relative_to(runs[name, "one"]))
        assert one.keys() == two.keys()
        for key in one:
            assert torch.allclose(one[key], two[key], atol=2e-4), (file.name, key)
    facts = json.loads((runs[name, kind] / "found.json").read_text())
    assert facts["world"] == 2
    assert facts["sharded"] == (kind == "fsdp")


def test_a_run_of_two_processes_is_continued_by_one_and_the_other_way_round(files):
    """Checkpoints hold whole tensors: what differs is the rounding of the sums."""
    steps = {"logging_steps": 2, "max_steps": 8, "save_steps": 4, "save_total_limit": 5}
    one = {"per_device_train_batch_size": 8, **steps}
    two = {"per_device_train_batch_size": 4, **steps, "fsdp": True, "fsdp_cpu_offload": True}  # neither binds the run
    whole_run = train(load_options(flags(files, files / "whole", **one)))
    shutil.copytree(whole_run.output_dir, files / "by_two")
    shutil.rmtree(files / "by_two" / "checkpoint-8")
    both = [flags(files, files / "mixed", **two), flags(files, files / "by_two", **two)]
    (files / "runs.json").write_text(json.dumps(both))
    launch("--multi_gpu", "-m", "tests.dqo.run_many", str(files / "runs.json"))
    found = json.loads((files / "by_two" / "found.json").read_text())
    assert found["held_out"] == pytest.approx(whole_run.held_out, rel=1e-3, abs=1e-5)
    shutil.rmtree(files / "mixed" / "checkpoint-8")
    resumed = train(load_options(flags(files, files / "mixed", **one)))
    assert resumed.held_out == pytest.approx(whole_run.held_out, rel=1e-3, abs=1e-5)


def test_weights_in_bfloat16_are_trained_by_two_processes_as_by_one(files):
    settings = {"dtype": "bfloat16", "max_steps": 6, "learning_rate": 1e-4}
    one = train(load_options(flags(files, files / "one", per_device_train_batch_size=8, **settings)))
    two = {"per_device_train_batch_size": 4, **settings}
    runs = [flags(files, files / "ddp", **two), flags(files, files / "fsdp", **two, fsdp=True)]
    (files / "runs.json").write_text(json.dumps(runs))
    launch("--multi_gpu", "-m", "tests.dqo.run_many", str(files / "runs.json"))
    for kind in ("ddp", "fsdp"):
        found = json.loads((files / kind / "found.json").read_text())["held_out"]
        assert found["eval_loss"] == pytest.approx(one.held_out["eval_loss"], rel=0.02)
        weights, expected = (
            load_file(path / "checkpoint-6" / "model.safetensors") for path in (files / kind, files / "one")
        )
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        start = load_file(files / "model" / "model.safetensors")
        for name, tensor in expected.items():
            moved = (tensor - start[name].bfloat16()).abs().mean()
            assert (weights[name] - tensor).abs().mean() < 0.5 * moved, name


def test_the_command_that_the_documentation_names_shards_and_reports(files):
    output = launch("--use_fsdp", "--fsdp_version", "2", "-m", "dqo.train", *flags(files, files / "out", max_steps=2))
    assert output.count("report:") == 1  # one process speaks
    assert (files / "out" / "report.html").exists()


def test_what_is_not_sharded_stays_as_it_is():
    tensor = torch.ones(3)
    assert whole(tensor) is tensor and like(tensor, torch.zeros(3)) is tensor
