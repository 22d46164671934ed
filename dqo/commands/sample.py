"""`dqo sample`: responses of a model to prompts, as rollout rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqo.config.flags import parse_flags
from dqo.config.sampling import SampleConfig
from dqo.requirements import check_packages

if TYPE_CHECKING:  # it imports torch
    from dqo.sampling.run import Sampled

PLACE = 6


def sample_command(arguments: list[str], prog: str = "dqo sample") -> None:
    """Sample responses of a model to prompts, as rollout rows."""
    config: SampleConfig = parse_flags(SampleConfig, arguments, prog)
    check_packages()
    from dqo.sampling.backends import launched_for  # imports torch
    from dqo.sampling.run import sample_rows

    processes = launched_for("dqo sample", config.backend, config.use_cpu)
    found = sample_rows(config, processes=processes)
    processes.leave()
    if processes.main:
        _tell(found, config)
    processes.end()


def _tell(found: Sampled, config: SampleConfig) -> None:
    lines = {
        "rows": f"{found.rows:,} ({found.new:,} of them new) of {found.prompts:,} prompts -> {config.output_file}",
        "tokens": f"{found.tokens:,}, {found.tokens / found.rows:,.1f} a response",
        "not ended": f"{found.not_ended:,} ({found.not_ended / found.rows:.1%})",
    }
    if found.new:
        lines["speed"] = f"{found.tokens_per_second:,.0f} tokens/s"
    for name, text in lines.items():
        print(f"{name:>12}  {text}")
    print(f"Next: dqo score {config.output_file}")
