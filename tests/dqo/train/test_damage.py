"""A run whose files were cut, altered or deleted ends as an unbroken one, or says in a line what is damaged; never otherwise."""

import json
import logging
import random
import shutil

import pytest
import torch

from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.train import damage
from dqo.train.checkpoint import checkpoints, read_state
from dqo.train.damage import STATE_FILE, check_whole, newest_whole
from dqo.train.run import train
from tests.dqo.train.test_kill import arguments, assert_same_run, data, finish, metrics_without_speed, unbroken  # noqa: F401

pytestmark = pytest.mark.slow

SEED = random.SystemRandom().randrange(2**32)  # set it to the printed one to see a failure again


@pytest.fixture(autouse=True)
def one_thread():
    """As the unbroken run had, so that kernels round alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def copy(data, unbroken, tmp_path):  # noqa: F811
    """A finished run without its final models, to be damaged."""
    shutil.copytree(unbroken[0], tmp_path / "out")
    return tmp_path / "out"


def resume(data, directory, *more):  # noqa: F811
    return train(load_options([*arguments(data, directory), *more]))


def emptied(content, rng):
    return b""


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def altered(content, rng):
    """A few bytes are others."""
    changed = bytearray(content)
    for i in rng.sample(range(len(content)), min(3, len(content))):
        changed[i] ^= rng.randrange(1, 256)
    return bytes(changed)


def braces(content, rng):
    return b"{}"


def zeros(content, rng):
    """What some file systems leave after a power cut."""
    return bytes(len(content))


def deleted(content, rng):
    return None


WAYS = [emptied, cut, altered, braces, zeros, deleted]


def damage_file(path, way, rng):
    content = way(path.read_bytes(), rng)
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_file_of_a_checkpoint_is_missed(copy, way):
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    last = copy / "checkpoint-21"
    check_whole(last)
    for path in [path for path in last.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        damage_file(path, way, rng)
        whole, damaged = newest_whole(checkpoints(copy))
        assert whole == copy / "checkpoint-18" and damaged.keys() == {last}
        (line,) = damaged[last].splitlines()
        assert line.startswith(f"{last} is damaged: ") and path.name in line
        path.write_bytes(content)
    check_whole(last)


@pytest.mark.parametrize("name", [STATE_FILE, "model.safetensors", "critic/model.safetensors", "optimizer.safetensors"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(data, unbroken, copy, name, caplog):  # noqa: F811
    damage_file(copy / "checkpoint-21" / name, random.Random(SEED).choice(WAYS), random.Random(SEED))
    with caplog.at_level(logging.WARNING):
        resume(data, copy)
    assert f"{copy}/checkpoint-21 is damaged: {name}" in caplog.text
    assert f"It is now {copy}/damaged-checkpoint-21; going on from {copy}/checkpoint-18" in caplog.text
    assert (copy / "damaged-checkpoint-21").is_dir()
    assert_same_run(copy, unbroken[0])


def test_without_a_whole_checkpoint_nothing_is_begun_anew_in_silence(data, copy):  # noqa: F811
    for path in checkpoints(copy):
        (path / STATE_FILE).write_text("{}")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match="checkpoint-21 is damaged: .* no other checkpoint in .* is whole; put its files"
    ):
        resume(data, copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_named_checkpoint_that_is_damaged_is_refused(data, copy):  # noqa: F811
    (copy / "checkpoint-21" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint-21 is damaged: optimizer.safetensors was altered or cut"):
        resume(data, copy, "--resume_from_checkpoint", str(copy / "checkpoint-21"))
    assert (copy / "checkpoint-21").is_dir()


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_behind_the_named_one_do_not_come_back(data, unbroken, copy, keep, caplog):  # noqa: F811
    named = ["--resume_from_checkpoint", str(copy / "checkpoint-18"), "--save_total_limit", str(keep)]
    shutil.copytree(copy / "checkpoint-21", copy / "checkpoint-24")
    with caplog.at_level(logging.WARNING):
        resume(data, copy, *named)
    for step in (21, 24):
        assert (
            f"checkpoint-{step} is behind {copy}/checkpoint-18 and is not used: it is now {copy}/left-" in caplog.text
        )
        assert (copy / f"left-checkpoint-{step}").is_dir()
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-18", "checkpoint-21"][-keep:]
    assert metrics_without_speed(copy) == metrics_without_speed(unbroken[0])


def test_a_file_that_cannot_be_read_is_not_taken_for_damaged(copy, monkeypatch):
    def fails(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(damage, "crc32_of", fails)
    with pytest.raises(UserError, match="checkpoint-21/.*: cannot be read: Input/output error"):
        newest_whole(checkpoints(copy))


def without_checksums(checkpoint):
    """As an earlier version wrote it."""
    state = json.loads((checkpoint / STATE_FILE).read_text())
    del state["crc32"], state["files"], state["counters"]["metrics_crc32"]
    (checkpoint / STATE_FILE).write_text(json.dumps(state))


def test_checkpoints_without_checksums_are_read(data, unbroken, copy):  # noqa: F811
    without_checksums(copy / "checkpoint-18")
    shutil.rmtree(copy / "checkpoint-21")
    resume(data, copy)
    assert "files" not in read_state(copy / "checkpoint-18") and "files" in read_state(copy / "checkpoint-21")
    assert_same_run_but_for_checksums(copy, unbroken[0])


def assert_same_run_but_for_checksums(found, expected):
    assert metrics_without_speed(found) == metrics_without_speed(expected)
    for name in ("model.safetensors", "critic/model.safetensors", "checkpoint-21/optimizer.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize("way", [emptied, cut, deleted], ids=lambda way: way.__name__)
def test_what_is_cut_is_missed_without_checksums_too(copy, way):
    last = copy / "checkpoint-21"
    without_checksums(last)
    check_whole(last)
    damage_file(last / "optimizer.safetensors", way, random.Random(SEED))
    with pytest.raises(UserError, match="checkpoint-21 is damaged"):
        check_whole(last)


@pytest.mark.parametrize("key", ["identity", "counters", "window"])
def test_a_state_that_lacks_a_key_is_damaged(copy, key):
    last = copy / "checkpoint-21"
    without_checksums(last)
    state = json.loads((last / STATE_FILE).read_text())
    del state[key]
    (last / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(UserError, match=f"{STATE_FILE} has no {key}"):
        check_whole(last)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_damaged_metrics_and_configurations_keep_the_run(data, unbroken, copy, way, caplog):  # noqa: F811
    shutil.rmtree(copy / "checkpoint-21")
    rng = random.Random(SEED)
    position = read_state(copy / "checkpoint-18")["counters"]["metrics_position"]
    rows = copy / "metrics.jsonl"
    rows.write_bytes(rows.read_bytes()[:position])
    damage_file(rows, way, rng)
    damage_file(copy / "config.yaml", way, rng)
    for path in copy.glob("ref_cache/*/segment-*"):
        damage_file(path, way, rng)
    with caplog.at_level(logging.WARNING):
        resume(data, copy)
    assert f"{rows} is shorter than" in caplog.text or f"{rows} was altered" in caplog.text
    segments = [record for record in caplog.records if "its responses are computed again" in record.message]
    assert len(segments) == (0 if way is deleted else len({record.message for record in segments}))
    assert bool(segments) == (way is not deleted)
    for name in ("model.safetensors", "critic/model.safetensors", "checkpoint-21/optimizer.safetensors", "config.yaml"):
        if name != "config.yaml":
            assert (copy / name).read_bytes() == (unbroken[0] / name).read_bytes()
    assert metrics_without_speed(copy)[-1] == metrics_without_speed(unbroken[0])[-1]
