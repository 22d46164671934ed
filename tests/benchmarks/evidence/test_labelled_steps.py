"""Public step labels: what is tested, what is trained on, and agreement by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence.labelled_steps import (
    agreement,
    counted,
    first_wrong,
    labelled_solutions,
    outcome_rows,
    problem_of,
    read_sets,
)
from dqo.data.rows import Row
from dqo.errors import UserError

DATA = Path(__file__).parents[4] / "shared" / "data"


def row(problem, pieces, labels, right=False, ended=True, name="prm800k"):
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    spans = list(zip([0, *ends], ends))
    return Row(
        problem, "".join(pieces), float(right), right, steps=spans, step_rewards=labels,
        finish_reason="stop" if ended else "length", sampling={"set": name},
    )  # fmt: skip


def test_agreement_by_hand():
    # a tree: two solutions share the step "a ", and one goes wrong after it
    rows = [
        row("p", ["a ", "b"], [1.0, 0.0]),
        row("p", ["a ", "c"], [1.0, 1.0]),
        row("q", ["d ", "e ", "f"], [1.0, 0.0, 1.0]),
    ]
    scores = [np.array([0.5, 0.6]), np.array([0.5, 0.9]), np.array([0.7, 0.1, -3.0])]
    found = agreement(rows, scores)
    # right: a 0.5, c 0.9, d 0.7; wrong: b 0.6, e 0.1; f comes after an error, and a counts once
    assert found["auc"].mean == pytest.approx(5 / 6)
    assert found["auc_of_a_state"].mean == 1.0  # c against b
    assert found["lowest"].mean == 0.0  # the lowest of p is a, and of q f
    assert found["chance"].mean == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert counted(rows) == {"problems": 2, "solutions": 3, "with_a_wrong_step": 2, "right_steps": 4}


def test_problems_that_are_tested_are_not_trained_on_and_no_step_is_seen():
    tree = [row("One?", ["a ", "b"], [1.0, 0.0]), row("one", ["a ", "c"], [1.0, 1.0], right=True)]
    both = [
        row(f"problem {i}", ["a ", str(k)], [1.0, 1.0], right=k > 1, name="math-aps")
        for i in range(9)
        for k in range(6)
    ]
    both.append(row("only wrong", ["a ", "b"], [1.0, 1.0], name="math-aps"))
    both += [row(f"cut {i}", ["a ", "b"], [1.0, 1.0], right=i > 0, ended=False, name="math-aps") for i in range(2)]
    sets = {"prm800k": tree, "math-aps": both}
    tested = labelled_solutions(sets, 5, lambda r: True)
    assert [r.sampling["set"] for r in tested] == ["prm800k", "math-aps"] * 2 + ["math-aps"]
    assert first_wrong(tested[0]) == 1
    trained = outcome_rows(sets, tested, 12, lambda r: True, seed=0)
    assert not {problem_of(r) for r in trained} & {problem_of(r) for r in tested}
    assert len(trained) == 12 and all(r.steps is None and r.step_rewards is None for r in trained)
    assert all(r.finish_reason == "stop" and r.prompt.startswith("problem") for r in trained)
    assert [r.label for r in trained].count(True) == 6  # two of each kind a problem
    with pytest.raises(UserError, match="is left to train on; it needs the published files"):
        outcome_rows({"prm800k": tree}, tree, 4, lambda r: True, seed=0)


def test_files_are_read_by_their_names_and_labels_are_right_or_wrong(tmp_path):
    with pytest.raises(
        UserError, match="no set of labelled solutions lies there; it needs the published files of PRM800K"
    ):
        read_sets(tmp_path)
    line = {
        "input": "Q? Step 1: 1+1=<<1+1=3>>3 ки\nStep 2: The answer is: 3 ки",
        "label": "Q? Step 1: 1+1=<<1+1=3>>3 +\nStep 2: The answer is: 3 -",
    }
    (tmp_path / "my-math-shepherd-part.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line) + "\n")
    (found,) = read_sets(tmp_path)["math-shepherd"]  # an equal solution counts once
    assert found.completion == "Step 1: 1+1=3\nStep 2: The answer is: 3" and found.step_rewards == [1.0, 0.0]
    assert [found.completion[a:b] for a, b in found.steps] == ["Step 1: 1+1=3\n", "Step 2: The answer is: 3"]


@pytest.mark.skipif(not (DATA / "process_samples").is_dir(), reason="the samples of public sets are not here")
def test_the_samples_of_the_public_sets():
    sets = read_sets(DATA / "process_samples")
    assert {name: len(rows) for name, rows in sets.items()} == {"prm800k": 33, "math-shepherd": 7, "math-aps": 124}
    assert all(
        set(r.step_rewards) <= {0.0, 1.0} and len(r.steps) == len(r.step_rewards)
        for rows in sets.values()
        for r in rows
    )
    rows = [replace(r) for rows in sets.values() for r in rows]
    position = agreement(rows, [-np.arange(len(r.steps), dtype=float) for r in rows])
    assert position["auc"].mean > 0.5  # errors come late
