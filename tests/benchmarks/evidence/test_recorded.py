"""Runs that are recorded count as made in another directory, unless their specification or the rows beside them are others."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from benchmarks.evidence import critics
from benchmarks.evidence.pieces import in_order, made, scores
from benchmarks.evidence.real_model import __main__ as real_model_command
from benchmarks.evidence.recorded import Source, Study, go_on, record
from benchmarks.evidence.recorded_lines import NUMBER
from benchmarks.evidence.study import __main__ as study_command
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
        self.study = Study(self.spec_of, self.source_of, lambda _: "pieces.jsonl", lambda *_: {"setting": {"rate": 1}},
                           lambda _: (500, 4),
                           lambda run: {"setting": {"rate": NUMBER}} if run in TRIED else {})  # fmt: skip

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
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


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


def other(line, **fields):
    return json.dumps(line | fields)


@pytest.mark.parametrize(
    ("command", "file"),
    [(study_command, "study/a.jsonl"), (real_model_command, "real-study-pieces.jsonl"), (critics, "critics.json")],
)
def test_a_damaged_record_ends_a_command_with_one_line(tmp_path, monkeypatch, capsys, command, file):
    path = tmp_path / "results" / file
    path.parent.mkdir(parents=True)
    path.write_text("<<<<<<< theirs\n")
    monkeypatch.setattr(command, "RESULTS", path if command is critics else tmp_path / "results")
    monkeypatch.setattr(real_model_command, "result_of", lambda *_: {"path": "m"})
    table = ["--stage", "table"] if command is study_command else ["--table"]
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path / "out"), *table])
    said = ended.value.code  # Python prints it on stderr, and exits with 1
    assert isinstance(said, str) and "\n" not in said and str(path) in said and said.endswith("file from git again")


def test_of_a_piece_that_fails_by_a_mistake_one_line_is_told(machine, capsys):
    first = machine("first")

    def mistaken(*_):
        raise UserError("no model is\nthere")

    first.make = mistaken
    assert first.go_on([BASE]) == 3
    assert capsys.readouterr().err == "model: no model is there\n"


@pytest.mark.parametrize(
    ("damage", "said"),
    [(lambda _: "<<<<<<< theirs", "this is no line of a recorded run"),
     (lambda line: json.dumps([line]), "this is no line of a recorded run, but"),
     (lambda line: json.dumps({name: value for name, value in line.items() if name != "rows"}), "rows is missing"),
     (lambda line: other(line, place=None), "place must be a text, got None"),
     (lambda line: other(line, spec=["s"]), "spec must be a text"),
     (lambda line: other(line, samples=True), "samples must be a whole number, got True"),
     (lambda line: other(line, samples=0), "samples must be from 1 to 9, got 0"),
     (lambda line: other(line, samples=3), "samples must be 4, got 3"),
     (lambda line: other(line, cpu_seconds="1"), "cpu_seconds must be a number, got '1'"),
     (lambda line: other(line, all_cpu_seconds=float("nan")), "all_cpu_seconds must be a number, got nan"),
     (lambda line: other(line, failed=1), "failed must be a text or null"),
     (lambda line: other(line, made="today"), "made must be an object, got 'today'"),
     (lambda line: other(line, made={"date": "2026-11-27"}), "made.commit is missing"),
     (lambda line: other(line, setting={"rate": "high"}), "setting.rate must be a number"),
     (lambda line: other(line, greedy=[1, 0]), "greedy must be a text"),
     (lambda line: other(line, greedy="x" + line["greedy"][1:]), "greedy must have a digit from 0 to 1 .* got 'x'"),
     (lambda line: other(line, sampling="5" + line["sampling"][1:]), "sampling must have a digit from 0 to 4 .*'5'"),
     (lambda line: other(line, sampling=line["sampling"][1:]), "sampling has 499 problems where greedy has 500"),
     (lambda line: other(line, greedy="01", sampling="01"), "greedy must have 500 problems, got 2"),
     (lambda line: other(line).replace("setting", "\udcff"), "this is no line of a recorded run .*utf-8")],
)  # fmt: skip
def test_a_damaged_line_is_named_with_its_field_and_the_cure(machine, damage, said):
    first = machine("first")
    lines = first.go_on(TRIED) and first.record()
    text = f"{json.dumps(lines[0])}\n{damage(lines[1])}\n{json.dumps(lines[2])}\n"
    (first.folder / "pieces.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    message = rf"pieces.jsonl:2: {said}.*; take the line out, or take the file from git again$"
    for reading in (machine("second").go_on, first.record):
        with pytest.raises(UserError, match=message):
            reading()


def test_lines_of_runs_that_are_gone_are_kept_and_line_separators_in_a_text_end_no_line(machine):
    first = machine("first")
    first.go_on([BASE])
    [line] = first.record()
    gone = line | {"place": "x", "greedy": "01", "sampling": "01", "failed": "one\u2028two"}
    first.study = dataclasses.replace(
        first.study, file_of=lambda place: {BASE.place: "pieces.jsonl"}.get(place, "other.jsonl")
    )
    path = first.folder / "pieces.jsonl"
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in (line, gone)))
    for _ in range(2):
        assert first.record() == [line, gone]
    assert not (first.folder / "other.jsonl").exists() and machine("second").go_on([BASE]) == []
