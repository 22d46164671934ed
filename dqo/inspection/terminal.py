"""An inspection as text: with colours for a terminal, or plain.

A row is a step: its number, ✗ at the first wrong one and ▾ at the lowest, its number in the chosen view, the implied value before
it and the value model's, and its tokens. The prompt and what the environment wrote are dim (plain: the latter in ⟦ ⟧). Plain text
has {-0.31} behind each token that would be coloured clearly. Control characters of data are written out, ↵ is a line end.
"""

from __future__ import annotations

from dqo.errors import printable
from dqo.inspection.responses import Inspection, Response
from dqo.inspection.views import LEVELS, VIEWS, levels, number_text, step_numbers

_PROMPT = 400  # characters of a prompt's end
_CLEARLY = 2  # the level from which plain text tells a token's number
_DIM, _BOLD, _OFF = "\x1b[2m", "\x1b[1m", "\x1b[0m"
_RED, _GREEN = "\x1b[31;1m", "\x1b[32;1m"
# xterm's 256 colours, from pale to full, under black letters
_BLUE, _ORANGE, _VIOLET = (195, 153, 117, 75, 39), (230, 223, 216, 209, 202), (225, 219, 213, 177, 171)


def text_of(inspection: Inspection, by: str, colour: bool) -> str:
    """The whole inspection. `by`: one of its views."""
    view, scale = VIEWS[by], inspection.scales[by]
    head = f"{printable(inspection.directory)}: method {inspection.method}, beta {inspection.beta:g}"
    head += f"; tokens by {view.title}, {view.formula}, full colour at {scale:.3g}"
    parts = [f"{head}\n{_legend(by)}" if colour else head, *(printable(note) for note in inspection.notes)]
    parts += [_response(response, by, scale, colour) for response in inspection.responses]
    return "\n\n".join([*parts, *summary_of(inspection)])


def summary_of(inspection: Inspection) -> list[str]:
    """A sentence on all responses with a wrong step; [] without any."""
    hits, count, chance = inspection.found
    if not count:
        return []
    return [
        f"The step with the lowest sum is the first wrong one in {hits} of the {count} responses shown that have a wrong step; "
        f"chance would find {chance:.1f}."
    ]


def verdict_of(response: Response) -> str:
    """What the step with the lowest advantage is; "" without steps."""
    low, wrong = response.lowest_step, response.first_wrong_step
    if low is None:
        return ""
    sums = response.step_sums
    lowest = f"the lowest step is {low + 1} ({number_text('advantage', sums[low])})"
    if wrong is None:
        return lowest + (
            ", and no step reward calls one wrong" if response.labelled else "; which one is wrong is not known"
        )
    if low == wrong:
        return f"{lowest}, the first wrong one"
    return f"{lowest}; the first wrong one is {wrong + 1} ({number_text('advantage', sums[wrong])})"


def implied_text(response: Response) -> str:
    """Where the implied value begins, and what remains of it."""
    if response.implied is None:
        return "with a discount of 0 no value is implied"
    start, count = response.start, response.start.responses
    origin = {
        "other responses to the prompt": f"the mean of {count} other response{'s' * (count != 1)} to the prompt",
        "value model": "the value model's, for there is no other response to the prompt",
        "other prompts": f"the mean of {count} responses to other prompts, for there is no other to this one",
        "itself": "its own soft return, for there is no other response: nothing can remain",
    }[start.origin]
    text = f"the implied value begins at {start.value:.3f}, {origin}"
    if not response.terminated:
        return f"{text}; at the end, where the response was cut, it is {number_text('advantage', response.implied.remainder)}"
    return f"{text}; {number_text('advantage', response.implied.remainder)} remains at the end, where 0 is expected"


def _response(response: Response, by: str, scale: float, colour: bool) -> str:
    def paint(text: str, style: str) -> str:
        return f"{style}{text}{_OFF}" if colour and text else text

    verdict = paint("right", _GREEN) if response.label else paint("wrong", _RED)
    title = paint(printable(response.source), _BOLD)
    total = number_text("advantage", response.scores["advantage"].sum())
    count = len(response.actions)
    lines = [f"{title}: {verdict}, reward {response.reward:g}, {count:,} tokens, advantage {total} in all"]
    prompt = printable(response.prompt)
    cut = "... " if len(prompt) > _PROMPT else ""
    lines += [paint(f"{cut}{prompt[-_PROMPT:]}", _DIM)]
    texts = _painted(response, by, scale, colour)
    if not response.step_ends:
        lines.append("".join(texts))
    else:
        lines += _steps(response, by, texts)
    said = "; ".join(filter(None, (verdict_of(response), implied_text(response))))
    return "\n".join([*lines, f"{said[0].upper()}{said[1:]}."])


def _steps(response: Response, by: str, texts: list[str]) -> list[str]:
    numbers = step_numbers(VIEWS[by], response.scores[by], response.step_ends)
    begins = [0, *(end + 1 for end in response.step_ends)]
    tracks = [] if response.implied is None else [("implied", response.implied.values)]
    tracks += [("critic", response.scores["value"])] if "value" in response.scores else []
    lines = [f"{'step':>6}{'sum' if VIEWS[by].summed else 'mean':>9}" + "".join(f"{name:>9}" for name, _ in tracks)]
    owner = response.step_of_text
    for step, number in enumerate(numbers):
        mark = ("✗" * (step == response.first_wrong_step) + "▾" * (step == response.lowest_step)).ljust(2)
        at = min(begins[step], len(response.actions) - 1)
        before = "".join(f"{values[at]:>9.3f}" for _, values in tracks)
        own = "".join(text for text, its in zip(texts, owner) if its == step).removesuffix("\n")
        lead = f"{step + 1:>4}{mark}{number_text(by, number):>9}{before}  "
        lines.append(lead + own.replace("\n", f"\n{' ' * len(lead)}"))
    return lines


def _painted(response: Response, by: str, scale: float, colour: bool) -> list[str]:
    """(L,) the text of each token, coloured or annotated."""
    values = response.scores[by]
    degrees = levels(values, scale)
    found = []
    index = response.action_of_text
    for place, (text, action) in enumerate(zip(response.texts, index)):
        shown = printable(text)
        if action is None:
            first = place == 0 or index[place - 1] is not None
            last = index[place + 1] is not None  # the last token of all is an action
            shown = shown if colour else f"{'⟦' * first}{shown}{'⟧' * last}"
            style, note = _DIM, ""
        else:
            style = _style(by, int(degrees[action]))
            note = "" if abs(degrees[action]) < _CLEARLY else f"{{{values[action]:+.2f}}}"
        shown = shown.replace("\n", "↵\n")
        if not colour:
            body, end = (shown[:-1], "\n") if shown.endswith("\n") else (shown, "")
            found.append(f"{body}{note}{end}")
        else:  # line by line, so that a pager or a cut line leaves no colour behind
            found.append("\n".join(f"{style}{line}{_OFF}" if line and style else line for line in shown.split("\n")))
    return found


def _style(by: str, level: int) -> str:
    if level == 0:
        return ""
    ramp = _VIOLET if by == "kl" else _BLUE if level > 0 else _ORANGE
    return f"\x1b[30;48;5;{ramp[abs(level) - 1]}m"


def _legend(by: str) -> str:
    degrees = range(LEVELS + 1) if by == "kl" else range(-LEVELS, LEVELS + 1)
    return "".join(
        f"{_style(by, degree)} {'0' if not degree else '+' if degree > 0 else '-'} {_OFF}" for degree in degrees
    )
