"""Evaluations of a tiny model from its files to the summary, killed and gone on with."""

import json
import os
import signal
from collections import Counter

import pytest

from dqo import api
from dqo.commands.eval import eval_command
from dqo.data.appending import Appended
from dqo.errors import UserError
from dqo.evaluation import evaluate as module
from dqo.evaluation.evaluate import evaluated as evaluate
from dqo.evaluation.options import EvalConfig
from dqo.evaluation.results import read_evaluation, read_lines
from dqo.models.new import save
from dqo.stats import pass_at_k
from tests.dqo import forked
from tests.dqo.helpers import policy, rollout_rows, tokenizer

VERIFIER = "python:tests.dqo.evaluation.verifiers:digits"


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A directory with a model and problems."""
    path = tmp_path_factory.mktemp("eval")
    save(policy(), tokenizer(), path / "model")
    prompts = list(dict.fromkeys(row["prompt"] for row in rollout_rows(prompts=9)))[:7]
    rows = [{"prompt": prompt, "answer": str(i)} for i, prompt in enumerate(prompts)]
    (path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(there, output, **changes):
    told = {"model_name_or_path": str(there / "model"), "tasks": str(there / "problems.jsonl"), "verifier": VERIFIER}
    told |= {
        "output_dir": str(output),
        "num_generations": 4,
        "max_completion_length": 12,
        "batch_size": 8,
        "use_cpu": True,
    }
    return EvalConfig(**told | changes)


def arguments(there, output, **changes):
    told = vars(config(there, output)) | changes
    names = (
        "model_name_or_path",
        "tasks",
        "verifier",
        "output_dir",
        "num_generations",
        "max_completion_length",
        "batch_size",
    )
    return [part for name in (*names, *changes) for part in (f"--{name}", str(told[name]))]


@pytest.fixture(scope="module")
def whole(there):
    evaluate(config(there, there / "whole"), quiet=True)
    return read_evaluation(there / "whole")


def test_every_problem_is_answered_and_graded_as_the_verifier_says(whole):
    from tests.dqo.evaluation.verifiers import digits

    assert Counter(key[0] for key in whole.answers) == {"greedy": 7, "sampling": 28}
    for answer in whole.answers.values():
        expected = digits(answer.response, {})
        if answer.finish_reason == "length":
            assert not answer.parsed and answer.score == 0
        else:
            assert (answer.score, answer.parsed, answer.answer) == (expected.score, expected.parsed, expected.answer)
        assert len(answer.completion_ids) <= 12 and answer.logprob < 0
    assert {answer.finish_reason for answer in whole.answers.values()} == {"stop", "length"}


def test_the_summary_is_what_the_rows_come_to(whole):
    summary = json.loads((whole.directory / "summary.json").read_text())
    rows = [[answer.right for answer in given] for given in whole.of("sampling")]
    assert summary["measures"]["pass@1"]["mean"] == pytest.approx(sum(map(sum, rows)) / 28)
    by_hand = sum(pass_at_k(4, int(sum(row)), 2) for row in rows) / 7
    assert summary["measures"]["pass@2"]["mean"] == pytest.approx(by_hand)
    assert 0 < by_hand < 1 and "maj@4" in summary["measures"]
    assert (summary["problems"], summary["verifier"]) == (7, VERIFIER)


def content(directory):
    return sorted((directory / "results.jsonl").read_text().splitlines())


def test_an_evaluation_goes_on_after_it_was_stopped_and_samples_do_not_depend_on_that(there, whole, monkeypatch):
    append, calls = Appended.append, []

    def stops(self, rows):
        append(self, rows)
        calls.append(rows)
        if len(calls) == 3:
            with self.path.open("ab") as file:
                file.write(b'{"decoding": "sampl')  # a line that a full stop cut
            raise KeyboardInterrupt

    monkeypatch.setattr(Appended, "append", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(there, there / "stopped"), quiet=True)
    assert 0 < len(read_lines(there / "stopped" / "results.jsonl")) < 35
    monkeypatch.setattr(Appended, "append", append)
    evaluate(config(there, there / "stopped", batch_size=5), quiet=True)
    assert _rounded(content(there / "stopped")) == _rounded(content(there / "whole"))


def _rounded(lines):
    rows = [json.loads(line) for line in lines]
    return sorted(json.dumps(row | {"logprob": round(row["logprob"], 3)}, sort_keys=True) for row in rows)


def _killed(arguments):
    """`dqo eval` in a process of its own, which is killed after its second batch of rows."""
    append, calls = Appended.append, []

    def killed(self, rows):
        append(self, rows)
        calls.append(rows)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Appended.append = killed
    eval_command([*arguments, "--use_cpu"])


@pytest.mark.slow
def test_a_sigkill_loses_and_doubles_nothing(there, whole):
    assert forked.ended(forked.start(_killed, arguments(there, there / "killed"))) == -signal.SIGKILL
    assert len(read_lines(there / "killed" / "results.jsonl")) == 15
    eval_command([*arguments(there, there / "killed"), "--use_cpu"])
    assert _rounded(content(there / "killed")) == _rounded(content(there / "whole"))


def test_more_samples_are_added_and_nothing_is_sampled_again(there, whole, monkeypatch):
    output = there / "more"
    evaluate(config(there, output, num_generations=2), quiet=True)
    few = content(output)
    evaluate(config(there, output), quiet=True)
    assert set(few) < set(content(output))
    assert _rounded(content(output)) == _rounded(content(there / "whole"))
    monkeypatch.setattr(module, "load_backend", lambda *_, **__: pytest.fail("nothing is missing"))
    before = content(output)
    _, summary = evaluate(config(there, output), quiet=True)
    assert content(output) == before and summary["measures"]["pass@1"]["mean"] > 0


def test_another_verifier_grades_again_what_is_stored(there, whole, monkeypatch):
    output = there / "again"
    evaluate(config(there, output), quiet=True)
    responses = {a.key: a.response for a in read_evaluation(output).answers.values()}
    monkeypatch.setattr(module, "load_backend", lambda *_, **__: pytest.fail("nothing is missing"))
    _, summary = evaluate(config(there, output, verifier="gsm8k"), quiet=True)
    found = read_evaluation(output)
    assert {a.key: a.response for a in found.answers.values()} == responses
    assert {a.verifier for a in found.answers.values()} == {"gsm8k"} and not found.of_others
    assert summary["unread"]["sampling"]["share"] == 1 and summary["measures"]["pass@1"]["mean"] == 0


def test_a_verifier_of_ones_own_that_was_mended_grades_again(there, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    own = tmp_path / "mended_verifier.py"
    told = config(there, tmp_path / "out", verifier="python:mended_verifier:grade", num_generations=2)
    other = config(there, tmp_path / "other", verifier="python:mended_verifier:grade", num_generations=2)
    own.write_text("def grade(completion, problem):\n    return Fals\n")
    assert evaluate(told, quiet=True)[1]["measures"]["pass@1"]["mean"] == 0
    evaluate(other, quiet=True)
    responses = {a.key: a.response for a in read_evaluation(tmp_path / "out").answers.values()}
    # of another size: Python takes compiled code for new by size and second
    own.write_text("def grade(completion, problem):\n    return True  # mended\n")
    monkeypatch.setattr(module, "load_backend", lambda *_, **__: pytest.fail("nothing is missing"))
    found, summary = evaluate(told, quiet=True)
    ended = [a for a in found.answers.values() if a.finish_reason == "stop"]
    assert ended and all(a.right and a.error is None for a in ended) and summary["measures"]["pass@1"]["mean"] > 0
    assert {a.key: a.response for a in read_evaluation(tmp_path / "out").answers.values()} == responses
    with pytest.raises(UserError, match="graded by python:mended_verifier:grade before and after its file was changed"):
        api.evaluate(compare=(str(tmp_path / "out"), str(tmp_path / "other")))


def test_other_options_in_the_same_directory_are_refused(there, whole):
    with pytest.raises(UserError, match="temperature 1.0 then, 0.5 now.*choose another --output_dir"):
        evaluate(config(there, there / "whole", temperature=0.5), quiet=True)


def test_searches_and_scores_of_a_run_are_kept_with_the_answers(there):
    output = there / "searched"
    told = config(there, output, num_beams=3, scorers=("likelihood",), step_beams=2, step_samples=2, greedy=False)
    _, summary = evaluate(told, quiet=True)
    found = read_evaluation(output)
    assert Counter(key[0] for key in found.answers) == {"sampling": 28, "beam-3": 7, "step-2x2 likelihood": 7}
    assert found.scores["likelihood"].keys() == {key for key in found.answers if key[0] == "sampling"}
    assert {"beam-3", "step-2x2 likelihood", "best@4 likelihood"} <= summary["measures"].keys()
    lines = (output / "scores.jsonl").read_text()
    evaluate(told, quiet=True)
    assert (output / "scores.jsonl").read_text() == lines


def test_the_command_shows_the_table_and_compares(there, whole, capsys):
    evaluate(config(there, there / "other", seed=1), quiet=True)
    eval_command([*arguments(there, there / "whole"), "--use_cpu"])
    shown = capsys.readouterr().out
    assert "whole: 7 problems" in shown and "pass@4" in shown and "unread %" in shown
    eval_command(["--compare", str(there / "whole"), str(there / "other"), "--output_dir", str(there / "compared")])
    shown = capsys.readouterr().out
    assert "whole - other" in shown and "sign-flip permutation" in shown
    found = json.loads((there / "compared" / "compare.json").read_text())
    assert list(found["measures"]) == ["greedy", "pass@1", "maj@4"]


def test_scores_that_some_samples_lack_are_made_however_many_others_there_are(there, tmp_path):
    scored = {"scorers": ("likelihood",), "greedy": False}
    evaluate(config(there, tmp_path / "out", num_generations=8, **scored), quiet=True)
    path = tmp_path / "out" / "scores.jsonl"
    rows = read_lines(path)
    kept = [
        row for row in rows if row["problem"] < 4 or row["sample"] < 4
    ]  # as 4 samples, then a killed run with 8 leave it
    assert len(rows) == 56 and len(kept) > 6 * 7
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    _, summary = evaluate(config(there, tmp_path / "out", num_generations=6, **scored), quiet=True)
    assert "best@6 likelihood" in summary["measures"]


TEMPLATE = (
    "{% for m in messages %}{{ '#' if m.role == 'user' else '=' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}={{ '\\n' if shout else '' }}{% endif %}"
)


def test_chat_models_answer_messages(there, tmp_path):
    chat = tokenizer()
    chat.chat_template = TEMPLATE
    save(policy(), chat, tmp_path / "model")
    rows = [
        {"prompt": [{"role": "user", "content": "1+2"}], "answer": "3"},
        {"prompt": [{"role": "user", "content": "1+2"}], "answer": "3", "chat_template_kwargs": {"shout": True}},
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = evaluate(config(tmp_path, tmp_path / "out"), quiet=True)
    save(policy(), tokenizer(), tmp_path / "plain" / "model")
    texts = [{"prompt": "#1+2=", "answer": "3"}, {"prompt": "#1+2=\n", "answer": "3"}]
    (tmp_path / "plain" / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    plain, _ = evaluate(config(tmp_path / "plain", tmp_path / "plain" / "out"), quiet=True)
    assert {k: a.completion_ids for k, a in found.answers.items()} == {
        k: a.completion_ids for k, a in plain.answers.items()
    }
    assert found.answers["greedy", 0, 0].completion_ids != found.answers["greedy", 1, 0].completion_ids


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_beams": 1}, "num_beams must be 0, or at least 2"),
        ({"step_beams": 2}, "scorers must be given with step_beams"),
        (
            {"scorers": ("beauty",)},
            "scorers must be some of implicit, implicit_min, likelihood, value, each alone or as NAME:RUN",
        ),
        (
            {"scorers": ("beauty:run",)},
            "scorers must be some of implicit, implicit_min, likelihood, value, each alone or as",
        ),
        (
            {"scorers": ("implicit:",)},
            "scorers must be some of implicit, implicit_min, likelihood, value, each alone or as",
        ),
        (
            {"scorers": ("value:run",), "value_model": "v"},
            "value_model must be left out without the scorer value of the model",
        ),
        (
            {"scorers": ("implicit:run",), "ref_model_name_or_path": "m"},
            "ref_model_name_or_path must be left out without the scorer implicit of the model itself",
        ),
        ({"verifier": "gms8k"}, "verifier must be one of gsm8k"),
        ({"compare": ("a", "b")}, "model_name_or_path must be left out with compare"),
        (
            {"compare": ("a", "b"), "model_name_or_path": None, "tasks": None, "verifier": None},
            "num_generations must be left out with compare",
        ),
        ({"tasks": None}, "tasks must be given"),
        ({"greedy": False, "num_generations": 0}, "num_generations must be above 0 where nothing else is asked for"),
        ({"temperature": 1e-42}, "temperature must be 0, or at least 1e-06"),
        ({"temperature": 0.0}, "temperature must be above 0 with more than one sample"),
    ],
)
def test_options_that_do_not_fit_are_named(there, changes, message):
    said = [f"{name} {what}" for name, what in config(there, "out", **changes).problems()]
    assert any(line.startswith(message) for line in said), said


def test_python_has_the_command_as_a_function(there, whole):
    found = api.evaluate(quiet=True, **vars(config(there, there / "whole")))
    assert (
        found["measures"]["pass@1"] == json.loads((whole.directory / "summary.json").read_text())["measures"]["pass@1"]
    )
    with pytest.raises(UserError, match="several evaluations have the name 'whole'"):
        api.evaluate(compare=(str(there / "whole"), str(there / "whole")))
    with pytest.raises(UserError, match="unknown option 'num_generation'. Did you mean 'num_generations'"):
        api.evaluate(num_generation=3)
