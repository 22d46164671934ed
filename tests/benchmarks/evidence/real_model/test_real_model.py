"""The real model's part in small: its problems, its budget, its pieces on a tiny chat model, and what its table says."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.evidence.real_model import __main__ as command
from benchmarks.evidence.real_model import plan, problems, work
from benchmarks.evidence.real_model.plan import BASE, METHODS, Piece, every_piece, options_for
from benchmarks.evidence.real_model.tables import markdown, rows_of, summarise, verdict
from benchmarks.evidence.study.statistics import holm
from dqo.config.options import options_of
from dqo.errors import UserError

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def text_of(problem):
    return problem["prompt"][-1]["content"]


def numbers_of(problem):
    return tuple(sorted(int(found) for found in re.findall(r"\d+", text_of(problem))))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_no_two_numbers_of_a_test_problem_stand_together_in_training(seed):
    train, test = problems.split(seed, 96, 500)
    assert len(train) == 96 and len(test) == 500 == len({text_of(problem) for problem in test})
    assert not {numbers_of(problem) for problem in train} & {numbers_of(problem) for problem in test}
    for problem in [*train, *test]:
        (a, b), kind = numbers_of(problem), problem["prompt_id"].partition(":")[0]
        assert problem["answer"] == str(a * b if "product" in kind else a + b)
    assert problems.split(seed, 96, 500) == (train, test) != problems.split(seed + 1, 96, 500)


def test_every_method_makes_the_same_updates_of_as_many_responses():
    places = {"output_dir": "out", "model_name_or_path": "model", "dataset_name": "rows"}
    for name, method in METHODS.items():
        options = options_for(method)
        assert options.pop("file") in ("rows.jsonl", "measured.jsonl")
        train = options_of(options | places, name).train
        assert train.max_steps - train.value_warmup_steps == plan.SIZES.updates
        assert train.per_device_train_batch_size * (2 if method.pairs else 1) == plan.SIZES.batch
        assert (train.learning_rate, train.lora_r) == (2e-4, 16)
    assert options_for(METHODS["shuffled"]) == options_for(METHODS["dqo"]) | {"shuffle_rewards": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The directory of a chat model of one layer, whose tokens are bytes, and which ends a response after a few of them."""
    import torch

    from dqo.models.new import bpe_tokenizer, new_llama, save

    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = bpe_tokenizer(["1"], 260)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16, "max_length": 200, "seed": 0}
    model = new_llama(tokenizer, **sizes)
    with torch.no_grad():  # all states share a direction, and the end token's row has more of it
        model.model.embed_tokens.weight += 1.0
        model.lm_head.weight[tokenizer.eos_token_id] += 0.3
    save(model, tokenizer, path)
    return path


@pytest.fixture
def small(monkeypatch):
    sizes = plan.Sizes(train_problems=8, samples=3, test_problems=4, max_new_tokens=12, continuations=1, updates=2, batch=2,
                       warmup=1)  # fmt: skip
    for module in (plan, work):
        monkeypatch.setattr(module, "SIZES", sizes)
    monkeypatch.setattr(work, "VERIFIER", "python:tests.benchmarks.evidence.real_model.lenient:grade")
    monkeypatch.setitem(plan.COMMON, "max_length", 200)


@pytest.mark.slow
def test_it_goes_on_from_piece_to_piece_and_ends_in_a_table(tiny, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "benchmarks")
    command.RESULTS.mkdir()
    monkeypatch.setattr(plan, "METHODS", {name: METHODS[name] for name in ("rft", "dqo", "dqo-measured")})
    for module in ("__main__", "tables", "work"):
        found = __import__(f"benchmarks.evidence.real_model.{module}", fromlist=["METHODS"])
        monkeypatch.setattr(found, "METHODS", plan.METHODS, raising=False)
    asked = [str(tmp_path), "--model", str(tiny), "--seeds", "1"]
    command.main([*asked, "--minutes", "0"])
    assert "7 pieces are left" in capsys.readouterr().out

    def killed(**_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # the model and the data are there, the samples are not graded
        patched.setattr("dqo.api.score", killed)
        with pytest.raises(KeyboardInterrupt):
            command.main(asked)
    samples = (tmp_path / "data/seed-0/samples.jsonl").read_text()
    assert len(samples.splitlines()) == 24
    command.main(asked)
    assert (tmp_path / "data/seed-0/samples.jsonl").read_text() == samples
    out = capsys.readouterr().out
    assert "4 of 4 runs" in out and "pieces are left" not in out
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/result.json")}
    assert len(made) == 7
    command.main([*asked[:1], "--seeds", "1", "--table"])
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/result.json")}
    rows = {row["method"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert all(row["failed"] == [] for row in rows.values()), rows
    assert rows["dqo"]["cpu_seconds"] > 0 == rows[BASE]["cpu_seconds"]
    wrong = json.loads((tmp_path / "data/seed-0/result.json").read_text())
    assert 0 < wrong["right"] < 1
    run = json.loads((tmp_path / "run/dqo-measured/seed-0/result.json").read_text())
    assert len(run["greedy"]) == 4 == len(run["sampling"])
    with pytest.raises(SystemExit):
        command.main([*asked[:1], "--model", str(tiny.parent)])
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "empty"), "--table"])

    command.main([*asked[:1], "--seeds", "1", "--table", "--record"])
    lines = [json.loads(line) for line in (command.RESULTS / "real-study-pieces.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [f"run/{name}/seed-0" for name in rows]
    another = tmp_path / "another"
    command.main([str(another), *asked[1:]])
    assert [path.parent for path in another.glob("**/spec.json")] == [another / "model"]  # nothing else was made
    tables = [(place / "tables.md").read_text().split("Seed 0: ")[1] for place in (tmp_path, another)]
    assert tables[0] == tables[1] and "24 responses" in tables[0]
    command.main([*asked[:1], "--seeds", "1", "--table", "--record"])
    assert len((command.RESULTS / "real-study-pieces.jsonl").read_text().splitlines()) == len(lines)


def result(right, count=200):
    """Of an invented run: `right` of its problems are right, greedily and by sampling."""
    greedy = [float(i < right) for i in range(count)]
    told = {"unread": {"sampling": {"share": 0.1}}, "failed": None, "cpu_seconds": 2.0, "all_cpu_seconds": 3.0}
    return {"greedy": greedy, "sampling": [[one] for one in greedy], **told}


def rows_by_method(levels, seeds=(0, 1)):
    runs = {name: {seed: result(right) for seed, right in enumerate(of)} for name, of in levels.items()}
    return {row["method"]: row for row in rows_of(runs, seeds)}


def test_all_comparisons_are_corrected_together_and_none_is_tested_before_all_seeds():
    levels = {BASE: [40, 44], "kto": [90, 92], "dpo": [60], "dqo": [100, 96], "shuffled": [41, 43]}
    rows = rows_by_method(levels)
    assert "p_value" not in rows["dpo"]["dqo ahead"] and "verdict" not in rows["dpo"]["dqo ahead"]
    tested = [rows[name]["dqo ahead"] for name in (BASE, "kto", "shuffled")] + [rows["shuffled"]["control"]]
    assert [told["holm"] for told in tested] == holm([told["p_value"] for told in tested])
    assert rows[BASE]["dqo ahead"]["mean"] == pytest.approx((60 + 52) / 400)
    assert rows["kto"]["dqo ahead"]["of_seeds"] == pytest.approx([0.05, 0.02])
    assert rows[BASE]["dqo ahead"]["verdict"] == "ahead" and rows["kto"]["accuracy"]["of_seeds"] == [0.45, 0.46]
    over = rows["kto"]["dqo ahead"]["over_seeds"]
    assert over["low"] < 0 < over["mean"] == pytest.approx(0.035)  # two seeds decide nothing


@pytest.mark.parametrize(
    ("of_seeds", "corrected", "expected"),
    [((0.1, 0.2), 0.001, "ahead"), ((0.1, 0.2), 0.02, "level"), ((0.1, -0.01), 0.001, "level"),
     ((-0.1, -0.2), 0.02, "behind"), ((-0.1, -0.2), 0.2, "level")],
)  # fmt: skip
def test_a_verdict_needs_every_seed_and_the_corrected_level(of_seeds, corrected, expected):
    assert verdict(of_seeds, corrected) == expected


def test_a_seed_is_complete_before_the_next_and_begins_with_its_base():
    every = every_piece((0, 1, 2))
    runs = [(piece.seed, piece.method) for piece in every if piece.is_run]
    assert runs == [(seed, method) for seed in (0, 1, 2) for method in (BASE, *METHODS)]
    for piece in every:
        assert all(every.index(needed) < every.index(piece) for needed in piece.needs())
        # a run that ends itself counts as its seed's base
        assert (Piece("run", piece.seed, BASE) in piece.needs()) == (piece.method in METHODS)


def test_a_run_that_ends_itself_counts_as_the_base(tmp_path, monkeypatch):
    base = {"greedy": [1.0], "sampling": [[0.0]], "unread": {}, "cpu_seconds": 0.0, "failed": None}
    monkeypatch.setattr(work, "model_of", lambda _: {"path": "m", "dtype": "bfloat16"})
    monkeypatch.setattr(work, "result_of", lambda piece, _: base if piece == Piece("run", 1, BASE) else None)

    def collapsed(options, *_):
        assert options["bf16"]
        raise UserError("the weights collapsed")

    monkeypatch.setattr(work, "train_once", collapsed)
    found = work.run(Piece("run", 1, "dqo"), tmp_path)
    assert found == base | {"failed": "the weights collapsed"}


def test_a_result_is_of_its_seed_its_options_and_its_model(tmp_path, monkeypatch):
    def spec(piece, dtype="float32"):
        monkeypatch.setattr(plan, "result_of", lambda *_: {"hash": "h", "dtype": dtype})
        return plan.spec_of(piece, tmp_path)

    dqo = Piece("run", 0, "dqo")
    others = [spec(Piece("run", 1, "dqo")), spec(Piece("run", 0, "shuffled")), spec(dqo, "bfloat16")]
    assert spec(dqo) not in others and spec(dqo) == spec(dqo)
    monkeypatch.setattr(plan, "result_of", lambda *_: None)
    assert plan.spec_of(dqo, tmp_path) is None  # before the model is there


def test_both_contenders_are_compared_with_every_row_and_once_with_each_other():
    rows = rows_by_method({name: [60, 60] for name in (BASE, "dqo", "shuffled", "dqo-measured")})
    compared = {name: [key for key in row if key.endswith(" ahead")] for name, row in rows.items()}
    both = ["dqo ahead", "dqo-measured ahead"]
    assert compared == {BASE: both, "dqo": [], "shuffled": both, "dqo-measured": ["dqo ahead"]}


def test_a_study_without_a_run_records_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "benchmarks")
    command.RESULTS.mkdir()
    told = {"spec": {}, "path": "m", "hash": "h", "dtype": "float32"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/result.json").write_text(json.dumps(told))
    command.main([str(tmp_path), "--table", "--record"])
    assert not list(command.RESULTS.iterdir())
    assert "no table is recorded" in capsys.readouterr().out and (tmp_path / "results.json").exists()


def test_a_row_of_fewer_seeds_says_which_they_are():
    rows = rows_by_method({BASE: [40, 44, 42], "kto": [90, 92], "dqo": [100, 96, 98], "shuffled": [41]}, (0, 1, 2))
    facts = {"runs": {"made": 9, "planned": 24}, "cpu_hours": 0.1, "command": "c", "makings": [], "data": {}}
    text = markdown(facts | {"seeds": [0, 1, 2], "rows": list(rows.values())})
    cells = {line.split(" | ")[0][2:]: line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert cells["kto"][2] == "seeds 0, 1: 45.0, 46.0" and cells["kto"][6].startswith("seeds 0, 1: +3.5 (")
    assert (
        cells["shuffled"][2] == "seed 0: 20.5"
        and "Control: seed 0: shuffled rewards are ahead of the base by +0.5 (" in text
    )
    assert cells["dqo"][2] == "50.0, 48.0, 49.0" and "seed" not in " ".join(cells[BASE])


# of 200 problems right in both seeds: level, far ahead, ahead by chance, far behind
@pytest.mark.parametrize("right", [(40, 44), (90, 94), (41, 45), (10, 12)])
def test_a_control_that_gains_makes_the_table_suspect(tmp_path, right):
    for method, of in ((BASE, (40, 44)), ("shuffled", right)):
        for seed in (0, 1):
            piece, path = Piece("run", seed, method), tmp_path / Piece("run", seed, method).place / "result.json"
            path.parent.mkdir(parents=True)
            (tmp_path / "model").mkdir(exist_ok=True)
            told = {"spec": {}, "path": "m", "hash": "h", "dtype": "float32", "all_cpu_seconds": 1.0}
            (tmp_path / "model/result.json").write_text(json.dumps(told))
            path.write_text(json.dumps(result(of[seed]) | {"spec": plan.spec_of(piece, tmp_path)}))
    summary = summarise(tmp_path, "command", (0, 1))
    assert ("are suspect" in markdown(summary)) == (right == (90, 94))
    assert summary["runs"] == {"made": 4, "planned": 18}
    assert np.isclose(summary["cpu_hours"], 12 / 3600)
