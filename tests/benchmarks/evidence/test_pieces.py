"""Work in pieces: made once, behind what they need, by one process each; a failure keeps back only what needs it."""

import json
from dataclasses import dataclass

import pytest

from benchmarks.evidence.pieces import claimed, go_on, head, in_order, made, makings, scores, stored


@dataclass(frozen=True)
class Part:
    place: str
    after: tuple = ()
    is_run: bool = False

    def needs(self):
        return list(self.after)


MODEL = Part("model")
DATA = Part("data/0", (MODEL,))
RUNS = [Part("runs/a", (DATA,)), Part("runs/b", (DATA,))]
LAST = Part("last", tuple(RUNS))


def result_of(piece, root):
    return stored(root / piece.place, lambda: piece.place)


def make(piece, root):
    made(root / piece.place, piece.place, dict)


def test_pieces_come_once_and_behind_what_they_need():
    assert in_order([LAST, DATA]) == [MODEL, DATA, *RUNS, LAST]
    run = Part("run", (DATA,), is_run=True)
    assert in_order([run], lambda piece: piece == run) == [run]
    assert in_order([run], lambda piece: piece == DATA) == [MODEL, DATA, run]  # its files are needed


def test_a_piece_that_fails_keeps_back_only_what_needs_it(tmp_path, capsys):
    asked, begun = in_order([LAST]), []

    def broken(piece, root):
        begun.append(piece)
        if piece == RUNS[0]:
            raise OSError("no room")
        make(piece, root)

    assert go_on([LAST], tmp_path, 1, result_of, broken) == 2
    assert begun == asked[:-1] and "no room" in capsys.readouterr().err
    assert go_on(asked, tmp_path, 0, result_of, make) == 2 and go_on(asked, tmp_path, 1, result_of, make) == 0


def test_a_piece_is_taken_by_one_process(tmp_path):
    with claimed(DATA, tmp_path) as first, claimed(DATA, tmp_path) as second:
        assert first and not second
    with claimed(DATA, tmp_path) as again:
        assert again


def test_work_goes_on_unless_its_specification_has_changed(tmp_path):
    place = tmp_path / "piece"

    def killed():
        (place / "half").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(place, {"rate": 1}, killed)
    assert stored(place, lambda: {"rate": 1}) is None
    assert made(place, {"rate": 1}, lambda: {"half": (place / "half").read_text()})["half"] == "done"
    assert json.loads((place / "result.json").read_text()) == stored(place, lambda: {"rate": 1})
    assert stored(place, lambda: {"rate": 2}) is None  # of another specification
    assert made(place, {"rate": 2}, lambda: {"half": (place / "half").exists()})["half"] is False


def test_the_measure_is_half_greedy_and_half_sampled():
    result = {"greedy": [1, 0], "sampling": [[1, 0], [1, 1]]}
    assert scores(result) == [0.75, 0.5]
    assert scores(result, "greedy") == [1, 0] and scores(result, "sampling") == [0.5, 1]


def test_a_table_tells_where_and_when_its_runs_were_made():
    made = {"device": "CPU", "torch": "2", "commit": "abc", "date": "2026-11-28"}
    results = [{"made": made}, {"made": made | {"date": "2026-11-27"}}, {"made": made | {"commit": "def"}}]
    lines = head({"runs": {"made": 3, "planned": 4}, "cpu_hours": 1.5, "command": "x", "makings": makings(results)})
    assert lines == [
        "3 of 4 runs, 1.5 CPU hours; `x`",
        "",
        "- 2 runs: CPU, torch 2, 2026-11-27 to 2026-11-28, commit abc",
        "- 1 runs: CPU, torch 2, 2026-11-28, commit def",
    ]
