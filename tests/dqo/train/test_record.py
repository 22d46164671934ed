"""run.json: hashes, counts, penalised steps, and the commands of a run that was begun more than once."""

import hashlib
import json
import random
import sys

import numpy as np
import torch

from dqo.data.episode import Episode
from dqo.data.rows import Row
from dqo.train.record import (
    begin_record,
    data_counts,
    data_hash,
    end_record,
    parameters,
    penalised_steps,
    stored_record,
)


def episode(text, step_ends=(), step_rewards=(), prompt=0, label=True):
    return Episode(
        prompt_ids=[ord("p")],
        completion_ids=[ord(c) for c in text],
        rewards=np.zeros(len(text), np.float32),
        reward=float(label),
        label=label,
        terminated=True,
        prompt_index=prompt,
        source=f"a.jsonl:{prompt}",
        step_ends=list(step_ends),
        step_rewards=list(step_rewards),
    )


class Letters:
    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))


def test_the_hash_of_a_file_is_that_of_sha256sum(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 3_000_000)
    assert data_hash(str(path), []) == {"sha256": hashlib.sha256(b"x" * 3_000_000).hexdigest(), "of": "file"}


def test_the_hash_of_rows_depends_on_what_they_hold_and_not_on_their_order_or_place():
    rows = [Row(prompt="p", completion=str(i), reward=float(i), source=f"a:{i}") for i in range(9)]
    there = data_hash("org/name", rows)
    moved = [Row(prompt=r.prompt, completion=r.completion, reward=r.reward, source="b:1") for r in rows]
    random.Random(0).shuffle(moved)
    assert there["of"] == "rows" and data_hash(None, moved) == there
    assert data_hash(None, rows[1:]) != there
    assert data_hash(None, [*rows[1:], Row(prompt="p", completion="0", reward=0.5)]) != there


def test_counts_by_hand():
    found = data_counts([episode("abc", label=True), episode("a", label=False), episode("ab", prompt=1)])
    assert found == {
        "rows": 3,
        "problems": 2,
        "share_correct": 2 / 3,
        "mixed_prompts": 1,
        "mean_length": 2.0,
        "max_length": 3,
        "tokens": 9,
    }


def test_penalised_steps_by_hand():
    good = episode("aabb", [1, 3], [0.0, 1.0])
    bad = episode("aabbcc", [1, 3, 5], [0.5, -1.0, -2.0], prompt=1)
    same_prompt = episode("zz", [1], [-3.0], prompt=1)
    found = penalised_steps(Letters(), [good, bad, same_prompt], "additive")
    counts = {"rows": 2, "of_rows": 3, "steps": 3, "of_steps": 6, "mean_reward": -2.0, "process_reward": "additive"}
    assert {key: found[key] for key in counts} == counts
    assert found["examples"] == [
        {
            "prompt": "p",
            "before": "aa",
            "text": "bb",
            "after": "cc",
            "step": 2,
            "steps": 3,
            "reward": -1.0,
            "source": "a.jsonl:1",
        }
    ]


def test_a_potential_is_penalised_where_it_falls():
    found = penalised_steps(Letters(), [episode("aabbcc", [1, 3, 5], [0.5, 0.25, 0.75])], "potential")
    assert (found["steps"], found["mean_reward"]) == (1, -0.25) and found["examples"][0]["text"] == "bb"


def test_steps_without_rewards_are_none_and_rewards_without_a_penalty_have_no_mean():
    assert penalised_steps(Letters(), [episode("aabb", [1, 3])], None) is None
    assert penalised_steps(Letters(), [episode("aa", [1], [0.0])], "none")["mean_reward"] is None


def test_parameters_that_are_trained_are_told_apart():
    model = torch.nn.Linear(2, 3)
    assert parameters(model, None) == {"policy": 9}
    model.bias.requires_grad_(False)
    assert parameters(model, torch.nn.Linear(1, 1)) == {"policy": 9, "policy, trained": 6, "value model": 2}


def test_a_run_that_goes_on_keeps_its_begin_and_every_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/dqo-train", "--run_name", "a b"])
    begin_record(tmp_path, {"steps": 3})
    first = stored_record(tmp_path)
    assert first["commands"] == ["dqo-train --run_name 'a b'"] and first["finished"] is False
    end_record(tmp_path, {"seconds": 2.0})
    monkeypatch.setattr(sys, "argv", ["/somewhere/dqo/__main__.py", "train"])
    begin_record(tmp_path, {"steps": 3})
    second = stored_record(tmp_path)
    assert second["commands"] == [*first["commands"], "python -m dqo train"]
    assert second["created"] == first["created"] and second["finished"] and second["seconds"] == 2.0


def test_a_damaged_record_is_begun_anew(tmp_path):
    (tmp_path / "run.json").write_text('{"half')
    begin_record(tmp_path, {"steps": 3})
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 3
