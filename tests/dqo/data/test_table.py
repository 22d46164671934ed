"""Rows on tokens in a table: what is read of it is what the rows alone become, in any number of segments and after any kill."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from dqo.credit.steps import step_index
from dqo.data import segments, step_columns, stored, table
from dqo.data.ends import ends_of
from dqo.data.episode import Payment, cut, fingerprint, paid
from dqo.data.episodes import open_episodes, put_columns
from dqo.data.marks import Marks
from dqo.data.rows import read_rows
from dqo.data.selection import EpisodeColumns, Groups, data_fingerprint, selected, selection_fingerprint
from dqo.data.stored import open_rows
from dqo.data.tokens import tokenize_rows
from dqo.errors import UserError
from dqo.models.new import bpe_tokenizer
from dqo.objectives import DAPO, DPO, DQO, KTO
from dqo.reference.cache import Entry
from dqo.reference.columns import key_of
from tests.dqo.helpers import tokenizer

TOKENIZER = tokenizer()
EOS = TOKENIZER.eos_token_id


def mixed_rows(count=14):
    """Steps, potentials, stored ids, several turns and cut responses among each other."""
    kinds = [
        {},
        {"steps": [[0, 6], [6, 8]], "step_rewards": [0.25, -0.5]},
        {"finish_reason": "length"},
        {"turn_spans": [[0, 3], [5, 8]], "turn_rewards": [1.0, 0.5]},
        {"completion_ids": [5, 4, 3, 6, EOS], "prompt_ids": [7, 8], "env_mask": [1, 0, 0, 1, 1]},
    ]
    return [
        {"prompt": f"{i // 3}+2=", "completion": f"{i // 3}+2={i % 2}\n#3", "reward": i % 2 * 1.5, "prompt_value": 0.5}
        | kinds[i % 5]
        for i in range(count)
    ]


@pytest.fixture
def small_segments(monkeypatch):
    for module in (stored, table):
        monkeypatch.setattr(module, "ROWS", 3)
    monkeypatch.setattr(stored, "SHARED_FROM", 0)
    monkeypatch.setattr(segments, "MAPPED", 2)


@pytest.fixture
def file(tmp_path, small_segments):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("\n".join(map(json.dumps, mixed_rows())))
    return path


def opened(path, tok=TOKENIZER, **options):
    settings = {"vocab_size": len(tok), "max_length": 64} | options
    return open_episodes(open_rows(path, root=path.parent / "cache"), tok, **settings)


def same(one, other):
    for f in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, f.name), getattr(other, f.name), f.name)
        assert type(getattr(one, f.name)) is type(getattr(other, f.name)), f.name


COLUMNS = ("prompt", "reward", "label", "truncated", "prompt_length", "length", "tokens", "same_as")
COLUMNS += ("has_logprobs", "has_step_rewards", "potential", "of_reference", "right_length")
PAYMENTS = [
    {},
    {"process_reward": "additive", "process_coef": 0.5, "reward_scale": 2.0},
    {"process_reward": "potential", "gamma": 0.9, "discount": "turns", "truncation": "bootstrap"},
    {"max_length": 9, "allow_truncation": True, "truncation": "bootstrap", "reward_shift": -0.5},
    {"truncation": "drop"},
]


@pytest.mark.parametrize("options", PAYMENTS)
def test_an_episode_of_a_table_is_what_its_row_becomes(options, file):
    rows = read_rows(file)
    pay = Payment(
        options.get("process_reward", "none"),
        options.get("process_coef", 1.0),
        options.get("gamma", 1.0),
        options.get("discount", "tokens"),
        options.get("truncation", "terminal"),
        options.get("reward_scale", 1.0),
        options.get("reward_shift", 0.0),
        Marks.of_rows(rows, options.get("process_reward")),
    )
    longest = options.get("max_length", 64)
    made = tokenize_rows(rows, TOKENIZER, ends_of(TOKENIZER), len(TOKENIZER), longest)
    made = [tokens if tokens.length <= longest else cut(tokens, longest) for tokens in made]
    made = [tokens for tokens in made if not tokens.truncated or pay.truncation != "drop"]
    index = {}
    expected = [paid(t, index.setdefault(tuple(t.prompt), len(index)), pay) for t in made]
    found = opened(file, **options)
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected):
        same(one, other)
    known = {e.source for e in expected[::2]}
    of_table, of_list = (EpisodeColumns(of, lambda: known) for of in (found, expected))
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(of_table, name), getattr(of_list, name), name)
    assert of_list.of_reference.any() and of_list.has_step_rewards.any() and not np.isnan(of_list.potential).any()
    stepped = np.array([bool(e.step_ends) for e in expected])
    np.testing.assert_array_equal(step_columns.step_counts(found) > 0, stepped)
    wanted = [step_index(e.step_ends, e.action_count) for e in expected if e.step_ends]
    np.testing.assert_array_equal(step_columns.steps(found.take(stepped)), np.concatenate(wanted))
    assert list(of_table.source) == [e.source for e in expected]
    np.testing.assert_array_equal(found.totals(), [e.rewards.sum() for e in expected])
    np.testing.assert_array_equal(found.terminated, [e.terminated for e in expected])
    for objective in (DQO(), KTO(), DPO()):
        own = [dataclasses.replace(e) for e in expected]  # which companions are set on
        groups, lists = selected(objective, opened(file, **options)), selected(objective, own)
        assert isinstance(groups, Groups) and len(groups) == len(lists)
        assert data_fingerprint(groups) == fingerprint(itertools.chain(*lists)) == data_fingerprint(lists)
        assert selection_fingerprint(groups) == selection_fingerprint(lists)
        for mine, theirs in zip(groups, lists):
            for one, other in zip(mine, theirs, strict=True):
                assert (one.companion is None) == (other.companion is None)
                if one.companion is not None:
                    same(one.companion, dataclasses.replace(other.companion, companion=None))


@pytest.mark.parametrize("wrong", [-1.0, 0.0])
def test_which_tokens_are_right_is_read_without_making_an_episode(wrong, file):
    rows = [{name: value for name, value in row.items() if name != "prompt_value"} for row in mixed_rows()]
    labels = iter([[1.0, wrong], [wrong, 1.0], [1.0, 1.0]])
    rows = [row | {"step_rewards": next(labels)} if "steps" in row else row for row in rows]
    for row in rows:
        if "turn_spans" in row:  # of right responses and of wrong ones
            row["turn_rewards"] = [1.0, -1.0]  # a penalty of a turn marks no step
    file.write_text("\n".join(map(json.dumps, rows)))
    for length in (64, 12, 9):
        found = opened(file, max_length=length, allow_truncation=True)
        expected = np.array([e.right_length for e in found])
        np.testing.assert_array_equal(EpisodeColumns(found).right_length, expected)
        np.testing.assert_array_equal(EpisodeColumns(list(found)).right_length, expected)
        some = np.array([7, 1, 6, 3])  # rows apart from their order
        np.testing.assert_array_equal(EpisodeColumns(found.take(some)).right_length, expected[some])
        assert sum(e.wrong_from is not None for e in found) == 2 and len(set(expected.tolist())) > 2


def test_columns_companions_and_the_reference_are_on_what_is_read_and_on_parts_of_it(file):
    found = opened(file)
    groups = selected(KTO(), found)
    assert groups.distinct() is found
    found.add_columns({"each": np.arange(len(found)), "tokens": np.arange(EpisodeColumns(found).length.sum())})
    wanted = [found[4], found[4].companion, found[9]]
    entries = {key_of(e): Entry(*np.random.default_rng(0).random((2, e.action_count), np.float32)) for e in wanted}
    found.set_said(entries, key_of)
    found.set_said({key_of(e): entries[key_of(e)] for e in wanted[:2]}, key_of, "other_logprobs")
    part = found.take(np.array([9, 4]))
    for e, i in ((part[1], 4), (part[0], 9), (groups[4][0], 4)):
        ends = EpisodeColumns(found).length.cumsum()
        np.testing.assert_array_equal(e.columns["each"], np.full(e.action_count, i))
        np.testing.assert_array_equal(e.columns["tokens"], np.arange(ends[i] - e.action_count, ends[i]))
        np.testing.assert_array_equal(e.ref_logprobs, entries[key_of(e)].logprobs)
        assert e.companion.completion_ids == found[i].companion.completion_ids
    np.testing.assert_array_equal(part[1].companion.ref_lse, entries[key_of(wanted[1])].lse)
    assert found[0].ref_logprobs is None
    np.testing.assert_array_equal(part[1].columns["other_logprobs"], entries[key_of(wanted[0])].logprobs)
    assert "other_logprobs" not in found[0].columns and not part[1].companion.columns  # an objective reads no such


def test_what_is_added_to_the_distinct_episodes_is_on_those_of_the_groups(file):
    """Pairs leave some responses out, and share others."""
    groups = selected(DPO(), opened(file))
    distinct = groups.distinct()
    assert len(distinct) < len(opened(file)) and distinct is groups.distinct()
    put_columns(distinct, {"tokens": np.arange(EpisodeColumns(distinct).length.sum())})
    for pair, indices in zip(groups, groups.rows):
        for e, i in zip(pair, indices):
            np.testing.assert_array_equal(e.columns["tokens"], distinct[int(i)].columns["tokens"])
    some = groups.take(np.array([1])).distinct()
    assert [e.source for e in some] == [e.source for e in groups[1]]
    np.testing.assert_array_equal(some[0].columns["tokens"], groups[1][0].columns["tokens"])


def test_stored_log_probabilities_and_missing_steps_are_known_without_reading_episodes(file):
    rows = [
        {"prompt": f"{i}+2=", "completion_ids": [5, 6, EOS], "prompt_ids": [7, 8], "completion": "23", "reward": 1.0}
        | {"logprobs": [-0.5, -1.0, -0.25]}
        for i in range(5)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    columns = EpisodeColumns(opened(file))
    assert columns.has_logprobs.tolist() == [True] * 5
    assert np.isnan(columns.potential).all() and not columns.has_step_rewards.any()
    with pytest.raises(UserError, match=r"0 of 5 responses have steps \(the first without: rollouts.jsonl:1\)"):
        selected(DAPO(), opened(file))


def test_a_preparation_that_was_killed_goes_on_and_another_run_reads_what_is_there(file, monkeypatch):
    chunks, tokenize = [], table.tokenize_chunk

    def killed(rows, *arguments):
        if len(chunks) == 2:
            raise KeyboardInterrupt
        chunks.append(len(rows))
        return tokenize(rows, *arguments)

    monkeypatch.setattr(table, "tokenize_chunk", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(file)
    monkeypatch.setattr(table, "tokenize_chunk", lambda rows, *more: chunks.append(len(rows)) or tokenize(rows, *more))
    found = opened(file)
    assert chunks == [3, 3, 3, 3, 2]
    again = opened(file, process_reward="additive", truncation="bootstrap")  # no ids depend on what is paid
    assert chunks == [3, 3, 3, 3, 2]
    assert [e.completion_ids for e in again] == [e.completion_ids for e in found]


def test_another_tokenizer_vocabulary_or_end_has_another_table(file):
    other = bpe_tokenizer([row["completion"] for row in mixed_rows(4)], 40)
    tables = [
        opened(file).table,
        opened(file, vocab_size=10**6).table,
        opened(file, vocab_size=10**5, stop_ids=[10**5 - 1]).table,
    ]
    rows = [row for row in mixed_rows() if "completion_ids" not in row]
    file.write_text("\n".join(map(json.dumps, rows)))
    tables += [opened(file).table, opened(file, other).table]
    assert len({t.segments.directory for t in tables}) == 5
    assert opened(file).table.segments.directory == tables[3].segments.directory
    other.split_special_tokens = True
    assert opened(file, other).table.segments.directory != tables[4].segments.directory


def test_rows_that_cannot_be_placed_are_named_as_without_a_table(file, caplog):
    rows = mixed_rows()
    for i in (1, 7):
        rows[i] = {"prompt": "1", "completion": "2", "reward": 1.0, "prompt_ids": [3], "completion_ids": [99 + i, EOS]}
    rows[5]["prompt"] = "1+2" * 30
    file.write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):
        with pytest.raises(UserError) as expected:
            tokenize_rows(read_rows(file), TOKENIZER, ends_of(TOKENIZER), len(TOKENIZER), 64)
        with pytest.raises(UserError) as caught:
            opened(file)
        assert str(caught.value) == str(expected.value)
        assert "3 of 14 rows do not fit" in str(caught.value)
    caplog.clear()
    assert len(opened(file, skip_bad_rows=True)) == 11
    assert "They are dropped; 11 rows are left" in caplog.text
    left = open_rows(file, root=file.parent / "cache").take(np.array([0, 2, 3]))
    assert (
        len(open_episodes(left, TOKENIZER, vocab_size=len(TOKENIZER), max_length=64)) == 3
    )  # the others are not asked
