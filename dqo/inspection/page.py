"""An inspection as one self-contained page, which needs no script: radio buttons choose the view."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dqo.errors import printable
from dqo.inspection.responses import Inspection, Response
from dqo.inspection.terminal import implied_text, summary_of, verdict_of
from dqo.inspection.views import LEVELS, VIEWS, levels, number_text, step_numbers
from dqo.report.schema import ValueTrace
from dqo.report.traces import limits_of, trace_plot

_TEMPLATES = Path(__file__).parent / "templates"
_WIDE = 400  # CSS pixels: what a narrow screen shows without shrinking its letters


def rendered(inspection: Inspection) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader

    import dqo.report

    folders = [_TEMPLATES, Path(dqo.report.__path__[0]) / "templates"]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"number": _number}
    traces = [_trace(response) for response in inspection.responses]
    limits = limits_of(traces)
    return environment.get_template("inspect.html.j2").render(
        inspection=inspection,
        views={name: VIEWS[name] for name in inspection.scales},
        levels=LEVELS,
        summary=summary_of(inspection),
        responses=[
            _shown(response, inspection.scales) | {"svg": trace_plot(trace, limits, _WIDE) if trace["tokens"] else ""}
            for response, trace in zip(inspection.responses, traces)
        ],
    )


def _trace(response: Response) -> ValueTrace:
    implied = response.implied
    return {
        "prompt": response.prompt,
        "tokens": [printable(response.texts[place]) for place in response.actions],
        "values": [float(v) for v in response.scores.get("value", ())],
        "reward": float(response.rewards[-1]),
        "label": response.label,
        "step_ends": [end + 1 for end in response.step_ends],
        "first_wrong_step": response.first_wrong_step,
        "implied": [] if implied is None else [float(v) for v in implied.values],
    }


def _shown(response: Response, scales: dict[str, float]) -> dict[str, Any]:
    """What the template reads of one response."""
    degrees = {name: levels(response.scores[name], scale) for name, scale in scales.items()}
    tokens = []
    for text, action in zip(response.texts, response.action_of_text):
        token: dict[str, Any] = {"text": printable(text).replace("\n", "↵\n"), "action": action}
        if action is not None:
            token["classes"] = " ".join(
                f"{name}-{'p' if values[action] > 0 else 'm'}{abs(values[action])}"
                for name, values in degrees.items()
                if values[action]
            )
            token["numbers"] = {name: float(values[action]) for name, values in response.scores.items()}
            if response.implied is not None:
                token["numbers"]["implied"] = float(response.implied.values[action])
        tokens.append(token)
    numbers = {name: step_numbers(VIEWS[name], response.scores[name], response.step_ends) for name in scales}
    owner = response.step_of_text
    steps = [
        {
            "number": step + 1,
            "wrong": step == response.first_wrong_step,
            "lowest": step == response.lowest_step,
            "numbers": {name: float(numbers[name][step]) for name in scales},
            "tokens": _without_end([token for token, its in zip(tokens, owner) if its == step]),
        }
        for step in range(len(response.step_ends))
    ]
    said = "; ".join(filter(None, (verdict_of(response), implied_text(response))))
    return {
        "response": response,
        "tokens": tokens,
        "steps": steps,
        "said": re.sub(r"-(?=\d)", "−", f"{said[0].upper()}{said[1:]}."),
        "total": float(response.scores["advantage"].sum()),
        "has_values": "value" in response.scores,
        "env": any(token["action"] is None for token in tokens),
    }


def _without_end(tokens: list[dict]) -> list[dict]:
    """The last line end of a step makes no empty line on the page."""
    if not tokens:
        return tokens
    return [*tokens[:-1], tokens[-1] | {"text": tokens[-1]["text"].removesuffix("\n")}]


def _number(number: float, name: str = "") -> str:
    return number_text(name, number).replace("-", "−")
