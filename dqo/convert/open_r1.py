"""open-r1's data: problems with generations, and a list of verdicts for each grader."""

from __future__ import annotations

from pathlib import Path

from dqo.convert.source import Converted, each, list_of, prompt_of, source_records, text_of
from dqo.data.forms import shown
from dqo.data.rows import Row
from dqo.errors import UserError


def convert_open_r1(source: str | Path) -> Converted:
    """problem, generations[], and a list of verdicts for each grader: correctness_math_verify, correctness_llama ...

    One row a generation; right when any grader says so (the second grader is there for answers that the first cannot read).
    finish_reasons, and else is_reasoning_complete, say which generations were cut.
    """
    _, records = source_records(source)
    rows = []
    for record in records:
        problem, generations = text_of(record, "problem"), list_of(record, "generations")
        graders = [k for k, v in record.values.items() if k.startswith("correctness_") and isinstance(v, list)]
        if not graders:
            raise UserError(
                f"{record.source}: has no verdicts; expected a list such as correctness_math_verify, one for each generation; "
                f"found {', '.join(record.values)}"
            )
        columns = {k: each(record, k, len(generations)) for k in (*graders, "finish_reasons", "is_reasoning_complete")}
        for i, generation in enumerate(generations):
            if not isinstance(generation, str) or not generation.strip():
                raise UserError(f"{record.source}: generations[{i}] is {shown(generation)}; expected a string")
            verdicts = [columns[grader][i] for grader in graders]
            if not all(verdict in (True, False, None) for verdict in verdicts):
                raise UserError(f"{record.source}: {graders[0]}[{i}] is {shown(verdicts[0])}; expected true or false")
            right = any(verdicts)
            cut = columns["finish_reasons"][i] == "length"
            if columns["finish_reasons"][i] is None:
                cut = columns["is_reasoning_complete"][i] is False
            rows.append(
                Row(
                    prompt=prompt_of(problem),
                    completion=generation,
                    reward=float(right),
                    label=right,
                    finish_reason="length" if cut else "stop",
                    answer=record.values["answer"] if isinstance(record.values.get("answer"), str) else None,
                    prompt_id=record.values["uuid"] if isinstance(record.values.get("uuid"), str) else None,
                    source=f"{record.source}, generation {i + 1}",
                )
            )
    return Converted(rows, {})


FORMATS = {"open-r1": convert_open_r1}
