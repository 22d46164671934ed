"""`dqo score`: outcome rewards, steps, and their rewards by a model or by measured pass rates of prefixes."""

from __future__ import annotations

from dqo.config.flags import parse_flags
from dqo.scoring.options import ScoreConfig
from dqo.scoring.run import score_rows

PLACE = 7


def score_command(arguments: list[str], prog: str = "dqo score") -> None:
    """Grade stored responses by a verifier, or their steps by a model."""
    config = parse_flags(ScoreConfig, arguments, prog)
    summary = score_rows(config, lambda text: print(text, flush=True))
    print(summary.table(config.output_file, config.verifier))
