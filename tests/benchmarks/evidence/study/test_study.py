"""The study in small, from base model to tables: it goes on where it was, and what failed counts as the base model."""

import dataclasses
import json

import pytest

from benchmarks.evidence.pieces import in_order
from benchmarks.evidence.study import __main__ as study
from benchmarks.evidence.study import data, pieces, settings, sizes, training
from benchmarks.evidence.study.confirmation import CLAIMS, NEW_SEEDS
from benchmarks.evidence.study.markdown import markdown
from benchmarks.evidence.study.pieces import Piece
from benchmarks.evidence.study.tables import claims, confirmed, rows_of, summarise
from dqo.data.rows import read_rows, write_rows
from dqo.demo.rollouts import graded_rows, rng_of
from dqo.errors import UserError

TINY = sizes.Base(
    2, 3, demonstrations=96, warmup=1, evaluation=6, prompts=8, hidden_size=16, layers=1, batch=32, hard_share=0.4
)
SMALL = {"prompts": 8, "rows": None, "updates": 2, "batch": 8, "warmup": 1, "eval_problems": 6, "eval_samples": 2}


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """In the place of benchmarks/results."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "benchmarks/results")
    study.RESULTS.mkdir(parents=True)


@pytest.fixture
def small(monkeypatch):
    """The study with tiny models, and methods of one setting."""
    for name, base in sizes.BASES.items():
        monkeypatch.setitem(sizes.BASES, name, dataclasses.replace(TINY, after=base.after, author=base.author))
    for name, task in sizes.TASKS.items():
        monkeypatch.setitem(sizes.TASKS, name, dataclasses.replace(task, **SMALL))
    for name, method in settings.METHODS.items():
        monkeypatch.setitem(settings.METHODS, name, dataclasses.replace(method, settings=method.settings[:1]))


@pytest.fixture
def samples(small, tmp_path):
    """The tiny base model of seed 0, with demonstrations in the place of its samples."""
    training.make(Piece("base", "6-10", 0), tmp_path)
    task, rng = TINY.arith, rng_of(0, "test")
    problems = data.problems_of(TINY, 0)[1]
    rows = [graded_rows(task, p, [(task.demonstration(p, rng), True) for _ in range(24)]) for p in problems]
    write_rows(tmp_path / "base/6-10/seed-0/samples.jsonl", [row for found in rows for row in found])
    return tmp_path


@pytest.mark.slow
def test_it_goes_on_from_piece_to_piece_and_ends_in_tables(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pieces, "SEEDS", sizes.SEEDS[:2])
    monkeypatch.setattr(pieces, "FEW_SEEDS", (0,))
    asked = [str(tmp_path), "--task", "a,g2", "--method", "kto,dpo", "--stage", "train"]
    study.main([*asked, "--minutes", "0"])
    assert "pieces are left" in capsys.readouterr().out
    study.main(asked)
    out = capsys.readouterr().out
    assert "pieces are left" not in out and "| `kto` | 0.0 " in out and (tmp_path / "study.svg").exists()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/result.json")}
    assert len(made) == len(in_order(study.wanted(["a", "g2"], ["kto", "dpo"], ["train"])))
    study.main(asked)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/result.json")}
    # a random model is never right: no pair for dpo, which counts as the base model
    failed, base = (
        json.loads((tmp_path / f"runs/a/{name}/seed-0/result.json").read_text()) for name in ("dpo", "base")
    )
    assert (
        "0 pairs" in failed["failed"] and failed["greedy"] == base["greedy"] and failed["sampling"] == base["sampling"]
    )
    trained = json.loads((tmp_path / "runs/g2/kto/seed-0/result.json").read_text())
    assert trained["failed"] is None and len(trained["greedy"]) == 6 and len(trained["sampling"][0]) == 2
    first, second = (read_rows(str(tmp_path / f"runs/g2/kto/seed-0/round-{k}/rows.jsonl")) for k in (0, 1))
    assert not {row.prompt for row in first} & {row.prompt for row in second}
    assert first[0].sampling["model_hash"] != second[0].sampling["model_hash"]  # the policy of the round before

    study.main([*asked[:1], "--stage", "table", "--record"])
    lines = {name: (study.RESULTS / f"study/{name}.jsonl").read_text().splitlines() for name in ("a", "g2")}
    assert len(lines["a"]) + len(lines["g2"]) == len([path for path in made if "runs" in path.parts])
    another = tmp_path / "another"
    study.main([str(another), *asked[1:]])
    assert not (another / "data").exists() and not (another / "base").exists()
    tables = [(place / "tables.md").read_text().split("## a")[1] for place in (tmp_path, another)]
    assert tables[0] == tables[1]
    left_out = [line for line in lines["a"] if json.loads(line)["place"] != "runs/a/kto/seed-2"]
    (study.RESULTS / "study/a.jsonl").write_text("".join(line + "\n" for line in left_out))
    capsys.readouterr()
    study.main([str(tmp_path / "third"), *asked[1:]])
    out = capsys.readouterr().out  # the base model and its samples come out as they were, in another directory too
    assert "set aside" not in out and "1 left" in out and "10 left" not in out
    again = [(place / "tables.md").read_text().split("## a")[1] for place in (tmp_path, tmp_path / "third")]
    assert [one.split(" |")[:6] for one in again[:1]] == [one.split(" |")[:6] for one in again[1:]]


@pytest.mark.slow
def test_every_task_gets_its_files_and_methods_train_on_them(samples):
    for name in ("other", "12-16"):
        training.make(Piece("base", name, 0), samples)
    for task in ("c", "d", "e1", "e3", "f"):
        found = training.make(Piece("data", task, 0), samples)
        assert found["rows"] == len(read_rows(str(samples / "data" / task / "seed-0" / "rows.jsonl"))) > 0
    measured = read_rows(str(samples / "data/d/seed-0/measured.jsonl"))
    labelled = read_rows(str(samples / "data/d/seed-0/steps.jsonl"))
    assert [row.completion for row in measured] == [row.completion for row in labelled]
    assert all(0 <= value <= 1 for row in measured for value in [row.prompt_value, *row.step_rewards])
    mixed = read_rows(str(samples / "data/e3/seed-0/rows.jsonl"))
    assert all(len(row.logprobs) == len(row.completion_ids) for row in mixed)
    wrote = {(row.sampling["model_hash"], row.sampling["temperature"]) for row in mixed}
    assert len(wrote) == 3 and len({temperature for _, temperature in wrote}) == 2
    for task, method in (
        ("d", "dqo-measured"),
        ("d", "dqo-noisy"),
        ("f", "dqo-steps"),
        ("f", "rft-steps"),
        ("e3", "dqo"),
    ):
        run = Piece("run", task, 0, method, setting=0)
        training.make(Piece("run", task, 0, "base"), samples)
        assert training.make(run, samples)["failed"] is None, method


@pytest.mark.parametrize("name", ["run", "round-1/run"])
def test_a_run_that_ended_itself_is_scored_by_what_it_kept(name, tmp_path, monkeypatch):
    def ended(piece, task, options, root):
        for checkpoint in ("round-0/run/checkpoint-48", f"{name}/checkpoint-8", f"{name}/checkpoint-16"):
            (root / piece.place / checkpoint).mkdir(parents=True, exist_ok=True)
        raise UserError(f"collapsed; {root} is kept")

    scored = []
    monkeypatch.setattr(training, "options_of_run", lambda *_: {})
    monkeypatch.setattr(training, "trained", ended)
    monkeypatch.setattr(training, "trained_in_rounds", ended)
    monkeypatch.setattr(training, "evaluated", lambda task, base, model, seed: scored.append(model) or {})
    piece = Piece("run", "g2" if "round" in name else "a", 0, "dqo")
    assert training.run(piece, tmp_path)["failed"] == "collapsed; DIRECTORY is kept"
    assert scored == [tmp_path / piece.place / name / "checkpoint-16"]


def test_data_are_made_for_runs_alone_unless_they_are_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "go_on", lambda _, __, wanted, *___: asked.append(wanted) or 0)
    study.main([str(tmp_path)])
    study.main([str(tmp_path), "--stage", "data"])
    assert [{piece.kind for piece in wanted} for wanted in asked] == [{"run"}, {"data"}]


def test_a_study_without_a_run_records_nothing(tmp_path, capsys):
    study.main([str(tmp_path / "new"), "--stage", "table", "--record"])
    assert not [path for path in study.RESULTS.rglob("*") if path.is_file()]
    assert "no table is recorded" in capsys.readouterr().out
    told = json.loads((tmp_path / "new/results.json").read_text())["command"]
    assert told == "python -m benchmarks.evidence.study DIRECTORY --stage table --record"  # not where it lies here


def fill(root, task, accuracy, seeds=sizes.SEEDS, failed=None, cpu_seconds=2.0):
    """Results of invented runs: {method: right answers of 20, by seed}."""
    for method, rights in accuracy.items():
        pieces_of_method = [Piece("run", task, seed, method) for seed in seeds]
        for piece in [*pieces_of_method[0].tuning(), *pieces_of_method]:
            right = rights[seeds.index(piece.seed)] if piece.setting is None else 1
            greedy = [int(i < right) for i in range(20)]
            result = {
                "greedy": greedy,
                "sampling": [[g, g] for g in greedy],
                "failed": failed,
                "cpu_seconds": cpu_seconds,
            }
            result |= {"all_cpu_seconds": 3.0, "spec": pieces.spec_of(piece, root)}
            path = root / piece.place / "result.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))


def test_a_table_tests_nothing_before_all_seeds_and_corrects_all_comparisons(tmp_path):
    few = {"base": [2, 3, 2], "dqo": [18, 17, 18], "dpo": [10, 9, 9]}
    fill(tmp_path, "a", few, seeds=sizes.FEW_SEEDS)
    summary = summarise(tmp_path, "command")
    rows = {row["method"]: row for row in summary["rows"]["a"]}
    assert rows["dpo"]["dqo ahead"]["mean"] == pytest.approx(25 / 60) and "p_value" not in rows["dpo"]["dqo ahead"]
    assert "p 0" not in markdown(summary) and summary["claims"][0]["p_value"] is None
    whole = {
        "base": [2, 3, 2, 2, 3],
        "dqo": [18, 17, 18, 17, 18],
        "dpo": [10, 9, 9, 10, 9],
        "kto": [18, 18, 19, 18, 18],
    }
    others = {name: [5, 5, 6, 5, 6] for name in settings.methods_of("a") if name not in (*whole, "rft")}
    fill(tmp_path, "a", whole | others)
    rows = {row["method"]: row for row in summarise(tmp_path, "command")["rows"]["a"]}
    assert "p_value" not in rows["dpo"]["dqo ahead"]  # it will be corrected together with that of rft
    fill(tmp_path, "a", {"rft": [17, 17, 17, 17, 17]}, cpu_seconds=1.0)
    rows = {row["method"]: row for row in rows_of("a", study_results("a", tmp_path), tmp_path)}
    compared = {name: row["dqo ahead"] for name, row in rows.items() if name not in ("dqo", "dqo-nll")}
    assert "p_value" not in rows["dqo-nll"]["dqo ahead"]
    assert compared["dpo"]["holm"] > compared["dpo"]["p_value"]
    assert "p_value" not in rows["dpo"]["dqo-nll ahead"]  # it was not chosen in advance
    p_values = sorted(told["p_value"] for told in compared.values())
    assert min(told["holm"] for told in compared.values()) == pytest.approx(len(compared) * p_values[0])
    verdicts = {name: row["verdict"] for name, row in rows.items() if "verdict" in row}
    assert verdicts.keys() == set(settings.RIVALS) - {"rft-steps"}
    assert verdicts["dpo"] == "ahead" and verdicts["kto"] == "level"  # it takes as much time as dqo
    assert verdicts["rft"] == "does not earn its place"  # ahead of it, but with an interval that holds 0
    fill(tmp_path, "a", {"kto": [20, 20, 20, 20, 20]})
    rows = {row["method"]: row for row in rows_of("a", study_results("a", tmp_path), tmp_path)}
    assert rows["kto"]["verdict"] == "loses"


def test_a_claim_needs_every_rival_and_names_the_nearest(tmp_path):
    levels = {"base": [1, 2, 1, 2, 1], "dqo": [18, 17, 18, 17, 18]}
    levels |= {name: [10, 9, 9, 10, 9] for name in settings.RIVALS if name != "rft-steps"} | {
        "kto": [17, 16, 16, 16, 16]
    }
    found = {task: {} for task in sizes.TASKS}
    for task in ("a", "b14"):
        fill(tmp_path, task, levels)
        found[task] = study_results(task, tmp_path)
    ahead = claims(found)[0]
    assert ahead["nearest"] == "kto" and 0 < ahead["p_value"] < 0.01 and "holm" not in ahead  # not all tasks are there
    found["a"]["kto"] = found["a"]["dqo"]
    assert claims(found)[0]["p_value"] == 1
    del found["a"]["dro"]
    assert claims(found)[0]["p_value"] is None


def test_new_seeds_confirm_a_contender_that_is_ahead_on_each_though_a_rival_breaks(tmp_path):
    ahead, broken = [17, 18] * 5, [16, 0, 14, 15, 16, 15, 14, 15, 16, 15]
    for claim in CLAIMS:
        fill(tmp_path, claim.task, dict.fromkeys(("base", *claim.rivals), broken), seeds=NEW_SEEDS)
        fill(tmp_path, claim.task, {claim.contender: ahead}, seeds=NEW_SEEDS)
    rival = CLAIMS[3].rivals[0]
    told = confirmed(tmp_path)
    assert [claim["p_value"] for claim in told] == pytest.approx([2 / 1024] * 4)
    assert [claim["holds"] for claim in told] == [True] * 4 and told[0]["holm"] == pytest.approx(8 / 1024)
    text = markdown(summarise(tmp_path, "command"))
    assert "## New seeds, half-right responses, outcomes alone" in text and ", p 0.002 |" in text
    fill(tmp_path, "f", {rival: [20] + broken[1:]}, seeds=NEW_SEEDS)
    told = confirmed(tmp_path)
    assert not told[3]["holds"] and told[3]["decided_by"] == rival  # ahead on nine seeds of ten
    assert f"| `{rival}` | {told[3]['p_value']:.2g} | " in markdown(summarise(tmp_path, "command"))
    (tmp_path / Piece("run", "f", NEW_SEEDS[0], rival).place / "result.json").unlink()
    told = confirmed(tmp_path)
    assert told[3]["p_value"] is None and not any("holm" in claim for claim in told)
    assert "p_value" not in told[3]["rows"][1]["dqo-steps-nll ahead"] and ", p 0.002 |" in markdown(
        summarise(tmp_path, "command")
    )


def study_results(task, root):
    from benchmarks.evidence.study.tables import results_of

    return results_of(task, root)


def test_a_control_that_gains_makes_its_table_suspect(tmp_path):
    for task, right in (("a", [9, 9, 10, 9, 9]), ("c", [2, 3, 1, 3, 3]), ("e1", [0, 1, 0, 0, 0])):
        fill(tmp_path, task, {"base": [2, 3, 2, 2, 3], "dqo": [18, 17, 18, 17, 18], "shuffled": right})
        rows = rows_of(task, study_results(task, tmp_path), tmp_path)
        assert next(row for row in rows if row["method"] == "shuffled")["control"]["suspect"] == (task == "a")


def test_ablations_are_differences_to_the_chosen_run_and_are_drawn(tmp_path):
    fill(tmp_path, "a", {"dqo": [10, 10, 10, 10, 10]})
    for seed, right in zip(sizes.FEW_SEEDS, (12, 9, 10)):
        piece = Piece("run", "a", seed, "dqo", change="no warm-up")
        (tmp_path / piece.place).mkdir(parents=True)
        greedy = [int(i < right) for i in range(20)]
        result = {"greedy": greedy, "sampling": [[g] for g in greedy], "failed": None, "cpu_seconds": 2.0}
        result |= {"all_cpu_seconds": 3.0, "spec": pieces.spec_of(piece, tmp_path)}
        (tmp_path / piece.place / "result.json").write_text(json.dumps(result))
    study.main([str(tmp_path), "--stage", "table"])
    (row,) = json.loads((tmp_path / "results.json").read_text())["ablations"]
    assert row["change"] == "no warm-up" and row["accuracy"] == pytest.approx([0.1, -0.05, 0])
    assert "no warm-up" in (tmp_path / "study-ablations.svg").read_text()
    assert "+10.0, −5.0, +0.0" in (tmp_path / "tables.md").read_text()
