"""A comparison: all is checked first, two do not mix, a killed one goes on, and its page is over all runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dqo.commands.compare import compare_command
from dqo.comparison import run as comparison
from dqo.comparison.plan import PlannedRun
from dqo.comparison.run import alone, claim, compare, is_finished, train_one
from dqo.errors import UserError
from tests.dqo import forked
from tests.pages import ROOT


def options(files, *more) -> list[str]:
    data = ["--dataset_name", str(files / "rollouts.jsonl"), "--model_name_or_path", str(files / "model")]
    return [*data, "--max_steps", "2", "--per_device_train_batch_size", "8", "--use_cpu", *more]


def never(*_):
    raise AssertionError("something was trained")


def test_a_plan_is_shown_and_nothing_is_written(files, capsys):
    words = options(files, "--dqo.value_warmup_steps", "1", "--output_dir", str(files / "out"))
    words += ["--rank_dpo.per_device_train_batch_size", "2"]
    compare_command(["--methods", "dqo,dpo,rank_dpo", "--seeds", "2", "--dry_run", *words])
    assert capsys.readouterr().out.splitlines() == [
        "dqo: 2 seeds, 2 updates of the policy after 1 of the value model alone, 8 responses each",
        "dpo: 2 seeds, 2 updates of the policy, 4 groups of 2 responses each",
        "rank_dpo: 2 seeds, 2 updates of the policy, 2 prompts with all their responses each",
        "# nothing was trained or written",
    ]
    assert not (files / "out").exists()


def test_every_method_that_refuses_the_data_is_named_before_any_training(files, monkeypatch):
    monkeypatch.setattr(comparison, "train_one", never)
    rows = [json.loads(line) for line in (files / "rollouts.jsonl").read_text().splitlines()]
    rows = [row | {"prompt": f"{i}+{row['prompt']}"} for i, row in enumerate(rows)]  # no two of a prompt: no pairs
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as refused:
        compare(["dqo", "dpo", "rebel", "kto"], seeds=1, output_dir=files / "out", options=options(files))
    lines = str(refused.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["method dpo", "method rebel", "Nothing was trained."]
    assert not (files / "out").exists()


@pytest.mark.parametrize("methods, seeds, message", [([], 3, "one method or more"), (["dqo"], 0, "one seed or more")])
def test_a_comparison_of_nothing_is_refused(methods, seeds, message):
    with pytest.raises(UserError, match=message):
        compare(methods, seeds=seeds)


def test_a_launcher_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="train each method under the launcher, and `dqo report` the runs"):
        compare(["dqo"])


def planned(tmp_path, name, *words):
    return PlannedRun("dqo", 0, tmp_path / "out" / name, ["--beta", "0.1", *words])


def test_a_directory_is_claimed_and_more_runs_may_join(tmp_path):
    out = tmp_path / "out"
    claim(out, [planned(tmp_path, "a")])
    claim(out, [planned(tmp_path, "b", "--seed", "1")])
    assert list(json.loads((out / "compare.json").read_text())["runs"]) == ["a", "b"]
    with pytest.raises(UserError, match=r"out/b was planned with other options: --seed 1 then, --seed 2 now"):
        claim(out, [planned(tmp_path, "b", "--seed", "2")])
    with pytest.raises(UserError, match="nothing then, --lam 0.5 now"):
        claim(out, [planned(tmp_path, "a", "--lam", "0.5")])


def test_a_directory_of_something_else_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out is in use; choose another"):
        claim(out, [planned(tmp_path, "a")])
    damaged = [
        "{",
        "[]",
        '{"runs": 3}',
        '{"runs": {"a": 5}}',
        '{"runs": {"a": "--beta"}}',
        '{"runs": {"a": ["--beta", 1]}}',
    ]
    for text in damaged:
        (out / "compare.json").write_text(text)
        with pytest.raises(UserError, match=r"compare\.json is damaged; choose another --output_dir, or delete"):
            claim(out, [planned(tmp_path, "a")])


def test_nothing_is_left_in_a_directory_of_something_else(files, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="mine is in use; choose another"):
        compare(["sft"], seeds=1, output_dir=out, options=options(files))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_second_comparison_is_kept_out(tmp_path):
    kept_out = "another comparison, or a run that it left behind, is at work in"
    with alone(tmp_path / "out"), pytest.raises(UserError, match=kept_out), alone(tmp_path / "out"):
        pass
    with alone(tmp_path / "out"):  # free again
        pass


def test_a_run_is_finished_when_it_is_reported(tmp_path):
    assert not is_finished(tmp_path)
    (tmp_path / "report.html").write_text("")
    for text, expected in (("{}", False), ('{"finished": false}', False), ("[]", False), ('{"finished": true}', True)):
        (tmp_path / "run.json").write_text(text)
        assert is_finished(tmp_path) is expected, text


def test_a_run_that_fails_is_named_with_its_status(tmp_path, capfd):
    with (
        alone(tmp_path / "out") as lock,
        pytest.raises(UserError, match="out/a: the run ended with status 2, see above"),
    ):
        train_one(PlannedRun("dqo", 0, tmp_path / "out" / "a", ["--betta", "1"]), lock)
    assert "unknown option '--betta'" in capfd.readouterr().err


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, methods, seeds",
    [(signal.SIGKILL, ["dqo"], [42, 43]), (signal.SIGTERM, ["dqo", "rft"], [42])],
    ids=["SIGKILL, two seeds", "SIGTERM, two methods"],
)
def test_a_comparison_that_was_ended_goes_on_without_repeating_what_is_finished(files, number, methods, seeds):
    tasks = [{"prompt": f"1+{i}=", "answer": "3"} for i in range(3)]
    (files / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    more = ("--eval_tasks", str(files / "tasks.jsonl"), "--verifier", "gsm8k", "--max_completion_length", "4")
    more += ("--num_generations", "2", "--dqo.beta", "0.3", "--logging_steps", "1")
    words = ["compare", "--methods", ",".join(methods), "--seeds", str(len(seeds)), "--output_dir", str(files / "out")]
    words += options(files, *more)
    process = forked.start(
        forked.run_in_place, forked.DQO_WITH_FORKS, words, [files / "log", files / "log"], files, {}, []
    )
    runs = [(method, seed) for method in methods for seed in seeds]
    first, second = (files / "out" / f"{method}-seed{seed}" for method, seed in runs)
    deadline = time.monotonic() + 600
    while not (second / "run.json").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (-9 if number == signal.SIGKILL else 143), (files / "log").read_text()
    assert is_finished(first)
    kept = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    while time.monotonic() < deadline:  # the run that it left behind ends by itself; until then nobody else may begin
        done = forked.run(*words, entry=forked.DQO_WITH_FORKS, place=files)
        if "is at work in" not in done.stderr:
            break
        time.sleep(0.5)
    assert done.returncode == 0, done.stderr
    assert f"{first} is finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == kept
    report = json.loads((files / "out" / "report.json").read_text())
    assert [(run["method"], run["seed"], run["state"]) for run in report["runs"]] == [
        (*run, "finished") for run in runs
    ]
    counts = [len(method.get("seeds", [None])) for method in report["methods"]]
    assert counts == [len(seeds)] * (1 + len(methods))  # the first is the base
    assert (report["options"] | report["options_of"].get("dqo", {}))["beta"] == 0.3 and report["warnings"] == []
    assert f"dqo compare --methods {','.join(methods)}" in report["command"]
    assert ("over seeds" in (files / "out" / "report.html").read_text()) == (len(seeds) > 1)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a run learns of the end of its parent on Linux")
def test_a_run_whose_comparison_is_killed_stops_with_a_checkpoint(files):
    directory = files / "out" / "a"
    words = [*options(files, "--method", "sft", "--logging_steps", "1"), "--output_dir", str(directory)]
    words[words.index("--max_steps") + 1] = "5000"
    code = (
        "import pathlib\nfrom dqo.comparison.plan import PlannedRun\nfrom dqo.comparison.run import alone, train_one\n"
        f"out = pathlib.Path({str(files / 'out')!r})\nwith alone(out) as lock:\n"
        f"    train_one(PlannedRun('sft', 0, out / 'a', {words!r}), lock)\n"
    )
    with (files / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=log, stderr=log)
    deadline = time.monotonic() + 600
    rows = directory / "metrics.jsonl"  # empty until the first step is done
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while not list(directory.glob("checkpoint-*/dqo_state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(directory.glob("checkpoint-*")), (files / "log").read_text()
    while "SIGTERM: stopped after step" not in (files / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "the same command goes on there" in (files / "log").read_text()
