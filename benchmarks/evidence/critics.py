"""Which critic earns its cost: critics alone, then what each does to the policy, then lambda and importance level for the winner.

    dqo demo --output_dir dqo-demo && python -m benchmarks.evidence.critics out/critics --demonstration dqo-demo

Every run is a directory in OUT with its result.json. The same command goes on after a kill, and makes again what its options have
changed for; in a second terminal it takes other runs. The table is printed, by --table alone from what is there, and goes to
OUT/critics.json; what was recorded from another OUT stands beside it, with its own date and commit. --record writes it to
benchmarks/results/critics.json as well.

    screen   critics alone, the policy as it is, on one tuning seed of the demonstration's task
    policy   128 updates of the policy with each critic, on three tasks and three seeds
    lambda   the winner on the demonstration's task, by lambda and importance level
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evidence import pieces
from benchmarks.evidence.critic_runs import DEMONSTRATION, TASKS, make_task, write_json
from benchmarks.evidence.critic_table import STAGES, read, summarise, tables, with_earlier
from benchmarks.evidence.objective_options import COMMON
from dqo.errors import UserError

RESULTS = Path(__file__).parents[1] / "results" / "critics.json"
DQO = COMMON | {"method": "dqo", "beta": 0.2, "critic_learning_rate": 1e-3, "lam": 1.0, "is_level": "trajectory"}
DQO |= {"save_steps": 10_000}  # a run that is killed begins anew
POLICY_UPDATES = 128
TUNING_SEED, SEEDS = 100, (0, 1, 2)
LOOKS = (64, 128, 256)  # updates after which a critic that is trained alone is looked at, beside the last
EPOCH = 64  # updates of 256 responses, of the demonstration's 16,384

# The critics, as options of `dqo train`. {screen} and {policy} are the directories of the stages' runs.
SEPARATE: dict[str, Any] = {"value_model": "separate"}
HEAD: dict[str, Any] = {"value_model": "head"}
FORMS: dict[str, dict[str, Any]] = {  # of a separate critic
    "ref_logprob": {"value_input": "ref_logprob"},
    "bce": {"value_loss": "bce"},
    "hl_gauss": {"value_loss": "hl_gauss"},
    "mean_return": {"value_init": "mean_return"},
    "cosine": {"critic_lr_scheduler_type": "cosine"},
    "bce-ref_logprob": {"value_loss": "bce", "value_input": "ref_logprob"},
}
# The mean return of the data, everywhere and for ever: a control that knows nothing
CONSTANT = HEAD | {"value_init": "mean_return", "critic_learning_rate": 1e-12}
IMPLICIT: dict[str, Any] = {"value_model": "implicit", "critic_learning_rate": 3e-4}
# {name: (options, updates)}; the learning rate is constant: what is found after 64, 128 ... updates is what shorter runs find
SCREEN: dict[str, tuple[dict[str, Any], int]] = {
    "separate-1e-3": (SEPARATE, 8 * EPOCH),
    "head-1e-3": (HEAD, 4 * EPOCH),
    "head-3e-3": (HEAD | {"critic_learning_rate": 3e-3}, 4 * EPOCH),
    "implicit-3e-4": (IMPLICIT, 2 * EPOCH),
    "separate-3e-3": (SEPARATE | {"critic_learning_rate": 3e-3}, 4 * EPOCH),
    "separate-3e-4": (SEPARATE | {"critic_learning_rate": 3e-4}, 8 * EPOCH),
    "implicit-1e-4": (IMPLICIT | {"critic_learning_rate": 1e-4}, 2 * EPOCH),
}
SCREEN |= {
    f"{name}-{rate}": (SEPARATE | form | {"critic_learning_rate": float(rate)}, 2 * EPOCH)
    for rate in ("1e-3", "3e-3")
    for name, form in FORMS.items()
}
DEFAULT = "separate"
# {name: options}; those of value_warmup_steps come before the policy's updates
POLICY: dict[str, dict[str, Any]] = {
    DEFAULT: SEPARATE | {"value_warmup_steps": EPOCH},
    "separate-cold": SEPARATE,
    "head": HEAD,
    "head-warm": HEAD | {"value_warmup_steps": EPOCH},
    "none": {"value_model": "none"},
    "constant": CONSTANT,
    "constant-warm": CONSTANT
    | {"value_warmup_steps": EPOCH},  # nothing is learned in the warm-up; the data come in its order
    "implicit": IMPLICIT | {"value_warmup_steps": EPOCH},
    "head-mean_return": HEAD | {"value_init": "mean_return"},
    "mean_return": SEPARATE | FORMS["mean_return"] | {"value_warmup_steps": EPOCH},
    "ref_logprob": SEPARATE | FORMS["ref_logprob"] | {"value_warmup_steps": EPOCH},
    "bce": SEPARATE | FORMS["bce"] | {"value_warmup_steps": EPOCH},
    "hl_gauss": SEPARATE | FORMS["hl_gauss"] | {"value_warmup_steps": EPOCH},
}
# What earlier runs leave, on the demonstration's task alone: a critic of the screen, and the policy of a run of the same seed
FROZEN: dict[str, dict[str, Any]] = {
    "implicit-frozen": {"value_model": "{screen}/6-10/implicit-3e-4/seed-100/run", "freeze_value_model": True},
    "implied": {"value_model": "implied:{policy}/6-10/separate/seed-{seed}/run"},
}
WINNER = "head-warm"
LAMBDA = {
    f"lam-{lam}-{level}": POLICY[WINNER] | {"lam": lam, "is_level": level}
    for level in ("trajectory", "suffix", "none")
    for lam in (0.9, 0.95, 1.0)
}


@dataclass(frozen=True)
class TaskFiles:
    """Base model and data of a task."""

    name: str
    is_run = False

    @property
    def place(self) -> str:
        return f"tasks/{self.name}"

    def needs(self) -> list[TaskFiles]:
        return []


@dataclass(frozen=True)
class Planned:
    stage: str
    task: str
    variant: str
    seed: int
    options: dict[str, Any] = field(compare=False)
    evaluate_at: tuple[int, ...] = field(compare=False)  # updates after which the critic is looked at, beside the last
    is_run = True

    @property
    def place(self) -> str:
        """The run's directory in OUT."""
        return f"{self.stage}/{self.task}/{self.variant}/seed-{self.seed}"

    def needs(self) -> list[TaskFiles]:
        return [TaskFiles(self.task)]


def planned(stage: str) -> list[Planned]:
    """The stage's runs, the most telling first."""
    if stage == "screen":
        return [
            Planned(stage, DEMONSTRATION, name, TUNING_SEED, _critic_alone(*screened), LOOKS)
            for name, screened in SCREEN.items()
        ]
    if stage == "policy":
        return [
            Planned(stage, task, name, seed, _with_policy(options), ())
            for task in TASKS
            for seed in SEEDS
            for name, options in (POLICY | (FROZEN if task == DEMONSTRATION else {})).items()
        ]
    return [
        Planned(stage, DEMONSTRATION, name, seed, _with_policy(options), ())
        for seed in SEEDS
        for name, options in LAMBDA.items()
    ]


def _critic_alone(options: dict[str, Any], updates: int) -> dict[str, Any]:
    return options | {"max_steps": updates, "value_warmup_steps": updates}


def _with_policy(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"max_steps": POLICY_UPDATES + options.get("value_warmup_steps", 0)}


def spec_of(run: Planned, output: Path) -> dict[str, Any]:
    """What the run's process reads."""
    task = output / "tasks" / run.task
    known = {"screen": output / "screen", "policy": output / "policy", "seed": run.seed}
    own = {k: v.format(**known) if isinstance(v, str) else v for k, v in run.options.items()}
    files = {"model_name_or_path": "base", "dataset_name": "rollouts.jsonl", "eval_dataset_name": "held_out.jsonl"}
    places = {name: str(task / file) for name, file in (files | {"ref_cache_dir": "ref_cache"}).items()}
    return {
        "task": str(task),
        "options": DQO | own | places | {"seed": run.seed},
        "evaluate_at": list(run.evaluate_at),
        "answers": run.stage != "screen",
    }


def result_of(piece: Planned | TaskFiles, output: Path) -> dict[str, Any] | None:
    """What is told of the task, or the run's result, if it was made with these options."""
    if isinstance(piece, Planned):
        return pieces.stored(output / piece.place, lambda: spec_of(piece, output))
    path = output / piece.place / "task.json"
    return json.loads(path.read_text()) if path.exists() else None


def make(piece: Planned | TaskFiles, output: Path, demonstration: Path) -> None:
    """A run has a process of its own, and begins anew."""
    directory = output / piece.place
    if isinstance(piece, TaskFiles):
        return make_task(piece.name, demonstration, directory)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_json(directory / "spec.json", spec_of(piece, output))
    with open(directory / "log.txt", "w") as log:
        command = [sys.executable, "-m", "benchmarks.evidence.critic_runs", str(directory)]
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise UserError(f"the run failed, see {directory}/log.txt")


@pieces.command
def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--demonstration", type=Path, default=Path("dqo-demo"), help="a finished one")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=list(SCREEN | POLICY | FROZEN | LAMBDA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[TUNING_SEED, *SEEDS])
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results too")
    arguments = parser.parse_args(given)
    every = [run for stage in STAGES for run in planned(stage)]
    wanted = [
        run
        for run in every
        if run.stage in arguments.stage
        and run.task in arguments.tasks
        and run.seed in arguments.seeds
        and (arguments.variants is None or run.variant in arguments.variants)
    ]
    output = arguments.output.resolve()
    work = functools.partial(make, demonstration=arguments.demonstration)
    left = 0 if arguments.table else pieces.go_on(wanted, output, float("inf"), result_of, work)
    results = [(run, found) for run in every if (found := result_of(run, output)) is not None]
    earlier = read(RESULTS)
    if results:
        tasks = [found for name in TASKS if (found := result_of(TaskFiles(name), output)) is not None]
        summary = with_earlier(summarise(results, tasks, DEFAULT, DQO), earlier, every, DQO)
        for path in (output / "critics.json", *([RESULTS] if arguments.record else [])):
            path.write_text(json.dumps(summary, indent=1) + "\n")
        print(tables(summary))
    elif arguments.table and earlier:
        print(f"No run is in {output}; this is what was recorded.\n\n{tables(with_earlier(earlier, None, every, DQO))}")
    else:
        print(f"No run is in {output}; nothing is written.")
    if left:
        sys.exit(f"{left} runs are left; those that failed are told above")


if __name__ == "__main__":
    main()
