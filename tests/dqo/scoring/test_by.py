"""Steps rewarded by a model: against plain forward passes, for training, resumed, and what does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dqo.api import score
from dqo.commands.score import score_command
from dqo.config.options import load_options
from dqo.data.episodes import make_episodes
from dqo.data.rows import read_rows
from dqo.data.together import check_process_reward
from dqo.errors import UserError
from dqo.models.critic import load_critic
from dqo.models.new import bpe_tokenizer, character_tokenizer, new_llama, save
from dqo.models.policy import load_policy
from dqo.scoring import by
from dqo.scoring.steps import line_steps
from dqo.train.run import train
from tests.dqo.helpers import arguments, gpt2, policy, rollout_rows, tokenizer

ROWS = [{k: v for k, v in row.items() if k != "reward"} for row in rollout_rows(prompts=5, samples=2)]
TOKENIZER = tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, run/ of two steps from it with a value model, rft/ without, models that do not fit; rows.jsonl without rewards."""
    folder = tmp_path_factory.mktemp("by")
    save(policy(), TOKENIZER, folder / "model")
    (folder / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollout_rows(prompts=12, samples=4))))
    for name, more in {"run": {"beta": 0.05, "value_model": "separate"}, "rft": {"method": "rft"}}.items():
        settings = {"max_steps": 2, "learning_rate": 1e-2, "critic_learning_rate": 1e-2, "eval_fraction": 0.0} | more
        train(load_options(arguments(folder, output_dir=folder / name, **settings)))
    write(folder / "rows.jsonl", ROWS)
    save(policy(), character_tokenizer("9876543210+-*=#\n"), folder / "digits")
    save(gpt2(), TOKENIZER, folder / "positions")
    broken = policy()
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    save(broken, TOKENIZER, folder / "broken")
    return folder


@pytest.fixture(autouse=True)
def place(folder, tmp_path, monkeypatch):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(by, "AT_ONCE", 4)
    monkeypatch.setattr("dqo.scoring.run.AT_ONCE", 4)
    return tmp_path


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def scored(output="s.jsonl", data="rows.jsonl", **options):
    score(data=data, output_file=output, **{"steps": "lines"} | options)
    return read(output)


def plain(row):
    """Token ids of prompt and response, which are characters and the end; the bounds of its lines, the end in the last one."""
    prompt, ids = (TOKENIZER(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion"))
    ends = [end for _, end in line_steps(row["completion"])]
    return prompt, [*ids, TOKENIZER.eos_token_id], [0, *ends[:-1], ends[-1] + 1]


def logprobs(model, row):
    prompt, ids, _ = plain(row)
    with torch.no_grad():
        table = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return np.array([table[len(prompt) - 1 + t, token] for t, token in enumerate(ids)])


def test_implicit_pays_each_step_its_log_ratio_and_potentials_add_them_up(capsys):
    pi, ref = load_policy("run"), load_policy("model")
    score_command(["rows.jsonl", "--by", "implicit:run", "--steps", "lines", "--output_file", "s.jsonl"])
    shown = capsys.readouterr().out
    tokens = sum(len(prompt) + len(ids) for prompt, ids, _ in map(plain, ROWS))
    steps = sum(len(row["step_rewards"]) for row in read("s.jsonl"))
    cost = (
        f"steps rewarded by implicit:run: 10 of 10 rows with {steps} steps; policy and reference read {tokens:,} tokens"
    )
    assert shown.splitlines()[0] == cost
    assert shown.splitlines()[1].startswith(f"s.jsonl: 10 rows, no rewards; {steps} step rewards, mean ")
    potentials = scored("p.jsonl", by="implicit:run", by_as="potentials")
    for row, sums, phi in zip(ROWS, read("s.jsonl"), potentials, strict=True):
        assert {k: v for k, v in sums.items() if k not in ("steps", "step_rewards")} == row  # no prompt_value either
        ratios, bounds = 0.05 * (logprobs(pi, row) - logprobs(ref, row)), plain(row)[2]
        expected = [ratios[a:b].sum() for a, b in zip(bounds, bounds[1:])]
        np.testing.assert_allclose(sums["step_rewards"], expected, atol=1e-6)
        np.testing.assert_allclose(phi["step_rewards"], np.cumsum(expected), atol=2e-6)
        assert phi["prompt_value"] == 0
    assert np.abs(np.concatenate([row["step_rewards"] for row in read("s.jsonl")])).max() > 1e-3


def test_likelihood_is_of_any_model_and_value_rises_from_state_to_state():
    critic, model = load_critic(Path("run/critic")), load_policy("model")
    values = scored("v.jsonl", by="value:run", by_as="potentials")
    rises = scored("r.jsonl", by="value:run")
    likelihoods = scored("l.jsonl", by="likelihood:model")
    for row, phi, rise, likely in zip(ROWS, values, rises, likelihoods, strict=True):
        prompt, ids, bounds = plain(row)
        with torch.no_grad():
            v = (
                critic(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, 0].numpy()
            )  # of the states before tokens
        assert phi["prompt_value"] == pytest.approx(v[0], abs=1e-5)
        expected = [*(v[end] for end in bounds[1:-1]), v[-1]]
        np.testing.assert_allclose(phi["step_rewards"], expected, atol=1e-5)
        np.testing.assert_allclose(rise["step_rewards"], np.diff(expected, prepend=v[0]), atol=1e-5)
        found = logprobs(model, row)
        sums = [found[a:b].sum() for a, b in zip(bounds, bounds[1:])]
        np.testing.assert_allclose(likely["step_rewards"], sums, rtol=1e-5)
    assert np.ptp([row["prompt_value"] for row in values]) > 1e-3


def test_training_takes_them_beside_the_rewards_of_a_verifier():
    answered = write("a.jsonl", [row | {"answer": "1"} for row in ROWS])
    told = {"data": answered, "verifier": "arith", "processes": 1}
    additive = scored("s.jsonl", by="implicit:run", **told)
    scored("p.jsonl", by="value:run", by_as="potentials", **told)
    assert {row["reward"] for row in additive} == {0.0, 1.0} and "grading" in additive[0]
    for path, kind in (("s.jsonl", "additive"), ("p.jsonl", "potential")):
        rows = read_rows(path)
        check_process_reward(rows, path, kind)  # all rows of a prompt have one prompt_value, to the last bit
        for row, episode in zip(
            rows, make_episodes(rows, TOKENIZER, vocab_size=19, max_length=64, process_reward=kind)
        ):
            paid = sum(row.step_rewards) if kind == "additive" else -row.prompt_value
            assert episode.rewards.sum() == pytest.approx(row.reward + paid, abs=1e-5)


@pytest.mark.parametrize("options", [{"by": "implicit:run"}, {"by": "value:run", "by_as": "potentials"}])
def test_a_killed_run_goes_on_bit_for_bit_and_computes_no_row_again(options, monkeypatch):
    rows = scored("whole.jsonl", **options)
    asked = []

    def fails(models, episodes, names, description=None):
        asked.append(len(episodes))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return token_scores(models, episodes, names, description)

    token_scores = by.token_scores
    monkeypatch.setattr(by, "token_scores", fails)
    with pytest.raises(KeyboardInterrupt):
        scored(**options)
    assert read("s.jsonl") == rows[:4]  # what was computed together is there
    with Path("s.jsonl").open("a") as file:
        file.write('{"prompt": "')
    said = []
    monkeypatch.setattr(by.ByModel, "measured", lambda self, w, say, of=by.ByModel.measured: of(self, w, said.append))
    scored(**options)
    assert Path("s.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert asked == [4, 4, 4, 2] and ": 6 of 10 rows" in said[0]
    if "value" in options["by"]:
        return
    shutil.copytree("run", "later", symlinks=True)
    save(policy(seed=3), TOKENIZER, Path("other"))
    shutil.copy("other/model.safetensors", "later/model.safetensors")
    Path("s.jsonl").rename("t.jsonl")
    Path("s.jsonl.options.json").rename("t.jsonl.options.json")
    with pytest.raises(UserError, match="begun under other options: by .*; hash of the models of by"):
        scored("t.jsonl", **options | {"by": options["by"].replace("run", "later")})


def test_a_token_that_crosses_a_boundary_belongs_to_the_step_in_which_it_begins():
    texts = ["abab abab cdcd cdcd"]
    own = bpe_tokenizer(texts * 50, 300)
    model = new_llama(own, hidden_size=16, layers=1, heads=2)
    save(model, own, Path("bpe"))
    (crossing,) = [
        i for i, (a, b) in enumerate(own(texts[0], return_offsets_mapping=True)["offset_mapping"]) if a < 6 < b
    ]
    row = {"prompt": "a", "completion": texts[0], "steps": [[0, 6], [6, 19]]}
    (found,) = scored(data=write("b.jsonl", [row]), steps=None, by="likelihood:bpe")
    ids = own(texts[0])["input_ids"] + [own.eos_token_id]
    prompt = own("a")["input_ids"]
    with torch.no_grad():
        table = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    each = [table[len(prompt) - 1 + t, token].item() for t, token in enumerate(ids)]
    np.testing.assert_allclose(found["step_rewards"], [sum(each[: crossing + 1]), sum(each[crossing + 1 :])], rtol=1e-5)
    graded = [row | {"reward": 1.0} for row in read("s.jsonl")]  # training pays the first step on the same token
    (episode,) = make_episodes(read_rows(graded), own, vocab_size=len(own), max_length=99)
    assert episode.step_ends[0] == crossing


BAD = [
    ({"by": "implicit"}, "by must be implicit:RUN, value:RUN or likelihood:MODEL, got implicit"),
    ({"by": "explicit:run"}, "by must be implicit:RUN, value:RUN or likelihood:MODEL, got explicit:run"),
    ({"by": None}, "verifier is missing: what grades the responses; or give by"),
    ({"by": None, "verifier": "arith", "by_as": "potentials"}, "by_as must be left out without by, for which it is"),
    ({"by": "value:run", "ref_model_name_or_path": "m"}, "ref_model_name_or_path must be left out but for implicit:RUN"),
    ({"truncated": "grade"}, "truncated must be left out without verifier, for which it is, got grade"),
    ({"verifier": "arith", "prefix_values": 2, "model_name_or_path": "m"}, "prefix_values must be left out with by: both write"),
    ({"batch_size": 2}, "batch_size must be left out without prefix_values, for which it is"),
    ({"by": "implicit:nothing"}, "nothing: there is no such directory; name a run's output_dir"),
    ({"by": "implicit:model"}, "model has no config.yaml of a training run that names its reference; give --ref_model"),
    ({"ref_model_name_or_path": "digits"}, "the reference digits has another tokenizer: token .*; give --ref_model"),
    ({"by": "value:rft"}, r"value:rft: the run has no value model \(critic/\); name a run .*, or take implicit:rft"),
    ({"steps": None}, r"rows.jsonl:1: has no steps, which implicit:run rewards \(10 of 10 rows have none\); give --steps lines"),
    ({"data": "stepped.jsonl"}, "stepped.jsonl:1: has step_rewards already, .* --existing_rewards replace makes them again"),
    ({"data": "ids.jsonl"}, "ids.jsonl:2: steps are character spans, but completion_ids are the ids of another text"),
    ({"data": "turns.jsonl"}, "turns.jsonl:1: its completion has turns .*; leave out --steps and --by"),
    ({"by": "likelihood:positions", "data": "long.jsonl"}, "long.jsonl:1: 4. tokens .* the model has 32 positions .*; drop"),
    ({"by": "likelihood:broken"}, "rows.jsonl:1: likelihood of token 1 of the response is nan, which rewards no step"),
]  # fmt: skip


@pytest.mark.parametrize("options, said", BAD)
def test_what_does_not_fit_is_named_before_a_row_is_written(options, said):
    stepped = ROWS[0] | {"steps": [[0, len(ROWS[0]["completion"])]], "step_rewards": [0.5]}
    write("stepped.jsonl", [stepped])
    write("ids.jsonl", [ROWS[0], ROWS[1] | {"completion_ids": [5, 6, 7, 2]}])
    write("turns.jsonl", [ROWS[0] | {"turn_spans": [[0, 2], [3, 5]]}])
    write("long.jsonl", [{"prompt": "1+1=", "completion": "1+1=2\n" * 7}])
    given = {"data": "rows.jsonl", "by": "implicit:run", "output_file": "s.jsonl", "steps": "lines"} | options
    with pytest.raises(UserError, match=said):
        score(**given)
    assert not Path("s.jsonl").exists() or Path("s.jsonl").stat().st_size == 0


def test_step_rewards_are_replaced_when_told_and_old_potentials_go_with_them():
    write(
        "old.jsonl",
        [ROWS[0] | {"step_rewards": [0.5], "steps": [[0, len(ROWS[0]["completion"])]], "prompt_value": 0.3}],
    )
    (row,) = scored(data="old.jsonl", steps=None, by="implicit:run", existing_rewards="replace")
    assert len(row["step_rewards"]) == 1 and row["step_rewards"] != [0.5] and "prompt_value" not in row
