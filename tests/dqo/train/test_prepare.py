"""The reference's columns of a run: from which model, from which cache, checked when."""

import dataclasses
import datetime
import json
import tracemalloc

import numpy as np
import pytest

from dqo.commands.check import CheckConfig, check
from dqo.config.options import load_options
from dqo.data import segments, stored, table
from dqo.data.batches import collate, epoch_order
from dqo.data.rows import read_rows
from dqo.data.together import split_by_prompt
from dqo.errors import UserError
from dqo.models.new import save
from dqo.models.policy import policy_stats
from dqo.processes import Processes
from dqo.reference.cache import _name_of
from dqo.train.checkpoint import STATE_FILE
from dqo.train.inputs import ROW_CACHE, Given, check_options, load_rows
from dqo.train.machines import check_same
from dqo.train.prepare import prepare
from dqo.train.run import begin, train
from tests.dqo.helpers import policy, rollout_rows, tokenizer


@pytest.fixture
def files(tmp_path):
    save(policy(), tokenizer(), tmp_path / "model")
    save(policy(seed=1), tokenizer(), tmp_path / "other")
    (tmp_path / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollout_rows())))
    return tmp_path


def options_of(files, **changes):
    settings = {
        "dataset_name": files / "rollouts.jsonl",
        "model_name_or_path": files / "model",
        "output_dir": files / "out",
        "per_device_train_batch_size": 8,
        "max_steps": 4,  # an epoch
    } | changes
    return load_options([part for name, value in settings.items() for part in (f"--{name}", str(value))])


def prepared(files, **changes):
    options = options_of(files, **changes)
    check_options(options)
    return prepare(options, Given(), *load_rows(options), Processes())


@pytest.fixture
def forwards(monkeypatch):
    """How many responses are computed or checked."""
    from dqo.train import run_models as module

    calls = []
    monkeypatch.setattr(
        module, "policy_stats", lambda *arguments: calls.append(len(arguments[1].episodes)) or policy_stats(*arguments)
    )
    return calls


def test_the_cache_lies_in_the_output_directory_or_where_it_is_asked_for(files, forwards):
    prepared(files)
    assert list((files / "out" / "ref_cache").glob("*/segment-*"))
    before = sum(forwards)
    prepared(files, output_dir=files / "out2", ref_cache_dir=files / "shared")
    assert not (files / "out2" / "ref_cache").exists() and list((files / "shared").glob("*/segment-*"))
    computed = sum(forwards) - before
    prepared(files, output_dir=files / "out3", ref_cache_dir=files / "shared", method="dpo")
    checked = sum(forwards) - before - computed
    assert 0 < checked < computed  # the agreement check alone


def test_a_model_directory_that_was_overwritten_reuses_nothing(files):
    shared = {"ref_cache_dir": files / "shared"}
    first = prepared(files, **shared).episodes()
    for path in (files / "model").iterdir():
        path.unlink()
    (files / "model").rmdir()
    save(policy(seed=1), tokenizer(), files / "model")
    second = prepared(files, output_dir=files / "out2", **shared).episodes()
    assert len(list((files / "shared").iterdir())) == 2
    assert not any(np.array_equal(a.ref_lse, b.ref_lse) for a, b in zip(first, second))


def test_stale_values_in_the_cache_are_stopped_with_the_cure(files):
    from safetensors.numpy import load_file, save_file

    prepared(files)
    (path,) = (files / "out" / "ref_cache").glob("*/segment-*")
    save_file(load_file(path) | {"logprobs": load_file(path)["logprobs"] - 1}, path)
    path.rename(path.parent / _name_of(path.read_bytes()))  # whole, and of another model
    with pytest.raises(UserError, match=f"stale values in the cache: delete {path.parent}"):
        prepared(files)


def test_another_reference_is_used_and_not_compared_with_the_policy(files):
    finished = train(options_of(files, ref_model_name_or_path=files / "other", eval_fraction=0.3))
    other = policy(seed=1)
    for e in finished.prepared.episodes()[:5]:
        assert np.allclose(e.ref_logprobs, policy_stats(other, collate([e], 0)).logprobs.detach(), atol=1e-5)
    rows = [json.loads(line) for line in (files / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_kl"] > 1e-6  # at step 0 the policy is not its reference
    meta = json.loads(next((files / "out" / "ref_cache").glob("*/meta.json")).read_text())
    assert meta["model"] == str(files / "other")
    train(options_of(files, ref_model_name_or_path=files / "other", eval_fraction=0.3))
    train(options_of(files, eval_fraction=0.3))  # the checkpoint says which
    with pytest.raises(UserError, match="option ref_model_name_or_path: .*other' then, .*model' now"):
        train(options_of(files, ref_model_name_or_path=files / "model", eval_fraction=0.3))
    save(policy(seed=2), tokenizer(), files / "third")
    (files / "third" / "model.safetensors").replace(files / "other" / "model.safetensors")
    with pytest.raises(UserError, match="reference: .* then, .* now"):
        train(options_of(files, ref_model_name_or_path=files / "other", eval_fraction=0.3))


def test_a_reference_of_another_vocabulary_is_refused(files):
    from dqo.models.new import bpe_tokenizer, new_llama

    words = bpe_tokenizer(["one two three", "1+2=3"], 300)
    save(new_llama(words, hidden_size=16, layers=1, heads=2), words, files / "words")
    with pytest.raises(UserError, match=r"the reference model .*words has a vocabulary of \d+, the policy of \d+"):
        prepared(files, ref_model_name_or_path=files / "words")


def test_a_method_without_reference_refuses_one(files):
    with pytest.raises(UserError, match="method sft has no reference policy; remove --ref_model_name_or_path"):
        prepared(files, method="sft", ref_model_name_or_path=files / "other")
    prepared(files, method="sft")
    assert not (files / "out" / "ref_cache").exists()


def test_a_continued_run_is_not_compared_again(files, forwards):
    train(options_of(files))
    before = sum(forwards)
    train(options_of(files))
    assert sum(forwards) == before


def test_held_out_rows_too_few_for_the_method_are_left_out_with_a_warning(files, caplog):
    one_prompt = rollout_rows(prompts=1, seed=9)
    (files / "held_out.jsonl").write_text("\n".join(map(json.dumps, one_prompt)))
    found = prepared(files, method="kto", eval_dataset_name=files / "held_out.jsonl")
    assert found.held_out == [] and "are not evaluated: kto needs responses of at least two prompts" in caplog.text


def at(monkeypatch, day):
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, day)

    monkeypatch.setattr("datetime.datetime", Day)


def test_a_run_whose_template_writes_the_date_goes_on_the_next_day_with_the_same_ids(files, monkeypatch):
    tok = tokenizer()
    tok.chat_template = "{{ strftime_now('%d') }}+{% for m in messages %}{{ m.content }}{% endfor %}"
    save(policy(), tok, files / "chat")
    chats = [
        row
        | {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {"completion": [{"role": "assistant", "content": row["completion"]}]}
        for row in rollout_rows()
    ]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, chats)))
    at(monkeypatch, 5)
    options = {"model_name_or_path": files / "chat"}
    train(options_of(files, **options))
    at(monkeypatch, 6)
    found = prepared(files, **options)
    assert found.resumed is not None
    assert all(tok.decode(e.prompt_ids).startswith("05+") for e in found.episodes())
    assert tok.decode(prepared(files, output_dir=files / "new", **options).episodes()[0].prompt_ids).startswith("06+")

    path = found.resumed / STATE_FILE  # of a run that kept no time
    state = json.loads(path.read_text())
    state["identity"].pop("time that the chat template was told")
    del state["files"], state["crc32"]  # nor checksums
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="time that the chat template was told: None then, 2026-01-06"):
        prepared(files, **options)


def test_the_models_end_tokens_and_skipped_rows_reach_training(files, caplog):
    tok, model = tokenizer(), policy()
    tok.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if n %}{{ raise_exception('no') }}{% endif %}"
    )
    model.generation_config.eos_token_id, model.generation_config._from_model_config = [7], False
    save(model, tok, files / "chat")
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "completion_ids": [3 + i % 3, 5, 7],
            "finish_reason": "stop",
            "reward": row["reward"],
        }
        for i, row in enumerate(rollout_rows())
    ]
    rows[4]["chat_template_kwargs"] = {"n": 1}
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"model_name_or_path": files / "chat"}
    with pytest.raises(UserError, match="^rollouts.jsonl:5: the chat template refuses the messages: no$"):
        prepared(files, **options)
    options = options_of(files, **options)
    options = dataclasses.replace(options, train=dataclasses.replace(options.train, skip_bad_rows=True))
    episodes = prepare(options, Given(), *load_rows(options), Processes()).episodes()
    assert {e.completion_ids[-1] for e in episodes} == {7} and len(episodes) == len(rows) - 1
    assert "They are dropped; 31 rows are left" in caplog.text


def test_a_run_that_ends_within_its_first_epoch_asks_the_reference_of_the_rows_that_it_reads_alone(files, forwards):
    found = prepared(files, max_steps=2, eval_fraction=0)
    read = epoch_order(len(found.groups), 0, 42)[:16].tolist()
    known = {i for i, (e,) in enumerate(found.groups) if e.ref_logprobs is not None}
    assert set(read) <= known and len(known) < len(found.groups) == 32
    longer = prepared(files, max_steps=4, eval_fraction=0, output_dir=files / "longer")
    assert all(e.ref_logprobs is not None for e in longer.episodes())
    staged = {
        "method": "curry_dpo",
        "stages": 2,
        "per_device_train_batch_size": 1,
    }  # whose phases have orders of their own
    staged = prepared(files, max_steps=2, eval_fraction=0, output_dir=files / "staged", **staged)
    assert len(staged.groups) > 2 and all(e.ref_logprobs is not None for e in staged.episodes())


def test_a_run_on_rows_that_lie_in_tables_on_the_disk_is_the_run_on_rows_in_memory(files, monkeypatch):
    def result(name, **changes):
        train(options_of(files, output_dir=files / name, max_steps=6, logging_steps=1, eval_fraction=0.2, **changes))
        rows = [json.loads(line) for line in (files / name / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((files / name / "run.json").read_text())["data"]
        timed = ("perf/", "memory")
        return record, [{k: v for k, v in row.items() if not any(part in k for part in timed)} for row in rows]

    expected = result("memory")
    assert not (files / "memory" / ROW_CACHE).exists()
    for module in (stored, table):
        monkeypatch.setattr(module, "ROWS", 5)
    monkeypatch.setattr(stored, "SHARED_FROM", 0)
    monkeypatch.setattr(segments, "MAPPED", 2)
    killed = files / "disk" / ROW_CACHE  # a preparation that was killed leaves no more
    killed.mkdir(parents=True)
    assert result("disk") == expected
    assert {path.name.partition("-")[0] for path in killed.iterdir()} == {"rows", "tokens"}
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*.safetensors")}
    assert result("shared", row_cache_dir=killed) == expected
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("*.safetensors")} == before


def test_processes_that_found_other_data_or_models_are_refused(monkeypatch):
    mine = {"data": "a", "model": "b", "options": {"beta": 0.1}}
    for name, cure in (
        ("data", "dataset_name must be one file"),
        ("model", "model_name_or_path must be one directory"),
    ):
        other = mine | {name: "c", "options": {"beta": 0.2}}  # options are compared before
        told = lambda items, _, other=other: [*items, *items, {n: json.dumps(v) for n, v in other.items()}]  # noqa: E731
        monkeypatch.setattr("dqo.train.machines.gather_objects", told)
        with pytest.raises(UserError, match=f"^process 2 does not have the {name} of process 0: {cure}"):
            check_same(mine, Processes(world=3))
    monkeypatch.setattr("dqo.train.machines.gather_objects", lambda items, _: items * 3)
    check_same(mine, Processes(world=3))


def test_held_out_rows_have_the_marks_of_the_whole_file(files):
    rows = [{"prompt": f"{i}+2=", "completions": ["1", "2"], "labels": [1, 0]} for i in range(12)]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = prepared(files, process_reward="none", eval_fraction=0.3)
    assert {e.first_wrong_step for (e,) in [*found.held_out, *found.groups]} == {1}
    trained = {e.source for (e,) in found.groups}
    at = next(i for i in range(12) if f"rollouts.jsonl:{i + 1}" in trained)
    rows[at] |= {"labels": [1, -1]}  # of a row that is trained on: 0 is neutral in this file
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = prepared(files, process_reward="none", eval_fraction=0.3, output_dir=files / "again")
    assert found.held_out and {e.first_wrong_step for (e,) in found.held_out} == {None}


def test_the_importance_weights_are_chosen_by_the_whole_file_as_the_check_says(files, capsys):
    path, name = files / "rollouts.jsonl", str(files / "model")
    sampling = {"model": name, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "prefix_tokens": 0}
    rows = [row | {"sampling": sampling} for row in rollout_rows()]
    path.write_text("\n".join(map(json.dumps, rows)))

    def levels(**changes):
        prepared_level = prepared(files, eval_fraction=0.3, max_steps=1, **changes).objective.weight_level
        capsys.readouterr()
        check(CheckConfig(data=(str(path),), model_name_or_path=name, method="dqo", rows=0))
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("importance weights")]
        return prepared_level, line.split()[2]

    assert levels() == ("trajectory", "trajectory")
    _, held_out = split_by_prompt(read_rows(path), 0.3, 42)
    del rows[int(held_out[0].source.rpartition(":")[2]) - 1]["sampling"]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert levels(output_dir=files / "again") == ("none", "none")


def test_a_row_takes_less_than_fifty_bytes_of_each_process(files, monkeypatch):
    """Beside the mapped tables: what arrays of numpy hold when the first step is chosen."""
    monkeypatch.setattr(stored, "SHARED_FROM", 0)

    def held(count: int) -> int:
        rows = [row | {"completion": f"{row['completion']}{i}"} for i, row in enumerate(rollout_rows(count // 4))]
        (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = options_of(files, output_dir=files / f"out-{count}", eval_fraction=0)
        tracemalloc.start()
        try:
            trainer = begin(options)
            assert len(trainer.stages.groups(0, 0)) == 8 and len(trainer.prepared.groups) == count
            of_numpy = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
            traces = tracemalloc.take_snapshot().filter_traces([of_numpy]).traces
        finally:
            tracemalloc.stop()
        return sum(trace.size for trace in traces)

    few, many = 200, 2200
    assert 8 < (held(many) - held(few)) / (many - few) < 50
