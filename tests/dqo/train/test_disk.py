"""A disk that is full, or fails, at any write: one line that names the file, and what was whole before is whole."""

import errno
import json
import os
import resource
import sys

import pytest

from dqo import DQOConfig, DQOTrainer, files
from dqo.commands.base import run
from dqo.commands.train import main
from dqo.convert.entry import convert
from dqo.demo.recipe import DemoConfig, Recipe
from dqo.demo.run import _claim
from dqo.errors import UserError
from dqo.models.new import save
from dqo.report.page import write_report
from dqo.train import metrics
from dqo.train.checkpoint import checkpoints, save_base
from dqo.train.damage import check_whole
from tests.dqo import forked
from tests.dqo.helpers import policy, tokenizer
from tests.dqo.train.test_kill import arguments, assert_same_run, data, finish, unbroken  # noqa: F401

pytestmark = pytest.mark.slow


def limited(options, output, size):
    """`dqo-train` in a process that can write no file longer than `size` bytes; the kernel says EFBIG where a full disk says
    ENOSPC."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.argv = ["dqo-train", *options]
    main()


def sizes(directory):
    return {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}


# the first file that is longer than this many bytes cannot be written
@pytest.mark.parametrize(
    "size, file",
    [
        (700, "config.yaml"),
        (2150, "segment-"),
        (2500, "segment-|checkpoint-3"),
        (12_000, "checkpoint-3"),
    ],
)
def test_a_run_that_cannot_write_says_so_and_goes_on_later(data, unbroken, size, file):  # noqa: F811
    output_dir, output = data / f"full-{size}", data / f"full-{size}.txt"
    process = forked.start(limited, arguments(data, output_dir), output, size)
    status, text = forked.ended(process), output.read_text()
    assert status == 2, text
    assert text.count("error: ") == 1 and "Traceback" not in text, text  # behind the progress bar
    line = next(line for line in text.splitlines() if "error: " in line)
    assert "cannot be written: " in line and any(part in line for part in file.split("|")), text
    assert not list(output_dir.rglob(".*.partial"))
    for checkpoint in checkpoints(output_dir):
        check_whole(checkpoint)
    assert finish(data, output_dir) == 0
    assert_same_run(output_dir, unbroken[0])


KINDS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: errno.errorcode[kind])
def test_a_file_that_cannot_be_written_is_named_and_its_old_content_stays(kind, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_whole(path, b"old")

    def fails(descriptor):
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(
        UserError, match=f"{path}: cannot be written: {os.strerror(kind)}. What was there before is whole"
    ):
        files.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_libraries_raise_is_understood_and_mistakes_are_not_hidden(tmp_path):
    with (
        pytest.raises(UserError, match="a: cannot be written: No space left on device. What"),
        files.replacing(tmp_path / "a") as beside,
    ):
        beside.mkdir()
        (beside / "half").write_text("x")
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), files.writing(tmp_path / "a"):
        raise KeyError("a mistake")


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITES = {
    "a row of metrics": lambda d: metrics.MetricsFile(d / "metrics.jsonl"),
    "the report": lambda d: write_report(d, {"title": "t", "command": "c"}),
    "a model": lambda d: save(policy(), tokenizer(), d / "model"),
    "the mark of a demonstration": lambda d: _claim(d / "demo", DemoConfig(), Recipe()),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_writer_names_its_file(name, tmp_path, monkeypatch):
    target = tmp_path / "taken"
    target.mkdir()
    for owner, function in ((os, "fsync"), (files.os, "fsync")):
        monkeypatch.setattr(owner, function, full)
    monkeypatch.setattr("pathlib.Path.touch", full)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(UserError, match=f"{target}.*: cannot be written: No space left on device"):
        WRITES[name](target)


@pytest.mark.parametrize(
    "write, file",
    [
        (lambda trainer, path: trainer.save_model(path / "other"), "other"),
        (lambda trainer, path: trainer.save_model(), "out"),
        (lambda trainer, path: trainer.save_state(), "out/trainer_state.json"),
        (lambda trainer, path: trainer.create_model_card(), "out/README.md"),
        (lambda trainer, path: save_base(trainer.model, path / "base", again=True), "base"),
    ],
)
def test_what_a_python_caller_writes_names_its_file(data, tmp_path, monkeypatch, write, file):  # noqa: F811
    config = DQOConfig(output_dir=str(tmp_path / "out"), method="sft")
    trainer = DQOTrainer(str(data / "model"), config, str(data / "rollouts.jsonl"))
    assert trainer.state.global_step == 0
    for owner in (os, files.os):
        monkeypatch.setattr(owner, "fsync", full)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    monkeypatch.setattr("transformers.TrainerState.save_to_json", full)
    with pytest.raises(UserError, match=f"{tmp_path}/{file}: cannot be written: No space left on device"):
        write(trainer, tmp_path)


def test_a_half_written_row_of_metrics_is_cut_off_when_the_run_goes_on(tmp_path):
    log = metrics.MetricsFile(tmp_path / "m.jsonl")
    log.write({"step": 1})
    position, crc32 = log.position(), log.crc32

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 5

        def write(self, content):
            if not self.left:
                full()
            written = self.file.write(content[: self.left])
            self.left -= written
            return written

    file, log.file = log.file, Full(log.file)
    with pytest.raises(UserError, match="m.jsonl: cannot be written: No space left"):
        log.write({"step": 2})
    file.close()
    metrics.MetricsFile(tmp_path / "m.jsonl", position, crc32).close()
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'


def test_converted_files_are_named_and_do_not_appear(tmp_path, monkeypatch):
    row = {
        "prompt": [{"role": "user", "content": "1"}],
        "completion": [{"role": "assistant", "content": "2"}],
        "label": True,
    }
    (tmp_path / "kto.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr("dqo.files.os.fsync", full)
    with pytest.raises(UserError, match="b.jsonl: cannot be written: No space left"):
        convert("trl-kto", tmp_path / "kto.jsonl", tmp_path / "b.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["kto.jsonl"]


@pytest.mark.parametrize("kind", [*KINDS, errno.EMFILE], ids=lambda kind: errno.errorcode[kind])
def test_what_no_writer_names_is_still_one_line(kind, capsys):
    def command():
        raise OSError(kind, os.strerror(kind), "some/file")

    with pytest.raises(SystemExit) as ended:
        run(command)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: some/file: {os.strerror(kind)}\n"


def test_a_mistake_in_the_program_keeps_its_traceback():
    def command():
        raise FileNotFoundError(errno.ENOENT, "x")

    with pytest.raises(FileNotFoundError):
        run(command)
