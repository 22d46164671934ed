"""Lines as the graders and the checks of rows see them."""

from hypothesis import given
from hypothesis import strategies as st

from dqo.grading.gsm8k import calculator_steps
from dqo.grading.text import line_spans


@given(st.text(alphabet="ab\n\r\x0b\u2028<>=1", max_size=30))
def test_spans_cover_the_text_without_overlap_and_end_at_newlines_only(text):
    spans = line_spans(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert [text[start:end].count("\n") for start, end in spans[:-1]] == [1] * len(spans[:-1])
    assert all(start < end for start, end in spans)
    assert [(step.start, step.end) for step in calculator_steps(text)] == spans
