import dataclasses
import json

import pytest
import torch

from dqo.config.options import load_options
from dqo.data.batches import collate
from dqo.objectives import ADPO, DPO
from dqo.processes import ALONE
from dqo.train.asked import Asked, question
from dqo.train.run import train
from tests.dqo.helpers import arguments, episodes


def run(files, output, **changes):
    settings = {"method": "adpo", "eval_fraction": 0, "save_steps": 3, "save_total_limit": 9, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 4, "threshold": 0.004} | changes
    return train(load_options(arguments(files, output_dir=files / output, **settings)))


def logged(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{n: x for n, x in row.items() if not n.startswith("perf/")} for row in rows if "queries" in row]


def test_equal_groups_are_one_question_whatever_the_order_of_their_responses():
    a, b, c = episodes(3)
    b.prompt_ids = c.prompt_ids = a.prompt_ids
    assert question([a, b]) == question([b, a]) == question([dataclasses.replace(a, reward=9.0), b])
    others = [[a, c], [a], [a, b, c], [dataclasses.replace(a, prompt_ids=[5]), b]]
    names = {question(group) for group in [[a, b], *others]}
    assert len(names) == 5


def test_a_question_is_counted_once_and_known_from_the_next_step_on():
    members = episodes(8)
    members[1].prompt_ids = members[0].prompt_ids
    asked, batch = Asked(ADPO()), collate(members, 0, sizes=[2, 2, 2, 2])
    twice = collate(members[:2] + members[1::-1], 0, sizes=[2, 2])
    asked.put_known(batch)
    assert not batch.columns["known"].any()
    asked.note(batch, torch.tensor([True, False, False, True]))
    asked.begin()  # the step is tried again
    asked.note(batch, torch.tensor([True, False, False, False]))
    asked.note(twice, torch.tensor([True, True]))
    assert asked.settle(ALONE) == {"queries": 1, "pseudo_labels": 3}
    again = Asked(ADPO(), json.loads(json.dumps(asked.stored()))["asked"])
    again.put_known(batch)
    lengths = [e.action_count for e in members]
    assert batch.columns["known"].tolist() == [1.0] * sum(lengths[:2]) + [0.0] * sum(lengths[2:])
    again.begin()
    again.note(batch, torch.tensor([False, True, False, False]))
    assert again.settle(ALONE) == {"queries": 2, "pseudo_labels": 5}
    nothing = Asked(DPO())
    assert nothing.settle(ALONE) == {} == nothing.stored()


def test_a_run_that_goes_on_has_asked_what_an_unbroken_one_asked(files):
    whole, part = run(files, "whole"), run(files, "part", max_steps=12)
    found = logged(whole.output_dir)
    assert 0 < found[2]["queries"] < found[-1]["queries"] and found[2]["pseudo_labels"] > 0
    for step in (6, 9, 12):
        for path in sorted((part.output_dir / f"checkpoint-{step}").rglob("*")):
            path.unlink()
        (part.output_dir / f"checkpoint-{step}").rmdir()
    run(files, "part")
    assert logged(part.output_dir) == found
    state, expected = (
        json.loads((files / name / "checkpoint-12" / "dqo_state.json").read_text())["asked"]
        for name in ("part", "whole")
    )
    assert state == expected and expected["pseudo_labels"] == found[-1]["pseudo_labels"]


def test_the_split_into_micro_batches_changes_no_count(files):
    found = [
        logged(run(files, f"{i}", max_steps=6, **options).output_dir)
        for i, options in enumerate(({}, {"max_batch_tokens": 100, "padding_free": True}))
    ]
    counts = [[(row["queries"], row["pseudo_labels"]) for row in rows] for rows in found]
    assert counts[0] == counts[1] and counts[0][-1][1] > 0


def test_all_labels_asked_it_is_dpo_and_asks_each_pair_once(files):
    epochs = {"per_device_train_batch_size": 16, "max_steps": 6}
    run(files, "all", threshold=1e9, **epochs)
    arguments_of_dpo = arguments(
        files, output_dir=files / "dpo", method="dpo", eval_fraction=0, logging_steps=1, **epochs
    )
    train(load_options(arguments_of_dpo))
    rows = [json.loads(line) for line in (files / "dpo" / "metrics.jsonl").read_text().splitlines()]
    ours = logged(files / "all")
    assert [row["loss"] for row in ours] == [row["loss"] for row in rows if "loss" in row]
    half = len(ours) // 2
    assert ours[half - 1]["queries"] == ours[-1]["queries"] > 0 == ours[-1]["pseudo_labels"]
    assert ours[0]["labels/asked"] == 1.0 and ours[-1]["labels/asked"] == 0.0


def test_pairs_that_are_missing_are_counted_and_the_cure_is_named(files):
    from dqo.errors import UserError

    rows = [{"prompt": f"{i}+1=", "completion": "1", "reward": float(i % 2)} for i in range(6)]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        UserError, match="method adpo: .* 0 pairs. There are 6 responses, 3 of them correct, to 6 prompts"
    ):
        run(files, "out")
