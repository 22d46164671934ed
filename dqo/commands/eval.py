"""`dqo eval`: a model answers problems; evaluations are tested against each other."""

from __future__ import annotations

import json
from pathlib import Path

from dqo.config.flags import parse_flags
from dqo.evaluation.compare import compare, comparison_text
from dqo.evaluation.options import EvalConfig
from dqo.evaluation.results import read_evaluation
from dqo.evaluation.summary import table
from dqo.files import write_whole, writing

PLACE = 5


def eval_command(arguments: list[str], prog: str = "dqo eval") -> None:
    """Answer problems with a model, grade the answers, and test evaluations against each other."""
    config = parse_flags(EvalConfig, arguments, prog)
    if config.compare:
        found = compare([read_evaluation(directory) for directory in config.compare])
        print(comparison_text(found))
        if config.output_dir is not None:
            path = Path(config.output_dir)
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
            write_whole(path / "compare.json", json.dumps(found, indent=1, ensure_ascii=False).encode())
        return
    from dqo.evaluation.evaluate import evaluate  # torch from here on

    print(table(*evaluate(config)))
