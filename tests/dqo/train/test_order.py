"""The order of groups: permutations without weights, and with weights exact shares wherever a run begins, goes on or ends."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dqo.config.options import load_options
from dqo.data.batches import epoch_order
from dqo.errors import UserError
from dqo.train.loop import Trainer
from dqo.train.order import Order, draws, slots
from dqo.train.run import train
from tests.dqo.helpers import arguments, rollout_rows

WEIGHTS = st.lists(st.floats(1e-3, 1), min_size=1, max_size=6).map(lambda found: np.array(found) / sum(found))


def members_of(sizes):
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends)]


@given(WEIGHTS, st.integers(0, 10**6), st.integers(1, 200))
def test_shares_are_exact_wherever_they_are_looked_at(weights, begin, length):
    """And each slot is that of the whole: what is computed of a stretch alone joins what is before and behind it."""
    source, draw = slots(weights, begin, begin + length)
    assert len(source) == len(draw) == length
    before, after = draws(weights, begin), draws(weights, begin + length)
    assert before.sum() == begin and (after - before == np.bincount(source, minlength=len(weights))).all()
    assert (np.abs(after - weights * (begin + length)) <= (1 + len(weights)) / 2).all()
    for k in range(len(weights)):
        assert draw[source == k].tolist() == list(range(before[k], after[k]))  # none left out, none twice
    middle = begin + length // 2
    parts = [
        np.concatenate(both) for both in zip(slots(weights, begin, middle), slots(weights, middle, begin + length))
    ]
    assert (parts[0] == source).all() and (parts[1] == draw).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data(), st.integers(1, 5), st.integers(0, 40))
def test_each_data_set_is_read_in_permutations_of_its_own(sizes, data, per_step, steps):
    weights = np.array(data.draw(st.lists(st.floats(0.05, 1), min_size=len(sizes), max_size=len(sizes))))
    order = Order(members_of(sizes), weights / weights.sum(), per_step, 7)
    read = [order.step(position) for position in range(steps)]
    again = Order(order.members, order.weights, per_step, 7)
    assert all((again.step(position) == read[position]).all() for position in reversed(range(steps)))
    lengths = [min(per_step, order.size - index * per_step) for index in range(order.per_epoch)]
    assert [len(groups) for groups in read] == [lengths[position % order.per_epoch] for position in range(steps)]
    flat = [int(i) for groups in read for i in groups]
    assert order.visited(steps).tolist() == sorted(set(flat))
    for own in order.members:
        mine = [i for i in flat if i in own]
        for begin in range(0, len(mine), len(own)):
            turn = mine[begin : begin + len(own)]
            assert len(set(turn)) == len(turn)  # none again before all


def test_the_seed_shuffles_each_data_set_by_itself_and_anew_each_time():
    def read(seed):
        order = Order(members_of([50, 50]), np.array([0.5, 0.5]), 10, seed)
        flat = np.concatenate([order.step(position) for position in range(20)])
        return [flat[flat // 50 == k] % 50 for k in (0, 1)]

    (first, second), (other, _) = read(1), read(2)
    assert not any((one == two).all() for one, two in ((first, second), (first, other), (first[:50], first[50:])))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 30))
def test_without_weights_an_epoch_is_one_permutation_of_all(sizes, per_step, position):
    order, count = Order(members_of(sizes), None, per_step, 3), sum(sizes)
    epoch, index = divmod(position, math.ceil(count / per_step))
    expected = epoch_order(count, epoch, 3)[index * per_step : (index + 1) * per_step]
    assert order.step(position).tolist() == expected.tolist()
    read = {int(i) for step in range(position) for i in order.step(step)}
    assert order.visited(position).tolist() == sorted(read)


@pytest.fixture
def two(files):
    """Another data set beside rollouts.jsonl."""
    rows = [row | {"prompt": f"{row['prompt']}"} for row in rollout_rows(prompts=5, samples=3, seed=1)]
    (files / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return files


def run(files, output, weights=(0.4, 0.6), **changes):
    named = [f"{files / name}:{weight}" for name, weight in zip(("rollouts.jsonl", "more.jsonl"), weights)]
    settings = {"dataset_name": ",".join(named), "output_dir": files / output, "max_steps": 9, "save_steps": 3}
    settings |= {"per_device_train_batch_size": 5, "logging_steps": 1} | changes
    return train(load_options(arguments(files, **settings)))


def test_a_run_reads_its_shares_and_goes_on_bit_for_bit(two, monkeypatch, capfd):
    read, stop_at = [], [None]
    original = Trainer.train_step

    def spy(self, step, groups):
        if step == stop_at[0]:
            raise KeyboardInterrupt
        read.append([e.source for group in groups for e in group])
        return original(self, step, groups)

    monkeypatch.setattr(Trainer, "train_step", spy)
    whole = run(two, "whole")
    said = capfd.readouterr().out
    assert "40.0% of a run from " in said and "60.0% of a run from " in said and "more.jsonl: " in said
    first = Counter(source.partition(":")[0] for step in read for source in step)
    assert first == {"rollouts.jsonl": 18, "more.jsonl": 27}  # of 45: exactly
    assert all(Counter(s.partition(":")[0] for s in step)["more.jsonl"] == 3 for step in read)
    expected, read[:] = list(read), []
    stop_at[0] = 5
    with pytest.raises(KeyboardInterrupt):
        run(two, "broken")
    stop_at[0] = None
    done = run(two, "broken")
    assert read[:5] + read[5:] == [*expected[:5], *expected[3:]]
    one, other = (load_file(made.output_dir / "model.safetensors") for made in (whole, done))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((done.output_dir / "run.json").read_text())["data"]["of"] == "files"
    with pytest.raises(UserError, match="option dataset_name: .*more.jsonl:0.6' then, .*more.jsonl:0.7' now"):
        run(two, "broken", weights=(0.3, 0.7))


def test_weights_where_nothing_is_to_be_weighted_are_refused(two):
    with pytest.raises(
        UserError, match="more.jsonl has the weight 0.6, and the method finds nothing to train on in it"
    ):
        rows = [json.loads(line) | {"reward": 1.0} for line in (two / "more.jsonl").read_text().splitlines()]
        (two / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
        run(two, "pairs", method="dpo")
    (two / "held.jsonl").write_text((two / "more.jsonl").read_text())
    held = f"{two / 'held.jsonl'}:0.5,{two / 'more.jsonl'}:0.5"
    with pytest.raises(UserError, match="has weights, and responses for evaluation are read once each"):
        run(two, "held", eval_dataset_name=held)
