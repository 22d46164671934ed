"""Matplotlib figures as inline SVG with the colours and fonts of the page.

A figure is drawn with the light palette below; on the way out every colour of the palette becomes a reference to the page's
variable of that role, so that one SVG is legible in light and in dark.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from zlib import crc32

INK, MUTED, GRID = "#3d4248", "#6b7178", "#d3d6da"
GOOD, BAD = "#00805d", "#c84b00"
# After Okabe and Ito, whose hues stay apart in the common forms of colour blindness, darkened where a line on
# white needs it. The first is for the headline method, the second, grey, for the baseline.
SERIES = ("#0072b2", "#7a7a7a", "#c47a00", "#009e74", "#b3588f", "#3399d1", "#8a6d3b", "#5b5ea6")
ROLES = {INK: "ink-2", MUTED: "muted", GRID: "grid", GOOD: "good", BAD: "bad"} | {
    color: f"series-{i}" for i, color in enumerate(SERIES)
}
LINES = ("-", "-", "--", ":", "--", ":", "--", ":")  # so that colour is never the only difference
DOTS = (0, (2, 3))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dqo",
    "text.parse_math": False,  # tokens and names may contain dollar signs
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "text.color": INK,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
STYLE |= dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID)
STYLE |= dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED)
STYLE |= dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 11)


@dataclass(frozen=True)
class Series:
    """What a method looks like in every plot."""

    index: int

    @property
    def color(self) -> str:
        return SERIES[self.index % len(SERIES)]

    @property
    def line(self) -> str:
        return LINES[self.index % len(LINES)]

    @property
    def variable(self) -> str:
        return f"var(--series-{self.index % len(SERIES)})"

    @property
    def border(self) -> str:
        return {"-": "solid", "--": "dashed", ":": "dotted"}[self.line]


def assign_series(names: Sequence[str], headline: str | None, baseline: str | None) -> dict[str, Series]:
    """The headline method is always blue and the baseline always grey, whatever the others are."""
    others = [name for name in names if name not in (headline, baseline)]
    order = {headline: 0, baseline: 1} | {name: 2 + i for i, name in enumerate(others)}
    return {name: Series(order[name]) for name in names}


def inline_svg(draw: Callable, size: tuple[int, int], label: str) -> str:
    """`size` is in CSS pixels: a point of the figure is a pixel of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        draw(figure)
        found = rendered(figure)
    return _for_the_page(found, label)


def rendered(figure: Any) -> str:
    """matplotlib's SVG."""
    from io import StringIO

    buffer = StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return buffer.getvalue()


def _for_the_page(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    # Its style element would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    # Ids of one page must differ: matplotlib starts anew with every figure.
    prefix = f"p{crc32(svg.encode()):x}-"

    def adapt(tag: re.Match) -> str:
        markup = re.sub(r'^<g id="[^"]*"', "<g", tag.group())
        markup = re.sub(r'\b(id="|url\(#|href="#)', rf"\1{prefix}", markup)
        markup = re.sub(r' transform="rotate\(-0 [^"]*"', "", markup)
        markup = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number.group()):.2f}", markup)
        for color, role in ROLES.items():
            markup = markup.replace(color, f"var(--{role}, {color})")
        # The page's fonts instead of matplotlib's list of them.
        markup = re.sub(r"'DejaVu Sans Mono'[^;\"]*", "var(--mono)", markup)
        return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", markup)

    # Tags only: the text between them belongs to the user.
    svg = re.sub(r"<[^>]+>", adapt, svg)
    svg = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
