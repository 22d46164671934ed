"""`dqo score`: outcome rewards, steps, and their rewards by a model or by measured pass rates of prefixes."""

from __future__ import annotations

from dqo.config.flags import parse_flags
from dqo.scoring.options import ScoreConfig
from dqo.scoring.run import launched_by, score_rows

PLACE = 7


def score_command(arguments: list[str], prog: str = "dqo score") -> None:
    """Grade stored responses by a verifier, or their steps by a model."""
    config = parse_flags(ScoreConfig, arguments, prog)
    processes = launched_by(config)
    summary = score_rows(config, lambda text: print(text, flush=True), processes)
    if processes is not None:
        processes.leave()
    if summary is not None:
        print(summary.table(config.output_file, config.verifier))
    if processes is not None:
        processes.end()
