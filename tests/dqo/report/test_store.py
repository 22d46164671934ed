"""A run keeps what its page needs, and the page that it writes at its end is the one that `dqo report` makes."""

import dataclasses
import hashlib
import json
import sys

import numpy as np
import pytest

from dqo.commands.train import train_command
from dqo.data.episode import Episode
from dqo.evaluation.accuracy import Accuracy, Answered, Problem
from dqo.grading.grade import Grade
from dqo.models.generate import Response
from dqo.objectives import DQO, SFT
from dqo.report.command import report
from dqo.report.runs import read_run
from dqo.report.store import answer_rows, held_out_row, value_traces
from tests.dqo.helpers import arguments, rollout_rows, tokenizer


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
    assert record["cpu_seconds"] > 0 and record["seconds"] > 0
    run = read_run(out)
    assert run.warmup == 2 and len(run.answers) == 3 and run.state == "finished"
    assert [len(row["before"]["sampling"]) for row in run.answers] == [2, 2, 2]
    labels = [row["label"] for row in run.held_out]
    kept = {"value_end", "ratio", "step_ratios", "step_values", "start_step_entropies", "first_wrong_step"}
    assert kept <= run.held_out[0].keys()
    assert {"values", "advantages", "implied", "start"} <= record["value_traces"][0].keys()
    assert "eval_credit/auc" in record["held_out"] and "The value along responses" in own
    assert (
        len(labels) == record["data"]["counts"]["held_out_rows"]
        and {"value_end", "logps", "length"} <= run.held_out[0].keys()
    )


def without_commands(page: str) -> str:
    begin = page.index('<div class="commands">')
    return page[:begin] + page[page.index("</div>", begin) :]


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


def responses():
    """Two prompts of a right and a wrong response: steps of two tokens, the second of each wrong one wrong."""
    found = []
    for i, right in enumerate((False, True, True, False)):
        e = Episode(
            [3, 4],
            [5, 6, 7, 8],
            np.array([0, 0, 0, right], np.float32),
            float(right),
            right,
            True,
            i // 2,
            f"r{i}",
        )
        e.step_ends, e.first_wrong_step, e.ref_logprobs = [1, 3], None if right else 1, np.full(4, -1.0, np.float32)
        found.append(e)
    return found


def said(blame, values=(0.5, 0.6, 0.4, 0.3)):
    logprobs = np.array([-1.0, -1.0, -1.0 - blame, -1.0 + 0.25], np.float32)
    return {"logprobs": logprobs, "entropy": np.ones(4, np.float32), "values": np.array(values, np.float32)}


def test_a_held_out_row_has_sums_of_the_response_and_of_its_steps():
    wrong = responses()[0]
    row = held_out_row(wrong, said(0.5), {"start_logps": -3.0})
    assert row["steps"] == 2 and row["first_wrong_step"] == 1 and row["logps"] == -4.25 and row["start_logps"] == -3.0
    assert row["ratio"] == -0.25 and row["ratio_before_last"] == -0.5 and row["step_ratios"] == [0.0, -0.25]
    assert row["step_values"] == pytest.approx([-0.1, -0.1])  # up to the state before the last token
    assert (row["value_start"], row["value_half"], row["value_end"]) == pytest.approx((0.5, 0.6, 0.3))
    wrong.ref_logprobs = None
    bare = held_out_row(wrong, {name: x for name, x in said(0.5).items() if name != "values"}, {})
    assert not {"ratio", "step_ratios", "value_end"} & bare.keys() and bare["logps"] == -4.25


def test_traces_have_the_advantage_and_the_value_that_it_implies():
    given = responses()
    tokens = [said(0.5 * (not e.label)) for e in given]
    traces = value_traces(tokenizer(), DQO(beta=2.0), given, tokens)
    assert [trace["reward"] for trace in traces] == [1.0, 0.0]  # one of each prompt
    assert [trace["label"] for trace in traces] == [True, False]
    wrong = next(trace for trace in traces if trace["reward"] == 0)
    assert (
        wrong["advantages"] == [0.0, 0.0, -1.0, 0.5] and wrong["step_ends"] == [2, 4] and wrong["first_wrong_step"] == 1
    )
    start = 1.0 - 2.0 * 0.25  # R - beta * sum(delta) of the other response to the prompt
    assert wrong["start"] == {"value": start, "origin": "other responses to the prompt", "responses": 1}
    assert wrong["implied"] == [start, start, start, start - 1.0, start - 0.5]
    assert wrong["values"] == pytest.approx([0.5, 0.6, 0.4, 0.3])


def test_traces_without_a_reference_are_those_of_the_value_model_and_without_both_there_are_none():
    given = [dataclasses.replace(e, ref_logprobs=None) for e in responses()]
    tokens = [said(0.0) for _ in given]
    assert "advantages" not in value_traces(tokenizer(), DQO(), given, tokens)[0]
    assert (
        value_traces(tokenizer(), SFT(), given, [{k: x for k, x in t.items() if k != "values"} for t in tokens]) == []
    )


def test_discounts_of_turns_act_on_their_ends_alone():
    given = responses()[:2]
    for e in given:
        e.turn_ends = [1, 3]
    traces = value_traces(tokenizer(), DQO(beta=1.0, gamma=0.5, discount="turns"), given, [said(0.0), said(0.0)])
    assert traces[0]["start"]["value"] == pytest.approx(
        0.5 * (1.0 - 0.25)
    )  # the last tokens lie behind one end of a turn
