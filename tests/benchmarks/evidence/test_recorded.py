"""Runs that are recorded count as made in another directory, unless their specification or the rows beside them are others."""

import json
from dataclasses import dataclass

import pytest

from benchmarks.evidence.pieces import in_order, made, scores
from benchmarks.evidence.recorded import Source, Study, go_on, record
from dqo.errors import UserError
from dqo.files import write_whole


@dataclass(frozen=True)
class Part:
    place: str
    after: tuple = ()
    is_run: bool = True

    def needs(self):
        return list(self.after)


MODEL = Part("model", (), False)
VALIDATION, DATA = Part("data/100", (MODEL,), False), Part("data/0", (MODEL,), False)
TRIED = tuple(Part(f"runs/100/setting-{k}", (VALIDATION,)) for k in range(3))
BASE = Part("runs/0/base", (DATA,))
TRAINED = [Part(f"runs/0/{name}", (DATA, BASE, *TRIED)) for name in ("dqo", "kto")]
RUNS = [*TRIED, BASE, *TRAINED]
EVERY = in_order(RUNS)


class Machine:
    """It makes pieces; `bits` stands for how it rounds."""

    def __init__(self, directory, folder, bits=0):
        self.root, self.folder, self.bits, self.made = directory, folder, bits, []
        self.rates = dict.fromkeys(RUNS, 1)
        self.study = Study(self.spec_of, self.source_of, lambda _: "pieces.jsonl", lambda *_: {"setting": {"rate": 1}})

    def spec_of(self, piece, root):
        if piece in TRAINED:
            results = [self.study.result_of(one, root) for one in TRIED]
            return {"rate": self.rates[piece], "tuned": [one["greedy"] for one in results]} if all(results) else None
        return {"rate": self.rates.get(piece, 0)}

    def source_of(self, run):
        return Source(VALIDATION, "rows.jsonl", TRIED) if run in TRIED else Source(DATA, "rows.jsonl")

    def make(self, piece, root):
        def work():
            if not piece.is_run:
                row = {"prompt": piece.place, "completion": "1", "logprobs": [self.bits / 3]}
                row["sampling"] = {"model": str(root), "model_hash": f"{self.bits}", "seed": 1}
                write_whole(root / piece.place / "rows.jsonl", json.dumps(row).encode())
                return {}
            right = [float(i % 3 < len(piece.place) % 3) for i in range(500)]
            return {
                "greedy": right,
                "sampling": [[one, 0.0, 1.0, 0.0] for one in right],
                "failed": None,
                "cpu_seconds": 1.23,
            }

        self.made.append(piece)
        made(root / piece.place, self.spec_of(piece, root), work)

    def go_on(self, wanted=RUNS, minutes=1):
        self.made.clear()
        left = go_on(self.study, EVERY, wanted, self.root, minutes, self.make, self.folder)
        return self.made if left == 0 else left

    def record(self):
        record(self.study, EVERY, self.root, self.folder)
        path = self.folder / "pieces.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def machine(tmp_path):
    def begun(name, bits=0):
        return Machine(tmp_path / name, tmp_path / "results", bits)

    return begun


def test_a_recorded_run_counts_as_made_and_nothing_is_made_for_it(machine, capsys):
    first, second = machine("first"), machine("second")
    assert first.go_on() == EVERY
    lines = first.record()
    assert [line["place"] for line in lines] == [run.place for run in RUNS]
    assert max(len(json.dumps(line)) for line in lines) < 1500
    assert lines[0]["made"].keys() == {"date", "commit", "device", "torch"} and lines[0]["setting"] == {"rate": 1}
    assert second.go_on() == [] and "6 finished runs are read" in capsys.readouterr().out
    for run in RUNS:
        ours, theirs = (one.study.result_of(run, one.root) for one in (first, second))
        assert ours["made"] == theirs["made"] and round(ours["cpu_seconds"], 1) == theirs["cpu_seconds"]
        assert all(scores(ours, decoding) == scores(theirs, decoding) for decoding in (None, "greedy", "sampling"))
    assert second.record() == lines
    path = first.root / BASE.place / "result.json"  # as earlier versions left it
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "made"}))
    assert first.record()[3]["made"] == lines[3]["made"]


def test_only_what_unfinished_runs_need_is_made(machine):
    first, second = machine("first"), machine("second")
    first.go_on([*TRIED, BASE])
    first.record()
    assert second.go_on() == [MODEL, DATA, *TRAINED]  # no data to choose a setting on
    assert len(second.record()) == len(RUNS)


def test_a_run_of_another_specification_is_not_used_and_leaves_the_record(machine, capsys):
    first, second = machine("first"), machine("second")
    first.go_on()
    old = first.record()
    second.rates[TRAINED[1]] = 2
    assert second.go_on() == [MODEL, DATA, TRAINED[1]]
    assert "1 recorded runs are of another specification than today's and are not used" in capsys.readouterr().out
    new = second.record()
    assert new[:-1] == old[:-1] and new[-1]["spec"] != old[-1]["spec"] and len(new) == len(old)
    third = machine("third")
    third.rates |= {
        TRAINED[1]: 2,
        TRIED[0]: 2,
    }  # before it is tried it is not known which setting the trained ones have
    assert third.go_on(TRIED) == [MODEL, VALIDATION, TRIED[0]] and len(third.record()) == len(RUNS)


def test_runs_on_rows_that_are_made_again_otherwise_are_set_aside_and_made_again(machine, capsys):
    first, second = machine("first"), machine("second", bits=1)
    first.go_on([*TRIED, BASE, TRAINED[0]])
    first.record()
    made_again = [MODEL, VALIDATION, DATA, BASE, *TRAINED]
    assert second.go_on([VALIDATION, *RUNS]) == made_again  # the settings, all on the same rows, stand
    out = capsys.readouterr().out
    assert "2 recorded runs, such as runs/0/base, were made on other rows of data/0 than those made here" in out
    assert out.count("set aside") == 1
    lines = second.record()
    assert len(lines) == len(RUNS) + 2 and len({line["rows"] for line in lines}) == 3
    third, fourth = machine("third"), machine("fourth", bits=1)
    assert third.go_on() == []  # the more, which were made together
    assert third.study.result_of(BASE, third.root)["restored"] == lines[-1]["rows"]
    third.rates[TRAINED[1]] = 2
    assert third.go_on() == [MODEL, DATA, TRAINED[1]]  # on the rows of the first machine, with its runs
    assert third.study.result_of(BASE, third.root)["restored"] != lines[-1]["rows"]
    fourth.rates[TRAINED[1]] = 2
    assert fourth.go_on() == [MODEL, DATA, TRAINED[1]]


def test_settings_of_which_not_all_are_recorded_are_tried_on_the_same_rows(machine):
    first = machine("first")
    first.go_on(TRIED[:2])
    first.record()
    same, other = machine("same"), machine("other", bits=1)
    assert same.go_on(TRIED) == [MODEL, VALIDATION, TRIED[2]]
    assert other.go_on(TRIED) == [MODEL, VALIDATION, *TRIED]


def test_runs_whose_rows_are_gone_are_not_recorded(machine, capsys):
    first = machine("first")
    first.go_on([BASE])
    (first.root / DATA.place / "rows.jsonl").unlink()
    assert first.record() == []
    assert "runs/0/base is not recorded" in capsys.readouterr().out


def test_a_line_that_cannot_be_read_is_named(machine):
    first = machine("first")
    first.go_on([BASE])
    first.record()
    path = first.folder / "pieces.jsonl"
    path.write_text(path.read_text() + "<<<<<<< theirs\n")
    with pytest.raises(UserError, match=r"pieces.jsonl:2: .*from git again"):
        machine("second").go_on()
