"""The runs of a comparison: one budget for all, and options of one method alone."""

from pathlib import Path

import pytest

from dqo.comparison.plan import Flag, flags_of, plan
from dqo.config.options import load_options
from dqo.errors import UserError

COMMON = ["--dataset_name", "a.jsonl", "--model_name_or_path", "M", "--max_steps", "20"]


def planned(*words, methods=("dqo", "dpo", "kto"), seeds=2):
    return plan(methods, seeds, Path("out"), flags_of([*COMMON, *words]))


def options_of(*words, **given):
    """{method: the options of its first run}"""
    runs, firsts = planned(*words, **given)
    assert len(runs) == given.get("seeds", 2) * len(firsts)
    return {first.train.method: first for first in firsts}


def test_options_are_split_from_their_values():
    words = ["--a", "1", "-2", "--dqo.b-c=x.y", "--data=a.b=c", "--flag"]
    assert flags_of(words) == [
        Flag("a", ["--a", "1", "-2"]),
        Flag("dqo.b_c", ["--dqo.b-c=x.y"]),
        Flag("data", ["--data=a.b=c"]),
        Flag("flag", ["--flag"]),
    ]
    with pytest.raises(UserError, match="unexpected argument 'x'"):
        flags_of(["x", "--a"])


def test_each_run_has_its_seed_and_its_directory():
    runs, _ = planned("--seed", "5", "--output_dir", "ignored")
    assert [(run.method, run.seed, str(run.directory)) for run in runs[:3]] == [
        ("dqo", 5, "out/dqo-seed5"),
        ("dqo", 6, "out/dqo-seed6"),
        ("dpo", 5, "out/dpo-seed5"),
    ]
    for run in runs:
        config = load_options(run.arguments).train
        assert (config.method, config.seed, config.output_dir) == (run.method, run.seed, str(run.directory))


def test_every_method_makes_the_same_updates_from_as_many_responses():
    found = options_of("--per_device_train_batch_size", "8", "--value_warmup_steps", "5")
    budgets = {
        m: (o.train.max_steps, int(o.train.value_warmup_steps), o.train.per_device_train_batch_size)
        for m, o in found.items()
    }
    assert budgets == {"dqo": (25, 5, 8), "dpo": (20, 5, 4), "kto": (20, 5, 8)}  # pairs, and no value model to warm up


def test_a_share_of_warm_up_is_one_of_the_updates():
    config = options_of("--dqo.value_warmup_steps", "0.25", methods=("dqo",))["dqo"].train
    assert (config.max_steps, config.value_warmup_steps) == (25, 5)


def test_an_option_of_one_method_goes_before_that_of_all():
    words = [
        "--learning_rate",
        "1e-4",
        "--dpo.learning_rate=2e-4",
        "--dpo.beta",
        "0.7",
        "--dqo.is_cap",
        "-1.5",
        "--kto.bf16",
    ]
    found = options_of(*words)
    assert [o.train.learning_rate for o in found.values()] == [1e-4, 2e-4, 1e-4]
    assert found["dpo"].objective.beta == 0.7 and found["dqo"].objective.is_cap == -1.5
    assert found["kto"].train.bf16 and not found["dqo"].train.bf16


def test_a_method_may_have_a_file_of_options(tmp_path):
    (tmp_path / "dqo.yaml").write_text("beta: 0.4\nlam: 0.9\n")
    found = options_of("--dqo.config", str(tmp_path / "dqo.yaml"))
    assert (found["dqo"].objective.beta, found["dqo"].objective.lam, found["dpo"].objective.beta) == (0.4, 0.9, 0.1)


def test_a_batch_that_is_given_for_a_method_of_pairs_is_taken_as_it_is():
    found = options_of("--per_device_train_batch_size", "8", "--dpo.per_device_train_batch_size", "7")
    assert found["dpo"].train.per_device_train_batch_size == 7


@pytest.mark.parametrize(
    "words, message",
    [
        (["--per_device_train_batch_size", "7"], "method dpo: .*7 responses cannot be cut into groups of 2"),
        (["--max_steps", "-1"], "method dqo: give --max_steps, the updates that every method makes"),
        (["--lam", "0.9"], "method dpo: unknown option '--lam'"),
        (["--kto.lamb", "0.9"], "method kto: unknown option '--lamb'"),
        (["--beta", "-1"], "method dqo: .*beta must be positive, got -1"),
        (["--sft.beta", "1"], "--sft.beta is of the method sft, and --methods has dqo, dpo, kto"),
        (["--method", "dpo"], "--method is not an option of a comparison; what takes its place is --methods"),
        (["--dpo.max_steps", "3"], "--dpo.max_steps: every method has the same max_steps; give --max_steps"),
        (["--dqo.seed", "3"], "every method has the same seed"),
    ],
)
def test_what_does_not_fit_is_named_with_its_method(words, message):
    with pytest.raises(UserError, match=message):
        planned(*words)


def test_a_method_of_lists_is_told_how_many_prompts_an_update_has():
    with pytest.raises(
        UserError, match="method rank_dpo: .*give --rank_dpo.per_device_train_batch_size: 8 responses are 1 prom"
    ):
        planned("--per_device_train_batch_size", "8", methods=("rank_dpo",))
    words = ("--per_device_train_batch_size", "8", "--rank_dpo.per_device_train_batch_size", "1")
    assert options_of(*words, methods=("rank_dpo",))["rank_dpo"].train.per_device_train_batch_size == 1


@pytest.mark.parametrize("methods, message", [(("dqo", "dqo"), "names dqo twice"), (("dqo", "dpoo"), "dpoo")])
def test_methods_are_known_and_differ(methods, message):
    with pytest.raises(UserError, match=message):
        planned(methods=methods)
