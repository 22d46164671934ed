"""`dqo env`: what a report of a bug must say of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from dqo.config.flags import parse_flags
from dqo.environment import env

PLACE = 13


@dataclass(frozen=True)
class EnvConfig:
    """Print versions, devices, kernels that work here, caches and variables, a line each, to copy into a report of a bug."""

    def problems(self) -> list[tuple[str, str]]:
        """There are no options."""
        return []


def env_command(arguments: list[str], prog: str = "dqo env") -> None:
    """Print versions, devices and kernels that work here, to copy into a report of a bug."""
    parse_flags(EnvConfig, arguments, prog)
    for name, value in env().items():
        print(f"{name}: {value}")
