"""`dqo eval`: a model answers problems; evaluations are tested against each other."""

from __future__ import annotations

from dqo.config.flags import parse_flags
from dqo.evaluation.compare import compared, comparison_text
from dqo.evaluation.options import EvalConfig
from dqo.evaluation.summary import table
from dqo.requirements import check_packages

PLACE = 8


def eval_command(arguments: list[str], prog: str = "dqo eval") -> None:
    """Answer problems with a model, grade the answers, and test evaluations against each other."""
    config: EvalConfig = parse_flags(EvalConfig, arguments, prog)
    check_packages()
    if config.compare:
        print(comparison_text(compared(config)))
        return
    from dqo.evaluation.evaluate import evaluated  # torch from here on

    print(table(*evaluated(config)))
