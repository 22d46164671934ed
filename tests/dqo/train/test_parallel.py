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
from tests.dqo import forked
from tests.dqo.helpers import arguments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

# What each run changes; the number of responses in a step stays 8. What wraps or shards other modules is trained in both ways;
# objectives that differ in their sums over the rows of all processes alone, in one of them.
RUNS = {
    "dqo": {"value_warmup_steps": 4, "max_steps": 8},
    "head": {  # packed, and layers recomputed
        "value_model": "head",
        "padding_free": "True",
        "max_batch_tokens": 60,
        "gradient_checkpointing": True,
    },
    "form": {
        "value_loss": "hl_gauss",
        "value_input": "ref_logprob",
        "value_init": "mean_return",
        "value_warmup_steps": 2,
        "max_steps": 6,
    },
    "average": {"target_ema": 0.8, "lam": 0.5, "gradient_checkpointing": True},
    "reference": {"ref_model_name_or_path": "other"},  # of another model, which is sharded too
    "untied": {"model_name_or_path": "untied", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "offload": {"fsdp_cpu_offload": True},  # under FSDP2; shards in main memory
    "adapter": {"use_peft": True, "lora_r": 2, "kl_coef": 0.1},
    # the greatest loss is an early one: weights of an earlier step are put back into the wrapped models
    "best": {
        "max_steps": 6,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": "True",
    },
    "one group a step": {"per_device_train_batch_size": 1},  # one process has nothing of it
}
RUNS = {name: {"value_model": "separate"} | changes for name, changes in RUNS.items()}
BY_ROWS = {
    "implicit": ("fsdp", {"value_model": "implicit"}),
    "soft": ("fsdp", {"value_model": "none"}),
    "likely": ("ddp", {"nll_coef": 0.1}),
    "dpo": ("ddp", {"method": "dpo"}),
    "sft": ("fsdp", {"method": "sft"}),
    "kto": ("ddp", {"method": "kto"}),  # with the mean over the companions of the whole step
    "oreo": ("fsdp", {"method": "oreo"}),  # with the reference's logits
    "curry": ("fsdp", {"method": "curry_dpo", "stages": 2, "max_steps": 6}),  # whose reference is refreshed
    "rank": ("ddp", {"method": "rank_dpo"}),
    "xpo": ("ddp", {"method": "xpo", "alpha": 0.01, "reference_rows": "all"}),
    "adpo": ("ddp", {"method": "adpo", "threshold": 0.001, "max_steps": 8}),  # with questions of both processes
    "qrpo": ("ddp", {"method": "qrpo"}),
    "tbrm": ("fsdp", {"method": "tbrm"}),
    "dapo": ("ddp", {"method": "dapo", "process_reward": "potential", "max_steps": 6}),
    "etpo": ("fsdp", {"method": "etpo", "target_ema": 0.5}),  # with a second language model and its average
    # models whose head is gathered alone: the reference's logits, two heads at once, a head beside a running sum
    "untied oreo": ("fsdp", {"method": "oreo", "model_name_or_path": "untied"}),
    "untied etpo": ("fsdp", {"method": "etpo", "target_ema": 0.5, "model_name_or_path": "untied"}),
    "untied implicit": ("fsdp", {"value_model": "implicit", "model_name_or_path": "untied"}),
    "ppo": ("ddp", {"method": "ppo", "behavior": "reference"}),  # with means over the responses of the whole step
    "weights": ("ddp", {"max_steps": 8}),  # of two data sets
    # value models that earlier runs have fitted
    "fitted": ("fsdp", {"value_model": "dqo-one"}),
    "fitted head": ("fsdp", {"value_model": "head-one"}),
    "frozen": ("fsdp", {"value_model": "dqo-one", "freeze_value_model": True}),
    "frozen implicit": ("ddp", {"value_model": "implicit-one", "freeze_value_model": True}),
}
PAIRS = [(name, kind) for name in RUNS for kind in ("ddp", "fsdp")] + [(n, kind) for n, (kind, _) in BY_ROWS.items()]


def flags(files, output, **changes):
    plain = {name: value for name, value in changes.items() if value is not True}
    return [*arguments(files, output_dir=output, **plain), *(f"--{name}" for name, v in changes.items() if v is True)]


def many(files):
    """The runs of runs.json, in two processes."""
    for done in forked.launch(files / "runs.json", entry="tests.dqo.run_many:main"):
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run by one process, by two, and by two with shards; {(name, kind): directory}."""
    from dqo.models.new import save
    from tests.dqo.helpers import measured, policy, rollout_rows, tokenizer, untied

    files = tmp_path_factory.mktemp("runs")
    save(policy(), tokenizer(), files / "model")
    rows = rollout_rows(prompts=12, samples=4)
    more = rollout_rows(prompts=5, samples=3, seed=1)
    for file, its_rows in (("rollouts", rows), ("measured", measured(rows)), ("more", more)):
        (files / f"{file}.jsonl").write_text("\n".join(map(json.dumps, its_rows)))
    save(policy(seed=5), tokenizer(), files / "other")
    save(untied(), tokenizer(), files / "untied")
    found, lists = {}, []
    for name, changes in (RUNS | {name: changes for name, (_, changes) in BY_ROWS.items()}).items():
        changes = {"logging_steps": 2, "max_steps": 4} | changes
        if "process_reward" in changes:
            changes["dataset_name"] = files / "measured.jsonl"
        if name == "weights":
            changes["dataset_name"] = f"{files / 'rollouts.jsonl'}:0.4,{files / 'more.jsonl'}:0.6"
        models = {"ref_model_name_or_path", "model_name_or_path"} & changes.keys()
        if "fitted" in name or "frozen" in name:
            models.add("value_model")
        changes |= {option: files / str(changes[option]) for option in models}
        offload = changes.pop("fsdp_cpu_offload", False)
        alone = {"per_device_train_batch_size": 8} | changes
        if name == "untied":  # twice 2 on each of two
            alone["per_device_train_batch_size"] = 4
        if name == "one group a step":  # over two processes 1 each is a step of 2: here one group of it would do
            alone["per_device_train_batch_size"] = 2
        found[name, "one"] = train(load_options(flags(files, files / f"{name}-one", **alone))).output_dir
        for kind in [kind for other, kind in PAIRS if other == name]:
            found[name, kind] = files / f"{name}-{kind}"
            both = {"per_device_train_batch_size": 4} | changes | ({"fsdp": True} if kind == "fsdp" else {})
            if kind == "fsdp" and offload:
                both["fsdp_cpu_offload"] = True
            lists.append(flags(files, found[name, kind], **both))
    (files / "runs.json").write_text(json.dumps(lists))
    many(files)
    return found


def logged(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    skipped = ("perf/", "eval_data/", "data/padding_frac")  # speeds, and what depends on who is padded with whom
    return [{name: value for name, value in row.items() if not name.startswith(skipped)} for row in rows]


@pytest.mark.parametrize("name, kind", PAIRS)
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
    many(files)
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
    many(files)
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
    """As a user starts it; the processes of the other tests are forks."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--use_fsdp", "--fsdp_version", "2", "-m", "dqo.train", *flags(files, files / "out", max_steps=2)]
    environment = {"OMP_NUM_THREADS": "1", "PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report:") == 1  # one process speaks
    assert (files / "out" / "report.html").exists()


def test_what_is_not_sharded_stays_as_it_is():
    tensor = torch.ones(3)
    assert whole(tensor) is tensor and like(tensor, torch.zeros(3)) is tensor
