"""Figures are drawn for every test and rendered where a test looks at them: rendering takes more than half of a tiny run."""

from dqo.report import svg

LOOKED_AT = {"credit", "demo", "inspection", "report"}  # folders of tests
_rendered = svg.rendered


def render(wanted: bool) -> None:
    """Whether matplotlib renders figures in this process from now on; without it they are empty."""
    svg.rendered = _rendered if wanted else lambda figure: "<svg></svg>"
