"""Verifiers in killable processes: whatever one does costs its own grade, in its time, and leaves no process behind."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dqo.errors import UserError
from dqo.grading.pool import VerifierPool, check_answers

SECOND = 0.6
VERIFIER = """
import os, signal, subprocess, sys, time
from dqo.grading.grade import Grade

LEAK = []

def fork(then):
    if os.fork() == 0:
        then()
    return True

def grade(completion, row):
    return {
        "right": lambda: True,
        "wrong": lambda: False,
        "row": lambda: row["answer"] == "7",
        "score": lambda: 0.75,
        "hang": lambda: time.sleep(1000),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "deaf": lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()), time.sleep(1000)),
        "multiply": lambda: 9**9**9,
        "print": lambda: (print("{}" * 10**5, flush=True), os.write(1, b"{}\\n"), os.write(2, b"x"), True)[-1],
        "read": lambda: sys.stdin.read() == "",
        "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "exit": lambda: sys.exit(3),
        "_exit": lambda: os._exit(3),
        "raise": lambda: {}["key"],
        "interrupt": lambda: exec("raise KeyboardInterrupt"),
        "fill": lambda: [0] * 10**10,
        "leak": lambda: bool(LEAK.append(bytearray(60 * 2**20))) or True,
        "fork": lambda: fork(lambda: None),
        "fork and hang": lambda: fork(lambda: time.sleep(1000)),
        "child": lambda: (subprocess.Popen(["sleep", row["nap"]], start_new_session=True), time.sleep(1000)),
        "nan": lambda: float("nan"),
        "inf": lambda: float("inf"),
        "none": lambda: None,
        "text": lambda: "yes",
        "many": lambda: [True],
        "complex": lambda: 1j,
        "huge": lambda: 10**400,
        "grade": lambda: Grade(0.0, False, None),
        "odd grade": lambda: Grade(float("nan")),
        "answer": lambda: Grade(1.0, True, "18"),
        "half": lambda: Grade(1.0, True, "\\ud83d"),
        "raise half": lambda: int("\\ud83d"),
        "half error": lambda: Grade(0.0, error="\\ud83d"),
    }[completion]()
"""
UNGRADED = {
    "hang": "timeout",
    "stop": "timeout",
    "deaf": "timeout",
    "multiply": "timeout",
    "child": "timeout",
    "segfault": "crash: the process was killed by SIGSEGV",
    "exit": "crash: SystemExit: 3",
    "_exit": "crash: the process exited with 3",
    "raise": "crash: KeyError: 'key'",
    "interrupt": "crash: KeyboardInterrupt",
    "fill": "crash: out of memory",
    "nan": "crash: invalid result: nan; a verifier returns True, False or a finite number",
    "inf": "crash: invalid result: inf; a verifier returns True, False or a finite number",
    "none": "crash: invalid result: None; a verifier returns True, False or a finite number",
    "text": "crash: invalid result: 'yes'; a verifier returns True, False or a finite number",
    "many": "crash: invalid result: [True]; a verifier returns True, False or a finite number",
    "complex": "crash: invalid result: 1j; a verifier returns True, False or a finite number",
    "huge": "crash: invalid result: int too large to convert to float",
    "raise half": r"crash: ValueError: invalid literal for int() with base 10: '\ud83d'",
    "half error": r"crash: \ud83d",
    "odd grade": "crash: invalid result: nan; a verifier returns True, False or a finite number",
}
GRADED = {"right": 1.0, "wrong": 0.0, "row": 1.0, "score": 0.75, "print": 1.0, "read": 1.0}
GRADED |= {"fork": 1.0, "fork and hang": 1.0, "answer": 1.0, "half": 1.0}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verifier")
    (folder / "own_verifier.py").write_text(VERIFIER)
    sys.path.insert(0, str(folder))
    yield "python:own_verifier:grade"
    sys.path.remove(str(folder))


def processes_of(pool):
    return [w._process.pid for w in pool._workers if w._process is not None]


def group_is_gone(group, seconds=5.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        alive = [s for s in Path("/proc").glob("[0-9]*/stat") if _group(s) == group]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def command_of(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _group(stat):
    try:
        state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return None if state == "Z" else int(group)


def test_whatever_a_verifier_does_costs_its_own_grade_alone_and_grades_come_in_order(module, caplog):
    kinds = [*GRADED, *UNGRADED, *GRADED, *(kind for kind, error in UNGRADED.items() if error != "timeout")]
    random.Random(0).shuffle(kinds)
    nap = f"{1000 + random.random()}"  # no other process sleeps as long
    with VerifierPool(module, processes=2, timeout=SECOND) as pool:
        found = pool.grade(kinds, [{"answer": "7", "nap": nap, "source": f"rows.jsonl:{i}"} for i in range(len(kinds))])
        groups = processes_of(pool)
    expected = [(GRADED.get(kind, 0.0), UNGRADED.get(kind)) for kind in kinds]
    assert [(grade.score, grade.error) for grade in found] == expected
    assert all(map(group_is_gone, groups))
    assert not any(nap.encode() in command_of(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    errors = [UNGRADED[kind] for kind in kinds if kind in UNGRADED]
    assert pool.counts == {
        "right": sum(kind in GRADED and GRADED[kind] > 0.5 for kind in kinds),
        "wrong": kinds.count("wrong"),
        "timeout": errors.count("timeout"),
        "crash": len(errors) - errors.count("timeout"),
    }
    kinds_of_errors = {":".join(error.split(":")[:2]) for error in errors}
    assert len(caplog.records) == len(kinds_of_errors)  # each is named once
    assert "rows.jsonl:" in caplog.text and "the completion counts as wrong" in caplog.text


def test_a_verifier_says_whether_it_found_an_answer_and_which(module):
    with VerifierPool(module, processes=1) as pool:
        unparsed, answered = pool.grade(["grade", "answer"], [{}, {}])
    assert unparsed.outcome == "unparsed" and (answered.outcome, answered.answer) == ("right", "18")
    assert pool.counts == {"unparsed": 1, "right": 1}


def test_a_verifier_that_leaks_gets_a_new_process_and_no_grade_is_lost(module):
    with VerifierPool(module, processes=1, memory=2**28) as pool:
        (first,) = (pool.grade(["right"], [{}]), processes_of(pool))[1:]
        assert all(grade.right for grade in pool.grade(["leak"] * 12, [{}] * 12))  # 720 MB, of 256
        assert processes_of(pool) != first


def test_processes_that_a_verifier_leaves_behind_do_not_heap_up(module):
    with VerifierPool(module, processes=1) as pool:
        assert all(grade.right for grade in pool.grade(["fork and hang"] * 80, [{}] * 80))
        (group,) = processes_of(pool)
        assert len([s for s in Path("/proc").glob("[0-9]*/stat") if _group(s) == group]) <= 34
    assert group_is_gone(group)


def test_the_time_limit_is_of_one_completion_and_processes_work_side_by_side(module):
    limit = 2.0  # one after the other they would take four times as long; between are six seconds of a busy machine
    with VerifierPool(module, processes=4, timeout=limit) as pool:
        began = time.monotonic()
        assert [g.error for g in pool.grade(["hang"] * 4 + ["right"] * 20, [{}] * 24)] == ["timeout"] * 4 + [None] * 20
        assert limit <= time.monotonic() - began < 4 * limit


def test_a_completion_of_megabytes_passes():
    text = "x" * 5_000_000 + "\n#### 7"
    with VerifierPool("gsm8k", processes=1) as pool:
        assert pool.grade([text], [{"answer": "7"}])[0].right


@pytest.mark.parametrize("kind", ["hang", "multiply", "fork and hang"])
def test_processes_end_with_the_one_that_started_them_however_it_ended(module, kind):
    code = f"""
    import sys; sys.path[:] = {sys.path!r}
    from dqo.grading.pool import VerifierPool
    pool = VerifierPool({module!r}, processes=1, timeout=1000)
    print(pool._workers[-1]._process.pid, flush=True)
    pool.grade([{kind!r}, "hang"], [{{}}, {{}}])
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    group = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert group_is_gone(group)


def test_a_process_that_died_between_two_grades_is_replaced(module):
    with VerifierPool(module, processes=1) as pool:
        (pid,) = processes_of(pool)
        os.kill(pid, signal.SIGKILL)
        assert pool.grade(["right"], [{}])[0].right and not pool.counts["crash"]


def test_as_many_problems_as_completions_are_needed(module):
    with VerifierPool(module, processes=1) as pool, pytest.raises(ValueError, match="1 completions, 2 problems"):
        pool.grade(["right"], [{}, {}])


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "gsm9k",
            "verifier must be one of gsm8k, number, math, arith, or python:module:function, got 'gsm9k'. Did you mean",
        ),
        ("python:x", "or python:module:function, got 'python:x'"),
        ("python:a b:c", "or python:module:function, got 'python:a b:c'"),
        (
            "python:no_such_module:f",
            "python:no_such_module:f: Python finds no module no_such_module; install its package",
        ),
        ("python:own_verifier:grad", "the module own_verifier has no function grad. Did you mean 'grade'?"),
        ("python:own_verifier:LEAK", "the module own_verifier has no function LEAK"),
        ("python:broken_verifier:grade", "importing broken_verifier fails: ZeroDivisionError: division by zero"),
        ("python:exiting_verifier:grade", "exiting_verifier:grade: the process exited with 4 while it was started"),
    ],
)
def test_a_verifier_that_cannot_be_had_is_named(module, name, said):
    folder = Path(sys.path[0])
    (folder / "broken_verifier.py").write_text("1 / 0")
    (folder / "exiting_verifier.py").write_text("import os; os._exit(4)")
    with pytest.raises(UserError) as caught:
        VerifierPool(name, processes=1)
    assert said in str(caught.value)
    with pytest.raises(UserError):
        check_answers([], name)
