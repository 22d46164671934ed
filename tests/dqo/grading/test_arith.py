import random

import pytest

from dqo.grading.arith import DIGITS, OPERATORS, VOCABULARY, ArithTask, apply

TASK = ArithTask(3, 8)
PROMPT = "7+8*3-9="
RIGHT = "7+8=5\n5*3=5\n5-9=6\n#6"


def pairs(task, count, seed=1):
    rng = random.Random(seed)
    prompts = [task.problem(rng) for _ in range(count)]
    return [(prompt, task.demonstration(prompt, rng)) for prompt in prompts]


def test_the_table_holds_true_arithmetic_modulo_ten():
    for value in range(10):
        for operand in range(10):
            for operator in OPERATORS:
                assert apply(value, operator, operand) == eval(f"{value}{operator}{operand}") % 10


def test_a_quarter_of_the_table_is_hard_and_its_mistakes_are_wrong():
    assert len(TASK.mistakes) == 75
    assert all(digit in range(10) and digit != apply(*entry) for entry, digit in TASK.mistakes.items())


def test_the_seed_alone_fixes_the_hard_entries():
    assert ArithTask(1, 2, seed=3).mistakes == ArithTask(5, 9, right_share=0.1, seed=3).mistakes
    assert ArithTask(1, 2, seed=3).mistakes != ArithTask(1, 2, seed=4).mistakes


def test_problems_have_every_allowed_number_of_steps_and_no_other():
    rng = random.Random(0)
    lengths = {sum(c in OPERATORS for c in TASK.problem(rng)) for _ in range(500)}
    assert lengths == set(range(3, 9))


def test_the_same_random_state_gives_the_same_problems_and_demonstrations():
    assert pairs(TASK, 20) == pairs(TASK, 20)


def test_prompts_and_demonstrations_stay_within_the_vocabulary():
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 16
    for prompt, completion in pairs(TASK, 200):
        assert set(prompt + completion) <= set(VOCABULARY)


def test_answers_agree_with_python_evaluated_from_left_to_right():
    for prompt, _ in pairs(TASK, 300):
        value = int(prompt[0])
        for i in range(1, len(prompt) - 1, 2):
            value = eval(f"{value}{prompt[i : i + 2]}") % 10
        assert TASK.answer(prompt) == str(value)


def test_solutions_are_correct_in_every_step():
    for prompt, _ in pairs(TASK, 300):
        grade = TASK.grade(prompt, TASK.solution(prompt))
        assert grade.correct and all(grade.step_correct)


def test_a_demonstration_errs_only_on_hard_entries_and_then_with_their_digit():
    for prompt, completion in pairs(TASK, 500):
        *steps, answer = completion.split("\n")
        assert answer == "#" + steps[-1][-1]
        for line, right in zip(steps, TASK.grade(prompt, completion).step_correct, strict=False):
            if not right:
                assert TASK.mistakes[int(line[0]), line[1], int(line[2])] == int(line[4])


def test_demonstrations_are_right_on_42_percent_of_the_hard_entries():
    hard = []
    for prompt, completion in pairs(TASK, 4000):
        grade = TASK.grade(prompt, completion)
        for line, right in zip(completion.split("\n")[:-1], grade.step_correct, strict=False):
            if (int(line[0]), line[1], int(line[2])) in TASK.mistakes:
                hard.append(right)
    assert len(hard) > 4000
    assert sum(hard) / len(hard) == pytest.approx(0.42, abs=0.03)


@pytest.mark.parametrize("completion", [RIGHT, RIGHT[:9], RIGHT + "\n", "\n\n", "x", "", "7+8=5\n\n#5\n#5\n1"])
def test_the_steps_are_the_lines_and_cover_the_whole_completion(completion):
    grade = TASK.grade(PROMPT, completion)
    assert "".join(completion[a:b] for a, b in grade.steps) == completion
    assert [completion[a:b] for a, b in grade.steps] == completion.splitlines(keepends=True)
    assert len(grade.steps) == len(grade.step_correct)


GRADES = {
    "right": (RIGHT, True, [True, True, True, True]),
    "a wrong step, then consistent": ("7+8=4\n4*3=2\n2-9=3\n#3", False, [False, True, True, True]),
    "right answer against its own chain": ("7+8=5\n5*3=5\n5-9=4\n#6", True, [True, True, False, False]),
    "value copied wrongly": ("7+8=5\n4*3=2\n2-9=3\n#3", False, [True, False, True, True]),
    "wrong operator": ("7+8=5\n5+3=8\n8-9=9\n#9", False, [True, False, True, True]),
    "malformed step": ("7+8=5\n5*=5\n5-9=6\n#6", False, [True, False, False, True]),
    "answer without its mark": ("7+8=5\n5*3=5\n5-9=6\n6", False, [True, True, True, False]),
    "text after the answer": ("7+8=5\n5*3=5\n5-9=6\n#6\n", False, [True, True, True, False]),
    "one step too many": ("7+8=5\n5*3=5\n5-9=6\n6-9=7\n#6", False, [True, True, True, False, False]),
    "one step left out": ("7+8=5\n5*3=5\n#6", False, [True, True, False]),
    "answer without steps": ("#6", False, [False]),
    "cut in a step": ("7+8=5\n5*3", False, [True, False]),
    "cut before the answer": ("7+8=5\n5*3=5\n5-9=6\n#", False, [True, True, True, False]),
    "empty": ("", False, []),
}


@pytest.mark.parametrize("completion, correct, step_correct", GRADES.values(), ids=GRADES.keys())
def test_a_hand_written_completion_gets_the_grade_it_deserves(completion, correct, step_correct):
    grade = TASK.grade(PROMPT, completion)
    assert grade.correct is correct
    assert grade.step_correct == step_correct


@pytest.mark.parametrize("prompt", ["", "7=", "7+8", "7+8==", "17+8=", "7/8="])
def test_a_text_that_is_no_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="not a prompt"):
        TASK.grade(prompt, RIGHT)


@pytest.mark.parametrize("options", [(0, 3), (4, 3), (1, 2, 1.5), (1, 2, 0.25, -0.1)])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError):
        ArithTask(*options)


def test_problems_use_every_digit_and_operator():
    assert set("".join(prompt for prompt, _ in pairs(TASK, 200))) == set(DIGITS + OPERATORS + "=")


def enumerated(task, prompt, begun=""):
    """The pass rate by trying every way in which a demonstration can go on."""
    chain = prompt[1:-1]
    value, done = (int(begun[-2]), begun.count("\n")) if begun else (int(prompt[0]), 0)
    total = 0.0
    stack = [(value, done, 1.0)]
    while stack:
        value, done, chance = stack.pop()
        if done == len(chain) // 2:
            total += chance * (str(value) == task.answer(prompt))
            continue
        entry = (value, chain[2 * done], int(chain[2 * done + 1]))
        wrong = task.mistakes.get(entry)
        if wrong is None:
            stack.append((apply(*entry), done + 1, chance))
        else:
            stack += [
                (apply(*entry), done + 1, chance * task.right_share),
                (wrong, done + 1, chance * (1 - task.right_share)),
            ]
    return total


def test_the_pass_rate_of_a_prefix_is_that_of_all_its_demonstrations():
    task = ArithTask(2, 6, hard_share=0.6)
    seen = set()
    for prompt, text in pairs(task, 100):
        lines = text.splitlines(keepends=True)
        for count in range(len(lines)):
            begun = "".join(lines[:count])
            rate = task.pass_rate(prompt, begun)
            assert rate == pytest.approx(enumerated(task, prompt, begun))
            seen.add(round(rate, 2))
        assert task.pass_rate(prompt, text) == task.grade(prompt, text).correct
    assert len(seen) > 20


def test_what_no_demonstration_writes_has_no_pass_rate():
    assert (
        TASK.pass_rate(PROMPT, "7+8=5\n4*3=2\n")
        == TASK.pass_rate(PROMPT, "x\n")
        == TASK.pass_rate(PROMPT, RIGHT + "\n1")
        == 0
    )
