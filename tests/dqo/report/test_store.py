"""A run keeps what its page needs, and the page that it writes at its end is the one that `dqo report` makes."""

import hashlib
import json
import sys

import pytest

from dqo.commands.train import train_command
from dqo.evaluation.accuracy import Accuracy, Answered, Problem
from dqo.grading.grade import Grade
from dqo.models.generate import Response
from dqo.report.command import report
from dqo.report.runs import read_run
from dqo.report.store import answer_rows
from tests.dqo.helpers import arguments, rollout_rows


@pytest.fixture
def trained(files, monkeypatch, capsys):
    """A run with problems, step rewards and a value warm-up."""
    rows = rollout_rows(prompts=12, samples=4)
    for row in rows:
        ends = [i + 1 for i, c in enumerate(row["completion"]) if c == "\n"] + [len(row["completion"])]
        row["steps"] = [list(pair) for pair in zip([0, *ends], ends)]
        row["step_rewards"] = [0.0] * (len(ends) - 1) + [row["reward"] - 1.0]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (files / "tasks.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"1+{i}=", "answer": f"{1 + i}"}) for i in range(3))
    )
    more = {"eval_tasks": files / "tasks.jsonl", "verifier": "gsm8k", "num_generations": 2, "max_completion_length": 4}
    more |= {"process_reward": "additive", "max_steps": 4, "value_warmup_steps": 2, "logging_steps": 1}
    words = arguments(files, **more)
    monkeypatch.setattr(sys, "argv", ["dqo-train", *words])
    train_command(words)
    return files, capsys.readouterr().out


@pytest.mark.slow
def test_the_page_of_a_run_is_that_of_its_directory(trained):
    files, printed = trained
    out = files / "out"
    page = report([out], files / "page.html").read_text()
    own = (out / "report.html").read_text()
    assert without_commands(page) == without_commands(own)
    assert f"report: {out / 'report.html'}" in printed and "greedy %" in printed
    for text in ("Before and after", "Penalised steps", "value warm-up", "Length of the prompt", "critic/grad_norm"):
        assert text in own, text
    record = json.loads((out / "run.json").read_text())
    digest = hashlib.sha256((files / "rollouts.jsonl").read_bytes()).hexdigest()
    assert record["data"]["sha256"] == digest and digest in own
    assert record["finished"] and record["made"] == 4 and record["commands"] == [" ".join(sys.argv)]
    run = read_run(out)
    assert run.warmup == 2 and len(run.answers) == 3 and run.state == "finished"
    assert [len(row["before"]["sampling"]) for row in run.answers] == [2, 2, 2]
    labels = [row["label"] for row in run.held_out]
    assert (
        len(labels) == record["data"]["counts"]["held_out_rows"]
        and {"value_end", "logps", "length"} <= run.held_out[0].keys()
    )


def without_commands(page: str) -> str:
    begin = page.index("<pre>", page.index("Reproduction"))
    return page[:begin] + page[page.index("</pre>", begin) :]


def answered(prompt, text, right):
    problem = Problem([1], {"prompt": prompt, "source": "a.jsonl:1"})
    return Answered(problem, Response([1, 2], [0.0, 0.0], True), text, Grade(float(right), parsed=True))


def accuracy(*rows):
    """rows: (prompt, greedy text, right, right of each sample)"""
    greedy = [answered(prompt, text, right) for prompt, text, right, _ in rows]
    return Accuracy(greedy, [[answered(prompt, "s", one) for one in samples] for prompt, _, _, samples in rows])


def test_answers_are_a_row_a_problem():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    before = accuracy(("p", "a", 0, [0, 1]), (messages, "b", 1, [1, 1]))
    after = accuracy(("p", "c", 1, [1, 1]), (messages, "d", 1, [1, 0]))
    rows = answer_rows(before, after)
    assert rows[0] == {
        "prompt": "p",
        "before": {"greedy": 0, "text": "a", "sampling": [0, 1]},
        "after": {"greedy": 1, "text": "c", "sampling": [1, 1]},
    }
    assert rows[1]["prompt"] == "system: Be brief.\nuser: 1+1?"
