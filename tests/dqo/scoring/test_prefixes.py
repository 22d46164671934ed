"""Measured prefix values: against exact ones, shared by equal prefixes, kept when a run is killed, and used by training."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binom

from dqo.api import sample, score
from dqo.commands.score import score_command
from dqo.data.appending import appending
from dqo.data.episodes import make_episodes
from dqo.data.rows import read_rows
from dqo.data.sources import read_records
from dqo.data.together import check_process_reward
from dqo.data.tokens import tokenize_rows
from dqo.errors import UserError
from dqo.grading.arith import ArithTask
from dqo.grading.pool import VerifierPool
from dqo.models.new import save
from dqo.processes import ALONE
from dqo.scoring.options import ScoreConfig
from dqo.scoring.prefixes import Measurement, prefixes_of
from dqo.scoring.rows import read_scored
from dqo.scoring.steps import line_steps
from tests.dqo.helpers import gpt2, policy, rollout_rows, tokenizer
from tests.dqo.scoring.demonstrator import Demonstrator
from tests.dqo.together import launched

TASK = ArithTask(3, 7, hard_share=0.7, right_share=0.7)
TOKENIZER = tokenizer()
CONFIG = ScoreConfig(
    data="", verifier="arith", output_file="s.jsonl", prefix_values=4, model_name_or_path="demonstrator",
    max_completion_length=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    with VerifierPool("arith") as made:
        yield made


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def demonstrations(prompts=8, samples=3, seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(prompts):
        prompt = TASK.problem(rng)
        found += [{"prompt": prompt, "completion": TASK.demonstration(prompt, rng)} for _ in range(samples)]
    return found


def on_tokens(rows):
    _, scored = read_scored(rows)
    for row in scored:
        row.cut(line_steps(row.text))
    backend = Demonstrator(TASK)
    return scored, tokenize_rows([row.row for row in scored], TOKENIZER, backend.ends, len(TOKENIZER), 10**6)


def measured(rows, pool, backend, config=CONFIG, said=None, path="values.jsonl", processes=ALONE):
    scored, tokens = on_tokens(rows)
    with appending(path, {}, lambda row: (row["prefix"], float(row["value"])), processes=processes) as file:
        say = (lambda text: None) if said is None else said.append
        return scored, Measurement(config, pool, file, processes).values(scored, tokens, lambda: backend, say)


def test_processes_of_a_launch_measure_parts_and_all_of_them_know_all(pool, monkeypatch):
    rows = demonstrations(prompts=4)
    alone = measured(rows, pool, Demonstrator(TASK), path="alone.jsonl")[1]
    monkeypatch.setattr("dqo.scoring.prefixes.gather_objects", lambda items, processes: processes.gather(items))
    backends = [Demonstrator(TASK), Demonstrator(TASK)]

    def work(processes):
        with VerifierPool("arith", 1) as own:
            return measured(rows, own, backends[processes.rank], path="together.jsonl", processes=processes)[1]

    assert launched(2, work) == [alone, alone]
    assert by_key("together.jsonl") == by_key("alone.jsonl")
    assert all(backend.asked for backend in backends)


def by_key(path):
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert len({row["prefix"] for row in rows}) == len(rows)
    return {row["prefix"]: row["value"] for row in rows}


def texts(row):
    """The row's prompt, then its prefixes, as text."""
    lines = row.text.splitlines(keepends=True)
    return ["".join(lines[:i]) for i in range(len(lines))]


def test_values_of_the_demonstrator_are_its_exact_pass_rates_up_to_chance(pool):
    count = 32
    rows, values = measured(demonstrations(), pool, Demonstrator(TASK), replace(CONFIG, prefix_values=count))
    found = {}
    for row, value in zip(rows, values):
        for begun, rate in zip(texts(row), [value.prompt, *value.steps]):
            found[row.row.prompt, begun] = rate
    exact = {key: TASK.pass_rate(*key) for key in found}
    assert len({round(rate, 3) for rate in exact.values()}) > 8  # there is something to estimate
    level = 1e-3 / len(found)
    for key, rate in found.items():
        low, high = binom.interval(1 - level, count, exact[key])
        assert low <= round(rate * count) <= high, (key, rate, exact[key])
    variance = sum(rate * (1 - rate) for rate in exact.values()) / count
    assert abs(sum(found[key] - exact[key] for key in found)) < 4 * math.sqrt(variance)


def test_equal_prefixes_share_one_value_and_the_cost_is_said_before(pool):
    rows, said, backend = demonstrations(samples=6), [], Demonstrator(TASK)
    scored, values = measured(rows, pool, backend, said=said)
    states = {}
    for row, value in zip(scored, values):
        for begun, rate in zip(texts(row), [value.prompt, *value.steps]):
            assert states.setdefault((row.row.prompt, begun), rate) == rate
    assert backend.asked == 4 * len(states) < 4 * sum(len(texts(row)) for row in scored)
    longest = 4 * 64 * len(states)
    assert said == [
        f"{len(states):,} prefixes of 48 rows, 0 of them measured before: {4 * len(states):,} continuations, {longest:,} tokens "
        "at most"
    ]


def test_a_killed_measurement_goes_on_and_another_run_finds_its_values(pool):
    rows = demonstrations()
    _, whole = measured(rows, pool, Demonstrator(TASK), path="whole.jsonl")
    total = len(Path("whole.jsonl").read_text().splitlines())
    first = Demonstrator(TASK, fails_at=4 * 20 + 3)  # sixteen prefixes have been written by then
    with pytest.raises(KeyboardInterrupt):
        measured(rows, pool, first)
    second, said = Demonstrator(TASK), []
    _, found = measured(rows, pool, second, said=said)
    assert found == whole and second.asked == 4 * (total - 16)
    assert f"{total} prefixes of 24 rows, 16 of them measured before" in said[0]
    keys = [json.loads(line)["prefix"] for line in Path("values.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == total
    third = Demonstrator(TASK)
    measured(rows[:9], pool, third, replace(CONFIG, share=0.5))
    assert third.asked == 0


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_of_a_share_the_values_are_those_of_states_in_all_rows(pool, share):
    rows = demonstrations(prompts=40, samples=4)
    config = replace(CONFIG, share=share, prefix_values=2)
    scored, values = measured(rows, pool, Demonstrator(TASK), config)
    everything, _ = measured(rows, pool, Demonstrator(TASK), replace(config, share=1.0), path="all.jsonl")
    keys = {json.loads(line)["prefix"] for line in Path("values.jsonl").read_text().splitlines()}
    assert len(keys) < len(Path("all.jsonl").read_text().splitlines())
    states, chosen = {}, 0
    for row, value, tokens in zip(scored, values, on_tokens(rows)[1]):
        for begun, rate in zip(texts(row), [value.prompt, *value.steps]):
            assert states.setdefault((row.row.prompt, begun), rate) == rate
        own = [prefix.key in keys for prefix in prefixes_of(row, tokens)]
        assert own[0]  # every prompt is measured
        chosen += all(own)
        known = [value.prompt]
        for measured_here, rate in zip(own[1:], value.steps):
            assert measured_here or rate == known[-1]  # what was not measured has the value of the state before
            known.append(rate)
    assert chosen >= share * len(rows) / 2


def test_a_continuation_that_does_not_end_in_time_has_not_passed(pool):
    rows = [{"prompt": "1+2+3=", "completion": TASK.solution("1+2+3=")}]
    easy = ArithTask(2, 2, hard_share=0.0)
    for limit, prompt in ((15, 1.0), (14, 0.0)):  # two lines, the answer and its end are 15 tokens
        config = replace(CONFIG, max_completion_length=limit, prefix_values=2)
        scored, (value,) = measured(rows, pool, Demonstrator(easy), config, path=f"{limit}.jsonl")
        assert (value.prompt, value.steps[0]) == (prompt, prompt)


@pytest.fixture
def model(place):
    save(policy(), TOKENIZER, place / "model")
    rows = rollout_rows(prompts=4, samples=2)
    bare = [{key: value for key, value in row.items() if key != "reward"} for row in rows]
    Path("r.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*bare[:-1], bare[-1] | {"finish_reason": "length"}])
    )
    measure = ["--steps", "lines", "--prefix_values", "2", "--model_name_or_path", "model"]
    return ["r.jsonl", "--verifier", "arith", *measure]


def test_the_command_writes_rows_that_training_takes_for_potentials(model, capsys):
    score_command([*model, "--max_completion_length", "32", "--output_file", "s.jsonl"])
    assert "continuations," in capsys.readouterr().out
    rows = read_rows("s.jsonl")
    check_process_reward(rows, "s.jsonl", "potential")
    episodes = make_episodes(rows, TOKENIZER, vocab_size=len(TOKENIZER), max_length=64, process_reward="potential")
    for row, episode in zip(rows, episodes):
        assert sum(episode.rewards) == pytest.approx(row.reward - row.prompt_value)
        assert row.step_rewards[-1] == (row.reward if row.finish_reason != "length" else row.step_rewards[-2])
    whole = Path("s.jsonl").read_bytes()
    Path("s.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"pro')
    score_command([*model, "--max_completion_length", "32", "--output_file", "s.jsonl"])
    assert ": 0 continuations, 0 tokens at most" in capsys.readouterr().out
    assert Path("s.jsonl").read_bytes() == whole
    with pytest.raises(UserError, match="s.jsonl.prefixes.jsonl: was begun under other options: seed 0 then, 1 now"):
        more = ["--prefix_cache", "s.jsonl.prefixes.jsonl", "--seed", "1", "--output_file", "t.jsonl"]
        score_command([*model, "--max_completion_length", "32", *more])


@pytest.mark.parametrize(
    "length, said",
    [
        (
            "18",
            "r.jsonl:1: its steps before the last have 18 tokens, and max_completion_length 18 leaves no room after them",
        ),
        (
            "64",
            "r.jsonl:1: 8 tokens of prompt and 64 of the response .max_completion_length., and the model has 32 positions",
        ),
    ],
)
def test_rows_without_room_for_continuations_are_named(model, length, said):
    save(gpt2(), TOKENIZER, Path("positions"))
    with pytest.raises(UserError, match=said):
        score_command([*model[:-1], "positions", "--max_completion_length", length, "--output_file", "s.jsonl"])


def test_what_a_model_samples_is_scored_and_measured(place):
    save(policy(), TOKENIZER, place / "model")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"1+{i}="}) + "\n" for i in range(4)))
    sample(
        quiet=True, model_name_or_path="model", prompts="prompts.jsonl", output_file="r.jsonl", max_completion_length=24
    )
    sampled = read_records("r.jsonl")[1]
    empty = sampled[0].values | {"completion": "", "completion_ids": [2], "logprobs": [-1.0], "finish_reason": "stop"}
    with Path("r.jsonl").open("a") as file:
        file.write(json.dumps(empty) + "\n")
    options = {"prefix_values": 2, "model_name_or_path": "model", "max_completion_length": 24, "steps": "sentences"}
    found = score(data="r.jsonl", verifier="arith", output_file="s.jsonl", **options)
    assert found.rows == len(sampled) + 1 == 33
    assert found.outcomes["cut"] == sum(record.values["finish_reason"] == "length" for record in sampled)
    rows = read_rows("s.jsonl")
    assert (rows[-1].steps, rows[-1].step_rewards) == ([], [])
    episodes = make_episodes(rows, TOKENIZER, vocab_size=len(TOKENIZER), max_length=64, process_reward="potential")
    assert all(sum(e.rewards) == pytest.approx(row.reward - row.prompt_value) for row, e in zip(rows, episodes))
