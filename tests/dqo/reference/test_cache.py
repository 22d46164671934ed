"""Entries come back bit for bit, to whoever asks with the same tokens and the same reference, and to nobody else."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest

from dqo.errors import UserError
from dqo.models.policy import architecture_hash, weights_hash
from dqo.reference.cache import Entry, ReferenceCache, ReferenceId, response_key
from tests.dqo.helpers import policy

IDENTITY = ReferenceId(weights="w", architecture="a", dtype="float32", softcap=None)


def entries_of(count, seed=0, longest=9):
    """Random responses and numbers, {key: Entry}."""
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(count):
        length = int(rng.integers(1, longest))
        key = response_key([seed, i], rng.integers(0, 50, length).tolist())
        found[key] = Entry(*rng.normal(size=(2, length)).astype(np.float32))
    return found


def lengths_of(entries):
    return {key: len(entry.logprobs) for key, entry in entries.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, entry in expected.items():
        assert np.array_equal(found[key].logprobs, entry.logprobs) and found[key].logprobs.dtype == np.float32
        assert np.array_equal(found[key].lse, entry.lse) and found[key].lse.dtype == np.float32


def filled(root, *segments, identity=IDENTITY):
    cache = ReferenceCache(root, identity, "somewhere/model")
    for entries in segments:
        cache.add(entries)
    return cache


def test_subsets_and_supersets_find_what_is_there(tmp_path):
    first, second, absent = entries_of(5), entries_of(7, seed=1), entries_of(3, seed=2)
    filled(tmp_path, first, second)
    everything = first | second
    reader = ReferenceCache(tmp_path, IDENTITY, "another/place")
    assert_same(reader.lookup(lengths_of(everything)), everything)
    assert_same(reader.lookup(lengths_of(everything | absent)), everything)
    some = dict(list(everything.items())[3:9:2])
    assert_same(reader.lookup(lengths_of(some)), some)
    assert reader.lookup(lengths_of(absent)) == {}


def test_the_key_of_a_response_says_where_the_prompt_ends():
    keys = [
        response_key([1, 2], [3]),
        response_key([1], [2, 3]),
        response_key([1, 2], [4]),
        response_key([1, 2, 3], []),
    ]
    assert len(set(keys)) == 4
    assert response_key([1, 2], [3]) == response_key([1, 2], [3])


@pytest.mark.parametrize(
    "change", [{"weights": "v"}, {"architecture": "b"}, {"dtype": "bfloat16"}, {"softcap": 30.0}], ids=str
)
def test_nothing_of_another_reference_is_found(tmp_path, change):
    entries = entries_of(5)
    filled(tmp_path, entries)
    other = ReferenceCache(tmp_path, dataclasses.replace(IDENTITY, **change), "somewhere/model")
    assert other.lookup(lengths_of(entries)) == {}


def test_an_overwritten_model_has_another_identity():
    assert weights_hash(policy()) != weights_hash(policy(seed=1))
    other = policy()
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    assert weights_hash(policy()) == weights_hash(other)
    assert architecture_hash(policy()) == architecture_hash(policy(seed=1)) != architecture_hash(other)


def test_no_entry_keeps_a_segment_in_memory(tmp_path):
    entries = entries_of(100)
    wanted = dict(list(entries.items())[:2])
    found = filled(tmp_path, entries).lookup(lengths_of(wanted))
    assert {entry.logprobs.base.size for entry in found.values()} == {sum(lengths_of(wanted).values())}


@pytest.mark.parametrize("keep", [0, 7, 100, -1], ids=lambda n: f"{n} bytes")
def test_a_truncated_segment_is_named_and_not_used(tmp_path, caplog, keep):
    whole, broken = entries_of(5), entries_of(6, seed=1)
    cache = filled(tmp_path, broken)
    (path,) = cache.directory.glob("segment-*")
    cache.add(whole)
    path.write_bytes(path.read_bytes()[:keep])
    assert_same(cache.lookup(lengths_of(whole | broken)), whole)
    assert str(path) in caplog.text and "is damaged" in caplog.text and "delete it" in caplog.text
    cache.describe()
    cache.add(broken)  # computed again, the same content has the same name
    caplog.clear()
    assert_same(cache.lookup(lengths_of(whole | broken)), whole | broken)
    assert not caplog.records


@pytest.mark.parametrize("field", ["lengths", "keys", "lse", "logprobs"])
def test_a_segment_that_contradicts_itself_is_not_used(tmp_path, caplog, field):
    from safetensors.numpy import load_file, save_file

    entries = entries_of(5)
    cache = filled(tmp_path, entries)
    (path,) = cache.directory.glob("segment-*")
    tensors = load_file(path)
    tensors[field] = tensors[field][:-1].copy()
    save_file(tensors, path)
    assert cache.lookup(lengths_of(entries)) == {}
    assert "is damaged" in caplog.text


def test_an_entry_of_another_length_is_not_used(tmp_path, caplog):
    entries = entries_of(5)
    lengths = lengths_of(entries)
    lengths[next(iter(lengths))] += 1
    assert filled(tmp_path, entries).lookup(lengths) == {}
    assert "lengths differ" in caplog.text


def test_half_written_segments_are_not_read_and_old_ones_are_deleted(tmp_path):
    entries = entries_of(5)
    cache = filled(tmp_path, entries)
    (path,) = cache.directory.glob("segment-*")
    fresh, old = (path.with_name(f".segment-{name}.safetensors.{name}.partial") for name in ("aa", "bb"))
    for partial in (fresh, old):
        partial.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert_same(ReferenceCache(tmp_path, IDENTITY, "m").lookup(lengths_of(entries)), entries)
    assert fresh.exists() and not old.exists()  # another process may be writing the fresh one


def test_two_writers_of_the_same_entries_do_not_disturb_each_other(tmp_path):
    entries = entries_of(5)
    one, two = filled(tmp_path, entries), filled(tmp_path, entries)
    assert len(list(one.directory.glob("segment-*"))) == 1
    assert_same(two.lookup(lengths_of(entries)), entries)


def test_the_description_is_readable(tmp_path):
    entries = entries_of(5) | entries_of(4, seed=1)
    cache = filled(tmp_path, entries_of(5), entries_of(4, seed=1))
    cache.describe()
    meta = json.loads((cache.directory / "meta.json").read_text())
    assert meta["model"] == "somewhere/model" and meta["dtype"] == "float32" and meta["weights"] == "w"
    assert meta["responses"] == 9 and meta["tokens"] == sum(lengths_of(entries).values())


def test_the_cache_holds_no_pickle_and_nothing_half_written(tmp_path):
    cache = filled(tmp_path, entries_of(5))
    cache.add({})
    cache.describe()
    assert sorted(p.suffix for p in cache.directory.iterdir()) == [".json", ".safetensors"]


def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="ref_cache_dir .*file.* cannot be written"):
        ReferenceCache(tmp_path / "file", IDENTITY, "m")


def test_a_hundred_thousand_responses_are_read_in_seconds(tmp_path):
    count, length = 100_000, 40
    values = np.random.default_rng(0).random((2, count * length), np.float32)
    keys = [i.to_bytes(32, "little") for i in range(count)]
    rows = [slice(i * length, (i + 1) * length) for i in range(count)]
    entries = {key: Entry(values[0, row], values[1, row]) for key, row in zip(keys, rows)}
    cache = ReferenceCache(tmp_path, IDENTITY, "somewhere/model")
    for begin in range(0, count, 20_000):
        cache.add({key: entries[key] for key in keys[begin : begin + 20_000]})
    begun = time.process_time()
    found = cache.lookup(lengths_of(entries))
    assert time.process_time() - begun < 5.0  # takes about 0.3; a search over files or tokens takes a minute
    assert np.array_equal(np.concatenate([found[key].lse for key in keys]), values[1])
