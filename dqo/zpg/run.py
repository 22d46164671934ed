"""`dqo zpg`: a policy is updated along random directions, by which of two perturbed policies answers better; see estimate.py.

checkpoint-20/    as dqo/train/checkpoint.py writes it, without an optimizer; the state has the counts of questions and samples
metrics.jsonl     a row a step
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from dqo import signals
from dqo.config.values import checked_config
from dqo.data.ends import ends_of
from dqo.errors import UserError
from dqo.evaluation.accuracy import Answered, graded
from dqo.evaluation.results import problems_hash
from dqo.evaluation.run import problems_of
from dqo.evaluation.tasks import read_tasks, task_ids
from dqo.files import is_aside, writing
from dqo.grading.pool import VerifierPool
from dqo.grading.verifiers import source_of
from dqo.models.generate import Request, Sampling, generate, in_order
from dqo.models.identity import check_holds_model, model_identity
from dqo.models.lora import add_adapter, lora_config
from dqo.models.named import load_config, load_tokenizer, stop_ids
from dqo.models.policy import load_policy
from dqo.processes import ALONE
from dqo.train.checkpoint import load_models, publish_models, save_base, save_checkpoint
from dqo.train.damage import checkpoints, loading, newest_whole, put_away, read_state
from dqo.train.learner import Learner
from dqo.train.metrics import MetricsFile
from dqo.zpg.estimate import direction, ends, gradient, preferences, value_difference
from dqo.zpg.options import ZPGConfig

_KEPT = 2  # checkpoints
_NEW = {"step": 0, "queries": 0, "samples": 0, "num_tokens": 0, "train_seconds": 0.0, "metrics_position": 0}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has used up at its end. `queries`: answers to "which is better?"; `samples`: responses."""

    steps: int
    queries: int
    samples: int
    seconds: float
    output_dir: str


def zpg(quiet: bool = False, **options: Any) -> Trained:
    """Trains a policy by preferences between its own samples, as `dqo zpg` does: zpg(model_name_or_path="DIR",
    tasks="problems.jsonl", verifier="number", output_dir="out"). A call that was killed goes on where it was.

    Args:
        quiet: without a progress bar.
        options: those of `dqo.zpg.options.ZPGConfig`.

    Raises:
        UserError: for options, problems, a model or a directory that do not fit, before anything is sampled.
    """
    return trained(checked_config(ZPGConfig, options), quiet)


def trained(config: ZPGConfig, quiet: bool = False) -> Trained:
    """Makes the steps that `config.output_dir`, whose values were checked, does not have yet, and writes the model.

    Raises:
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, when the step is over and a checkpoint is written.
    """
    run = _Run(config, quiet)
    with VerifierPool(str(config.verifier), timeout=config.verifier_timeout) as pool, signals.waiting():
        bar = tqdm(total=config.max_steps, initial=run.counters["step"], desc="zpg", unit="step", disable=quiet)
        while run.counters["step"] < config.max_steps:
            row = run.step(pool)
            bar.update(1)
            bar.set_postfix_str(f"mean reward {row['reward/mean']:.3f}, {row['queries']:,} queries")
            ended, number = run.counters["step"] == config.max_steps, signals.noted()
            if ended or number or run.counters["step"] % config.save_steps == 0:
                run.save()
            if number and not ended:
                raise signals.interruption(number)
        bar.close()
    publish_models(run.directory, run.learner, run.tokenizer, ALONE)
    told = run.counters
    return Trained(told["step"], told["queries"], told["samples"], told["train_seconds"], str(run.directory))


class _Run:
    """Policy, problems and counters of a run, new or as its last checkpoint left them."""

    def __init__(self, config: ZPGConfig, quiet: bool):
        assert config.tasks and config.verifier and config.output_dir and config.model_name_or_path  # or it is refused
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("dqo zpg runs in one process; start it without a launcher")
        self.config, self.quiet, self.directory = config, quiet, Path(config.output_dir)
        path = config.model_name_or_path
        check_holds_model(path)
        tasks = read_tasks(config.tasks, config.verifier)
        model_config, self.tokenizer = load_config(path), load_tokenizer(path)
        task_ids(tasks, self.tokenizer, model_config, config.max_completion_length)
        self.problems = problems_of(tasks, self.tokenizer)
        self.identity = {
            "options": config.binding() | {"verifier_source": source_of(config.verifier)},
            "model": model_identity(path, model_config),
            "problems": problems_hash(tasks),
        }
        resumed = self._claimed()
        device = "cpu" if config.use_cpu or not torch.cuda.is_available() else "cuda"
        self.policy = load_policy(path, device)
        self.learner = Learner(self.policy)
        self.parameters = _trained_parameters(self.policy, config, self.directory)
        self.stops = ends_of(self.tokenizer, stop_ids(self.policy)).stops
        self.counters: dict[str, Any] = dict(_NEW)
        if resumed is not None:
            with loading(resumed):
                self.counters = read_state(resumed)["counters"]
                load_models(resumed, self.learner)
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        position, crc32 = self.counters["metrics_position"], self.counters.get("metrics_crc32")
        self.metrics = MetricsFile(self.directory / "metrics.jsonl", position, crc32)

    def _claimed(self) -> Path | None:
        """The checkpoint to go on from.

        Raises:
            UserError: where the directory holds something else, or a run under other options.
        """
        chosen, damaged = newest_whole(checkpoints(self.directory))
        if damaged and chosen is None:
            raise UserError(f"{next(iter(damaged.values()))}, and no other is whole; choose another --output_dir")
        if chosen is None:
            there = {p.name for p in self.directory.glob("*") if not is_aside(p)} if self.directory.is_dir() else set()
            there -= {"metrics.jsonl", "base_model"}  # what a run leaves that was killed before its first checkpoint
            if there:
                raise UserError(
                    f"{self.directory} holds {min(there)} and no checkpoint of dqo zpg; choose another --output_dir"
                )
            return None
        then, now = read_state(chosen)["identity"], _plain(self.identity)
        changed = [
            f"{name} {old!r} then, {new!r} now"
            for key in now
            for name, old, new in _pairs(key, then.get(key), now[key])
            if old != new
        ]
        if changed:
            raise UserError(
                f"{chosen} belongs to another run: {'; '.join(changed)}. Repeat its options, or choose another --output_dir"
            )
        for path in damaged:
            put_away(path)
        return chosen

    def step(self, pool: VerifierPool) -> dict[str, Any]:
        """One update; its row of metrics.jsonl."""
        config, counters, begun = self.config, self.counters, time.perf_counter()
        theta = _flat(self.parameters)
        total, found = np.zeros_like(theta), []
        for k in range(config.num_directions):
            rng = np.random.default_rng([config.seed, counters["step"], k])
            v = direction(len(theta), rng)
            chosen = rng.choice(len(self.problems), config.num_pairs, replace=config.num_pairs > len(self.problems))
            sides = []
            for place in ends(theta, v, config.mu, config.difference == "central"):
                _put(self.parameters, place)
                sides.append(self._answers(chosen.tolist(), k, pool))
            differs = np.array([one.response.ids != other.response.ids for one, other in zip(*sides)])
            first, second = (np.array([answered.grade.score for answered in side]) for side in sides)
            shares = np.where(
                differs, preferences(first, second, config.judges, rng), 0.5
            )  # nobody is asked about equal ones
            difference = value_difference(shares, config.logit_bound)
            total += gradient(v, difference, config.mu, config.difference == "central")
            counters["queries"] += int(differs.sum()) * max(1, config.judges)
            counters["samples"] += 2 * config.num_pairs
            counters["num_tokens"] += sum(len(answered.response.ids) for side in sides for answered in side)
            found.append((difference, differs.mean(), (first.mean() + second.mean()) / 2))
        update = np.float32(config.learning_rate / config.num_directions) * total
        _put(self.parameters, theta + update)
        counters["step"] += 1
        counters["train_seconds"] += time.perf_counter() - begun
        differences, asked, rewards = np.array(found).T
        row = {
            "step": counters["step"],
            "reward/mean": float(rewards.mean()),  # of the perturbed policies
            "value_difference/abs_mean": float(np.abs(differences).mean()),
            "queries/share": float(asked.mean()),  # of the pairs; the others are two equal responses
            "update_norm": float(np.linalg.norm(update)),
            **{name: counters[name] for name in ("queries", "samples", "num_tokens")},
            "perf/step_time": time.perf_counter() - begun,
        }
        self.metrics.write(row)
        return row

    def _answers(self, chosen: list[int], k: int, pool: VerifierPool) -> list[Answered]:
        """Graded responses of the policy as it is. Both policies draw them from the same random streams, so that they differ by
        what the perturbation changes."""
        problems = [self.problems[i] for i in chosen]
        requests = [Request(p.prompt_ids, (self.counters["step"], k, n)) for n, p in enumerate(problems)]
        found = generate(
            self.policy,
            requests,
            Sampling(max_new_tokens=self.config.max_completion_length, seed=self.config.seed),
            stop_ids=self.stops,
            pad_id=self.tokenizer.pad_token_id,
            batch_size=self.config.batch_size,
            quiet=True,
        )
        return graded(self.tokenizer, problems, in_order(found), pool.grade)

    def save(self) -> None:
        place = {"metrics_position": self.metrics.position(), "metrics_crc32": self.metrics.crc32}
        self.counters |= place
        state = {"identity": _plain(self.identity), "counters": self.counters, "window": {}}
        save_checkpoint(self.directory, self.counters["step"], self.learner, self.tokenizer, {}, state, _KEPT, ALONE)


def _trained_parameters(policy: PreTrainedModel, config: ZPGConfig, directory: Path) -> list[nn.Parameter]:
    """Those of adapters, which are added, or the model's own that `config` names."""
    policy.requires_grad_(False)
    if config.parameters:
        named = dict(policy.named_parameters())
        if missing := [word for word in config.parameters if not any(word in name for name in named)]:
            raise UserError(
                f"parameters: no parameter's name contains {missing[0]!r}; there are {', '.join(named)[:500]}"
            )
        return [p for name, p in named.items() if any(word in name for word in config.parameters)]
    base: Path | str = policy.name_or_path or directory / "base_model"
    if not policy.name_or_path:  # merged from an adapter
        save_base(policy, Path(base), again=False)
    base = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    torch.manual_seed(config.seed)  # of the adapters' A; their B is 0
    add_adapter(policy, lora_config(config.lora_r, config.lora_alpha, config.lora_target_modules), base)
    return [p for p in policy.parameters() if p.requires_grad]


def _flat(parameters: list[nn.Parameter]) -> np.ndarray:
    """(d,) float32."""
    return torch.cat([p.detach().flatten().float().cpu() for p in parameters]).numpy()


@torch.no_grad()
def _put(parameters: list[nn.Parameter], theta: np.ndarray) -> None:
    pieces = torch.from_numpy(np.asarray(theta, np.float32)).split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    options = {n: list(x) if isinstance(x, tuple) else x for n, x in identity["options"].items()}
    return identity | {"options": options}


def _pairs(key: str, then: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(name, then, now) of each option, or of the whole."""
    if not isinstance(now, dict):
        return [(key, then, now)]
    old = then if isinstance(then, dict) else {}
    return [(name, old.get(name), now.get(name)) for name in sorted(old.keys() | now.keys())]
