"""Places where a reference pass keeps its numbers."""

import pytest

from dqo.reference import columns as reference
from dqo.reference.cache import ReferenceCache
from tests.dqo.reference.passes import IDENTITY


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "cache", IDENTITY, "model")


@pytest.fixture
def flush_every_batch(monkeypatch):
    monkeypatch.setattr(reference, "FLUSH_TOKENS", 1)
