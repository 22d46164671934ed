"""Several data sets in one option, with weights or without, and names that have commas and colons of their own."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.data.named import Named, named_sources, shown
from dqo.errors import UserError
from tests.dqo.row_cases import says


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.parquet", "c,d.jsonl", "e:0.5", "f,0.5", "a.jsonl:0.9", "C:x.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "g").mkdir()
    os.symlink("a.jsonl", tmp_path / "link.jsonl")
    os.link("b.parquet", tmp_path / "hard.parquet")


GOOD = {
    # one name is what it was, whatever stands in it
    "a.jsonl": [("a.jsonl", None)],
    "org/name@v1:main:train": [("org/name@v1:main:train", None)],
    "org/name:2024": [("org/name:2024", None)],
    "missing.jsonl": [("missing.jsonl", None)],
    "missing.jsonl:0.5": [("missing.jsonl:0.5", None)],
    "c,d.jsonl": [("c,d.jsonl", None)],
    "e:0.5": [("e:0.5", None)],
    "f,0.5": [("f,0.5", None)],
    "a.jsonl:0.9": [("a.jsonl:0.9", None)],
    # several
    "a.jsonl,b.parquet": [("a.jsonl", None), ("b.parquet", None)],
    "a.jsonl:0.7, b.parquet:0.3": [("a.jsonl", 0.7), ("b.parquet", 0.3)],
    "c,d.jsonl:0.25,g:.25,a.jsonl:5e-1": [("c,d.jsonl", 0.25), ("g", 0.25), ("a.jsonl", 0.5)],
    "e:0.5:0.5,b.parquet:0.5": [("e:0.5", 0.5), ("b.parquet", 0.5)],
    "e:0.5,f,0.5,a.jsonl:0.9": [("e:0.5", None), ("f,0.5", None), ("a.jsonl:0.9", None)],
    "C:x.jsonl:0.5,C:\\y.jsonl:0.5": [("C:x.jsonl", 0.5), ("C:\\y.jsonl", 0.5)],
    "C:x.jsonl,C:\\y.jsonl": [("C:x.jsonl", None), ("C:\\y.jsonl", None)],
    "org/name@v1:main:train:0.5,org/name:test:0.5": [("org/name@v1:main:train", 0.5), ("org/name:test", 0.5)],
    "org/name:main:train,a.jsonl": [("org/name:main:train", None), ("a.jsonl", None)],
}


@pytest.mark.parametrize("text", GOOD)
def test_names_and_weights_are_told_apart(text, here):
    assert named_sources(text) == [Named(*pair) for pair in GOOD[text]]


BAD = {
    "a.jsonl:0.5,": "has an empty name",
    ",a.jsonl": "has an empty name",
    "a.jsonl,,b.parquet": "has an empty name",
    ":0.5,a.jsonl:0.5": "has an empty name",
    "a.jsonl:0,b.parquet:1": "the weight of a.jsonl is 0; expected a share above 0",
    "a.jsonl:1.5,b.parquet:-0.5": "the weight of b.parquet is -0.5; expected",
    "a.jsonl:nan,b.parquet:0.5": "the weight of a.jsonl is nan; expected",
    "a.jsonl:0.5,b.parquet:inf": "the weight of b.parquet is inf; expected",
    "a.jsonl:70%,b.parquet:30%": "the weight of a.jsonl is 70%; expected",
    "a.jsonl:,b.parquet:0.5": "the weight of a.jsonl is empty; expected",
    "a.jsonl:0,7,b.parquet:0,3": "the weight of a.jsonl is 0; expected",
    "a.jsonl:0.7,b.parquet": "a.jsonl has a weight, and b.parquet has none; give all of them one, or none",
    "b.parquet,org/n:train:0.5": "org/n:train has a weight, and b.parquet has none",
    "a.jsonl:7,b.parquet:3": "the weights sum to 10; shares of a run sum to 1, such as a.jsonl:0.7,b.parquet:0.3",
    "a.jsonl:0.5,b.parquet:0.3": "the weights sum to 0.8; shares of a run sum to 1, such as a.jsonl:0.625,b.parquet:0.375",
    "a.jsonl:0.5,a.jsonl:0.5": "a.jsonl is named twice; name it once, with all its weight",
    "a.jsonl,./a.jsonl": "./a.jsonl is named twice, as a.jsonl too",
    "a.jsonl:0.5,link.jsonl:0.5": "link.jsonl is named twice, as a.jsonl too",
    "b.parquet,a.jsonl,hard.parquet": "hard.parquet is named twice, as b.parquet too",
    "org/n:train:0.5,org/n:train:0.5": "org/n:train is named twice",
    "b.parquet:0.5": "weights are of several data sets, such as b.parquet:0.7,OTHER:0.3; of one give the name alone: b.parquet",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_list_of_shares_is_refused_in_a_line(text, here):
    with pytest.raises(UserError) as error:
        named_sources(text)
    says(str(error.value), f"{text}: ", BAD[text])
    assert "\n" not in str(error.value)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.integers(2, 6))
def test_rounded_shares_are_divided_by_their_sum(numbers, digits):
    weights = [round(number / sum(numbers), digits) for number in numbers]
    if min(weights) == 0 or abs(sum(weights) - 1) > 0.01:
        return
    found = named_sources(",".join(f"no{i}.jsonl:{weight}" for i, weight in enumerate(weights)))
    assert sum(named.weight for named in found) == pytest.approx(1, abs=1e-12)
    assert [named.weight for named in found] == pytest.approx(weights, abs=0.011)


def test_titles_name_data_sets_without_their_directories(here):
    assert shown("x/a.jsonl:0.7,org/name:0.3") == "a.jsonl:0.7, name:0.3"
    assert shown("x/a.jsonl") == "a.jsonl" and shown("a:0,b:1") == "a:0,b:1"
