"""What is planned: as many settings for all, needs before what needs them, and the setting that validates best."""

import json

import pytest

from benchmarks.evidence.pieces import in_order
from benchmarks.evidence.study import pieces, settings
from benchmarks.evidence.study.__main__ import wanted
from benchmarks.evidence.study.confirmation import CLAIMS, NEW_SEEDS
from benchmarks.evidence.study.pieces import Piece
from benchmarks.evidence.study.sizes import PRIMARY, SEEDS, TASKS, TUNING_SEED
from dqo.config.options import options_of

PLACES = {"output_dir": "out", "model_name_or_path": "model", "dataset_name": "rows"}


def test_every_method_has_nine_settings_that_differ_and_the_same_updates_of_its_policy():
    for task in TASKS:
        for name in settings.methods_of(task):
            method = settings.METHODS[name]
            tried = settings.METHODS[method.tuned_as or name].settings
            assert len(tried) == settings.COUNT == len({json.dumps(one) for one in tried}), name
            for setting in tried if task == "d" or method.only else tried[:1]:
                options = settings.options_for(task, method, setting)
                assert options.pop("file").endswith(".jsonl")
                train = options_of(options | PLACES, name).train
                assert train.max_steps - train.value_warmup_steps == TASKS[task].updates // TASKS[task].rounds
                assert train.per_device_train_batch_size == TASKS[task].batch // (2 if method.pairs else 1)


@pytest.mark.parametrize("change", settings.ABLATIONS)
def test_every_ablation_changes_the_options_of_dqo(change):
    method = settings.METHODS["dqo"]
    for setting in method.settings:
        made, whole = (settings.options_for("a", method, setting, of) for of in (settings.ABLATIONS[change], None))
        assert (made == whole) == (change == "no weights" and setting.get("is_level") == "none")
        options_of({k: v for k, v in made.items() if k != "file"} | PLACES, change)


def test_all_pieces_come_once_and_behind_what_they_need():
    every = pieces.every_piece()
    place = {piece.place: i for i, piece in enumerate(every)}
    assert len(place) == len(every)
    for piece in every:
        assert all(place[needed.place] < place[piece.place] for needed in piece.needs()), piece
    seeds = {(p.name, p.method): set() for p in every if p.stage == "train"}
    for piece in every:
        if piece.stage == "train":
            seeds[piece.name, piece.method].add(piece.seed)
    for task in TASKS:
        assert all(seeds[task, name] == set(SEEDS) for name in settings.methods_of(task))
        tuned = {p.method for p in every if p.name == task and p.stage == "tune" and p.setting is not None}
        assert bool(tuned) == (TASKS[task].tuned_on is None)
    for task, contender in PRIMARY.items():
        assert {contender, "shuffled", "sft", "rft", "dpo", "kto"} <= set(settings.methods_of(task))


def test_each_task_is_complete_before_the_next_begins():
    order = [p.name for p in pieces.every_piece() if p.stage == "train"]
    tasks = list(dict.fromkeys(order))
    assert tasks[:4] == ["a", "d", "f", "b14"] and order == sorted(order, key=tasks.index)
    tuned = [p.name for p in pieces.every_piece() if p.stage == "tune"]
    assert tuned == sorted(tuned, key=tasks.index)


def test_the_second_test_has_seeds_of_its_own_and_the_settings_that_were_chosen():
    runs = [piece for piece in pieces.every_piece() if piece.stage == "confirm"]
    assert {p.seed for p in runs} == set(NEW_SEEDS) and not {TUNING_SEED, 0, 1, 2, 3, 4, 5} & set(NEW_SEEDS)
    for claim in CLAIMS:
        assert claim.contender not in claim.rivals and set(claim.methods) <= set(settings.methods_of(claim.task))
        made = {(p.method, p.seed) for p in runs if p.name == claim.task}
        assert {(name, seed) for name in ("base", *claim.methods) for seed in NEW_SEEDS} <= made
    assert all(piece.stage == "tune" for run in runs for piece in run.tuning())


def test_dqo_has_a_head_and_the_older_methods_a_value_model_of_their_own():
    def value_model(name):
        options = settings.options_for("a", settings.METHODS[name], {"beta": 0.2})
        return options_of({k: v for k, v in options.items() if k != "file"} | PLACES, name).objective.value_model

    ours = ("dqo", "shuffled", "dqo-steps", "dqo-noisy", "dqo-measured", "dqo-unweighted")
    assert {value_model(name) for name in ours} == {"head"}
    assert {value_model(name) for name in ("dro", "oreo", "dqo-paper")} == {"separate"}


def test_labels_are_balanced_for_kto_and_values_begin_at_the_mean_where_that_is_far():
    for task in TASKS:
        for name in settings.methods_of(task):
            options = settings.options_for(task, settings.METHODS[name], {})
            assert (options.get("desirable_weight", 1) > 1) == (name == "kto")
            fitted = name in ("dro", "oreo", "dqo-paper") or name.startswith("dqo") and name != "dqo-soft"
            fitted |= name == "shuffled"
            assert (options.get("value_init") == "mean_return") == (fitted and task in ("f", "g2", "g4")), name


def test_no_seed_of_the_test_is_one_of_tuning():
    assert TUNING_SEED not in SEEDS
    for piece in pieces.every_piece():
        assert (piece.stage == "tune") == (piece.kind == "run" and piece.seed == TUNING_SEED)
        assert all(needed.seed == TUNING_SEED for needed in piece.tuning())


def write(piece, root, greedy, spec=None):
    path = root / piece.place / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"greedy": greedy, "sampling": [[one, one] for one in greedy], "failed": None, "cpu_seconds": 1.0}
    result |= {"all_cpu_seconds": 1.0, "spec": pieces.spec_of(piece, root) if spec is None else spec}
    path.write_text(json.dumps(result))


def test_the_best_setting_is_chosen_when_all_were_tried_and_the_first_of_equals(tmp_path):
    run = Piece("run", "b28", 0, "dpo")  # has those of b14
    tried = run.tuning()
    assert [(p.name, p.seed, p.setting) for p in tried] == [("b14", TUNING_SEED, k) for k in range(9)]
    for piece, right in zip(tried[:8], (0, 2, 3, 3, 1, 0, 0, 0)):
        write(piece, tmp_path, [int(i < right) for i in range(4)])
    assert pieces.options_of_run(run, tmp_path) is None
    write(tried[8], tmp_path, [0, 0, 0, 0])
    assert pieces.chosen(tried, tmp_path) == 2
    options = pieces.options_of_run(run, tmp_path)
    assert settings.METHODS["dpo"].settings[2].items() <= options.items() and options["max_steps"] == 64
    write(tried[2], tmp_path, [1, 1, 1, 1], spec={"other": "options"})  # of an earlier declaration
    assert pieces.chosen(tried, tmp_path) is None


def test_what_is_wanted_brings_what_it_needs():
    found = in_order(wanted(["b28"], ["dpo"], ["train"]))
    assert {p.method for p in found if p.kind == "run"} == {"base", "dpo"}
    assert {(p.name, p.stage) for p in found} >= {
        ("b14", "tune"),
        ("b28", "train"),
        ("6-10", "data"),
        ("24-32", "data"),
    }
    assert {p.stage for p in in_order(wanted(["a"], ["dpo"], ["data"]))} == {"data"} and wanted(
        ["a"], ["dpo"], ["table"]
    ) == []
