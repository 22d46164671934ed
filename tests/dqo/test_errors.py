import logging

from hypothesis import given
from hypothesis import strategies as st

from dqo.commands.base import _Formatter
from dqo.data.rows import read_rows
from dqo.errors import UserError, printable
from dqo.report.page import write_report
from tests.dqo.row_cases import refusal

ESCAPE = "\x1b]0;owned\x07\x9b2J\r"


def obeyed(text: str) -> set[str]:
    """Characters that a terminal would obey."""
    return {c for c in text if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0}


@given(st.text(), st.text(st.characters(max_codepoint=0xA0)))
def test_what_is_printable_has_no_control_characters_and_is_else_the_same(text, low):
    assert not obeyed(printable(text + low))
    plain = "".join(c for c in text if c.isprintable() or c in "\n\t")
    assert printable(plain) == plain
    assert str(UserError(text)) == printable(text)


def test_rows_that_are_quoted_in_messages_are_written_out(caplog):
    for row in (
        {"prompt": "1", "completion": "2", "reward": ESCAPE},
        {"prompt": "1", "completion": "2", "reward": 1.0, "label": {ESCAPE: ESCAPE}},
        {"prompt": [{ESCAPE: 1}], "completion": "2", "reward": 1.0},
        {ESCAPE: "1"},
    ):
        message = refusal([row])
        assert "\\x9b2J" in message and not obeyed(message)
    read_rows([{"prompt": "1", "completion": "2", "reward": 1.0, ESCAPE: 3}])
    assert "\\x9b2J" in caplog.text and not obeyed(caplog.text)
    record = logging.LogRecord("dqo", logging.WARNING, "", 0, "%s", (ESCAPE,), None)
    assert not obeyed(_Formatter("%(message)s").format(record))


def test_a_reports_samples_are_written_out(tmp_path):
    trace = {"prompt": ESCAPE, "tokens": [ESCAPE, "a"], "values": [0.1, 0.2], "reward": 1.0, "step_ends": [2]}
    write_report(tmp_path, {"title": ESCAPE, "command": ESCAPE, "value_traces": [trace | {"first_wrong_step": None}]})
    for name in ("report.html", "report.md", "report.json"):
        text = (tmp_path / name).read_text()
        assert "x9b2J" in text and not obeyed(text)
