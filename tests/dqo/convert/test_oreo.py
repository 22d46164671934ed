"""OREO's rows."""

import pytest

from dqo.convert.oreo import convert_oreo
from dqo.errors import UserError
from tests.dqo.convert.sources import write


def test_oreo_rows_are_rows(tmp_path):
    rows, _ = convert_oreo(write(tmp_path, {"prompt": "p", "response": "r", "reward": 0.5}))
    assert (rows[0].completion, rows[0].reward) == ("r", 0.5)


def test_rows_of_another_form_are_named_by_their_columns(tmp_path):
    source = write(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match="has the columns prompt, response, reward; found prompt, chosen, rejected"):
        convert_oreo(source)
