"""The whole measurement on a tiny model and a few solutions made here."""

import argparse
import json

import pytest

from benchmarks.evidence import process_labels
from dqo.errors import UserError
from dqo.models.new import bpe_tokenizer, new_llama, save


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """A random model, and four solutions each of Math-Shepherd and of GSM8K."""
    lines = []
    for i in range(4):
        steps = [f"Step 1: {i}+1={i + 1}", f"Step 2: The answer is: {i + 2}"]
        lines.append({
            "input": f"What is {i}+1? " + " ки\n".join(steps) + " ки",
            "label": f"What is {i}+1? " + " +\n".join(steps) + (" -" if i % 2 else " +"),
        })  # fmt: skip
    (tmp_path / "math-shepherd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    solution = "1+{0}=<<1+{0}={1}>>{1}\nA: {1}"
    problems = [
        {
            "question": f"How much is 1+{i}?", "ground_truth": f"A: {i + 1}",
            "a": {"solution": solution.format(i, i + 1), "is_correct": True},
            "b": {"solution": solution.format(i, i + 1).replace(f"A: {i + 1}", "A: 0"), "is_correct": False},
        }
        for i in range(1, 5)
    ]  # fmt: skip
    (tmp_path / "example_model_solutions.jsonl").write_text("\n".join(map(json.dumps, problems)))
    tokenizer = bpe_tokenizer([line["input"] for line in lines], 300)
    save(new_llama(tokenizer, hidden_size=16, layers=1, heads=2), tokenizer, tmp_path / "model")
    monkeypatch.setattr(process_labels, "RESULTS", tmp_path / "results")
    return argparse.Namespace(
        output=tmp_path / "out", data=tmp_path, model=tmp_path / "model", solutions=4, responses=8, methods=["dpo"]
    )


def test_a_random_model_is_refused_before_it_is_trained(arguments):
    with pytest.raises(UserError, match="one of random weights has -5.*: it was not trained on text like this"):
        process_labels.run(arguments)
    assert not (arguments.output / "dpo").exists()
    arguments.responses = 6
    with pytest.raises(
        UserError, match="was begun with .*'responses': 8}, and now .*'responses': 6}; repeat those, or choose"
    ):
        process_labels.run(arguments)


@pytest.mark.slow
def test_all_stages_and_again(arguments, monkeypatch, capsys):
    monkeypatch.setattr(process_labels, "refuse_random", lambda *_: None)
    process_labels.run(arguments)
    found = json.loads((process_labels.RESULTS / "process_labels.json").read_text())
    assert found["sets"]["math-shepherd"] == {"problems": 4, "solutions": 4, "with_a_wrong_step": 2, "right_steps": 6}
    assert found["trained_on"] == {"responses": 8, "problems": 4}
    assert [row["score"] for row in found["rows"]] == [
        "implicit (dpo)", "implicit_per_token (dpo)", "likelihood", "likelihood_per_token", "certainty", "position"
    ]  # fmt: skip
    position = found["rows"][-1]
    assert position["lowest"][0] == 1.0 and position["chance"][0] == 0.5  # the last step of two is the wrong one
    shown = capsys.readouterr().out
    assert "| math-shepherd | implicit (dpo) | 0." in shown
    lines = (arguments.output / "scores-dpo.jsonl").read_text().splitlines(keepends=True)
    (arguments.output / "scores-dpo.jsonl").write_text(lines[0] + lines[1][:9])
    process_labels.run(arguments)
    again = json.loads((process_labels.RESULTS / "process_labels.json").read_text())
    assert [row["auc"] for row in again["rows"]] == [row["auc"] for row in found["rows"]]
    assert len((arguments.output / "scores-dpo.jsonl").read_text().splitlines()) == 4
