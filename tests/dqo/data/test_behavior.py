import re

import pytest

from dqo.data.behavior import ReferenceName, known_behavior, reference_samples, weight_level, weights_line
from dqo.data.rows import Row

REFERENCE = ReferenceName("models/base", lambda: "sha256:1")
SAMPLED = {
    "model": "elsewhere/base",
    "model_hash": "sha256:1",
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "key": ["a", 0],
}


def rows(*samplings, logprobs=None):
    return [
        Row("1+1=", "2", 1.0, True, sampling=s, logprobs=logprobs, source=f"r:{i}") for i, s in enumerate(samplings, 1)
    ]


@pytest.mark.parametrize("sampling", [None, SAMPLED, SAMPLED | {"temperature": 0.7}, {"model": "other"}], ids=str)
def test_stored_logprobs_are_the_behaviours_whoever_sampled(sampling):
    found = known_behavior(rows(sampling, sampling, logprobs=[-0.5]), REFERENCE)
    assert found.known and "every row has the logprobs" in found.why


@pytest.mark.parametrize(
    "change",
    [{}, {"temperature": 1}, {"top_p": None}, {"top_k": -1}, {"model_hash": "sha256:1", "model": "x"}],
    ids=str,
)
def test_samples_of_the_reference_at_temperature_1_are_known(change):
    assert known_behavior(rows(SAMPLED, SAMPLED | change), REFERENCE).known


def test_samples_of_the_reference_are_found_among_others_and_its_files_are_read_once():
    asked = []

    def identity():
        asked.append(True)
        return "sha256:1"

    told = rows(SAMPLED, None, SAMPLED | {"temperature": 0.7}, SAMPLED | {"model_hash": "sha256:2"}, SAMPLED)
    assert reference_samples(told, ReferenceName("models/base", identity)) == {"r:1", "r:5"} and len(asked) == 1


def test_a_model_is_known_by_its_name_where_no_hash_is_given():
    assert known_behavior(rows({"model": "models/base", "temperature": 1.0}), REFERENCE).known
    by_hash = {"model": "models/base", "model_hash": "sha256:2", "temperature": 1.0}  # the files have changed since
    assert not known_behavior(rows(by_hash), REFERENCE).known
    assert not known_behavior(
        rows({"model": "models/base", "temperature": 1.0}), ReferenceName(None, lambda: None)
    ).known


@pytest.mark.parametrize(
    "other, said",
    [
        (
            None,
            "nothing tells which policy wrote r:2; where it was the reference at temperature 1, give --is_level traj",
        ),
        ({"temperature": 1.0}, "nothing tells which policy wrote r:2"),
        (
            SAMPLED | {"model_hash": "sha256:2"},
            "sampling of r:2 names another model than the reference, elsewhere/base",
        ),
        (SAMPLED | {"temperature": 0.7}, "r:2 has temperature 0.7, which is not the distribution .*`dqo sample`"),
        (SAMPLED | {"temperature": 0.0}, "r:2 has temperature 0.0"),
        (SAMPLED | {"top_p": 0.9, "top_k": 20}, "r:2 has top_p 0.9, top_k 20"),
        (SAMPLED | {"prefix_tokens": 3}, "r:2 has prefix_tokens 3"),
        ({"model": "models/base"}, "r:2 has temperature unknown"),
    ],
    ids=str,
)
def test_one_row_of_another_or_an_unknown_sampler_makes_all_of_them_unknown(other, said):
    found = known_behavior(rows(SAMPLED, other), REFERENCE)
    assert not found.known
    assert re.search(said, found.why), found.why


def test_the_files_of_the_reference_are_read_only_where_a_row_has_a_hash():
    def never():
        raise AssertionError

    known_behavior(rows(SAMPLED, logprobs=[-0.5]), ReferenceName("m", never))
    known_behavior(rows({"model": "m", "temperature": 1.0}), ReferenceName("m", never))
    read = []
    known_behavior(rows(*[SAMPLED] * 5), ReferenceName("m", lambda: read.append(1) or "sha256:1"))
    assert read == [1]


def test_an_explicit_level_wins_and_says_what_it_assumes():
    known, unknown = known_behavior(rows(SAMPLED), REFERENCE), known_behavior(rows(None), REFERENCE)
    assert [weight_level("auto", k) for k in (known, unknown)] == ["trajectory", "none"]
    assert [weight_level("suffix", k) for k in (known, unknown)] == ["suffix", "suffix"]
    assert weights_line("auto", "none", unknown).startswith(
        "importance weights: none (is_level auto), because no row has"
    )
    assert "takes every row for a sample of the reference" in weights_line("suffix", "suffix", unknown)
    assert "give --is_level" in weights_line("auto", "none", unknown)
    assert "give --is_level" not in weights_line("suffix", "suffix", unknown)  # it is given
    assert "takes every row" not in weights_line("suffix", "suffix", known)
    assert weights_line("none", "none", known) == "importance weights: none (is_level none)"
