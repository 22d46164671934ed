"""`dqo compare`: several methods on one file with one budget, and the page over all of them."""

from __future__ import annotations

from dataclasses import dataclass

from dqo.comparison.plan import flags_of
from dqo.comparison.run import compare
from dqo.config.flags import parse_flags

PLACE = 11


@dataclass(frozen=True)
class CompareConfig:
    """Train and evaluate several methods on one file with one budget, and write a page over all runs.

    Every option of `dqo train` may follow: --max_steps is the number of updates of every method's policy, and --METHOD.OPTION
    (such as --dpo.beta 0.7, or --dqo.config dqo.yaml) is of one method alone. Finished runs are kept, and others go on."""

    methods: str
    """The methods to compare, with commas between them, such as dqo,dpo,kto."""
    seeds: int = 3
    """Each method is trained with this many seeds: --seed, --seed + 1, and so on."""
    output_dir: str = "comparison"
    """The directory of the comparison has a directory for each run, and report.html over all of them."""
    dry_run: bool = False
    """The command checks options and data for every method, prints the plan, and stops before anything is trained."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range."""
        found = [] if self.seeds >= 1 else [("seeds", f"must be at least 1, got {self.seeds}")]
        return found if all(self.methods.split(",")) else [*found, ("methods", "names no method between two commas")]


def compare_command(arguments: list[str], prog: str = "dqo compare") -> None:
    """Train several methods on one file with one budget, and write a page over all of them."""
    ours = {"methods", "seeds", "output_dir", "dry_run", "no_dry_run"}
    if {"-h", "--help"} & set(arguments):
        arguments = ["--help"]
    flags = flags_of(arguments)
    own = [word for flag in flags if flag.name in ours or flag.name == "help" for word in flag.words]
    config = parse_flags(CompareConfig, own, prog)
    rest = [word for flag in flags if flag.name not in ours for word in flag.words]
    compare(
        config.methods.split(","),
        seeds=config.seeds,
        output_dir=config.output_dir,
        options=rest,
        stop_before_training=config.dry_run,
    )
