"""`dqo zpg`: training by preferences between samples of two perturbed policies."""

from __future__ import annotations

from dqo.config.flags import parse_flags
from dqo.requirements import check_packages
from dqo.zpg.options import ZPGConfig

PLACE = 14


def zpg_command(arguments: list[str], prog: str = "dqo zpg") -> None:
    """Train a policy by which of two perturbed copies answers better, without gradients."""
    config: ZPGConfig = parse_flags(ZPGConfig, arguments, prog)
    check_packages()
    from dqo.zpg.run import trained  # torch from here on

    found = trained(config)
    print(
        f"{found.steps:,} steps, {found.samples:,} samples, {found.queries:,} queries, {found.seconds:,.0f} s -> "
        f"{found.output_dir}"
    )
    print(
        f"Next: dqo eval --model_name_or_path {found.output_dir} --tasks TEST --verifier {config.verifier} --output_dir DIR"
    )
