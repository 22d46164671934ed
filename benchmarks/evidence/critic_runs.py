"""One run of `benchmarks.evidence.critics`, in a process of its own, and the tasks on which such runs train.

    python -m benchmarks.evidence.critic_runs RUN        (RUN/spec.json says what; the result goes to RUN/result.json)

A task is a base model, its graded samples to train on, and samples of other problems. That of 6-10 steps is the demonstration's.
The base models of longer chains begin from the demonstration's, and are fitted to some longer demonstrations. In the longest task
fewer entries of the table are hard, so that samples are right often enough.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.as_planned import as_planned
from benchmarks.evidence.methods import per_problem
from benchmarks.evidence.objective_options import COMMON
from dqo.config.options import options_of
from dqo.data.episodes import make_episodes
from dqo.data.rows import read_rows
from dqo.demo.recipe import Recipe
from dqo.demo.rollouts import distinct_problems, rng_of, write_demonstrations, write_graded, write_rollouts
from dqo.errors import UserError
from dqo.files import write_whole
from dqo.grading.arith import ArithTask


@dataclass(frozen=True)
class Task:
    recipe: Recipe
    hard_share: float = 0.25

    @property
    def arith(self) -> ArithTask:
        return ArithTask(self.recipe.min_steps, self.recipe.max_steps, self.hard_share)

    def problems(self, seed: int) -> list[str]:
        """Those of the evaluation; the first of them are also those of the held-out samples."""
        return distinct_problems(self.arith, rng_of(seed, "evaluation"), self.recipe.eval_problems, set())


RECIPE = Recipe()
SAMPLES = 2  # of each problem, by every trained policy
DEMONSTRATION = "6-10"
TASKS = {
    DEMONSTRATION: Task(RECIPE),
    "8-12": Task(
        replace(RECIPE, min_steps=8, max_steps=12, demonstrations=16384, sft_learning_rate=2e-3, eval_problems=500)
    ),
    "16-24": Task(
        replace(
            RECIPE,
            min_steps=16,
            max_steps=24,
            demonstrations=25600,
            sft_learning_rate=2e-3,
            prompts=1024,
            eval_problems=500,
        ),
        hard_share=0.1,
    ),
}


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1).encode())


def make_task(name: str, demonstration: Path, output: Path) -> None:
    """base/, rollouts.jsonl, held_out.jsonl and task.json in `output`; what is there is kept."""
    if (output / "task.json").exists():
        return
    seed = json.loads((demonstration / "demo.json").read_text())["seed"]
    output.mkdir(parents=True, exist_ok=True)
    task, base = TASKS[name], output / "base"
    if name == DEMONSTRATION:
        shutil.copytree(demonstration / "base", base, ignore=shutil.ignore_patterns("checkpoint-*"), dirs_exist_ok=True)
        for file in ("rollouts.jsonl", "held_out.jsonl"):
            shutil.copy(demonstration / "data" / file, output / file)
    else:
        _make_long_task(task, demonstration / "base", output, seed)
    from dqo.demo.report import evaluate_model

    found = evaluate_model("base", base, task.problems(seed), task.recipe, seed)
    scores = found.accuracy.scores()
    if name != DEMONSTRATION:
        count = task.recipe.held_out_problems
        answers = [[answered.response for answered in row] for row in found.accuracy.sampling[:count]]
        write_graded(task.arith, task.problems(seed)[:count], found.tokenizer, answers, output / "held_out.jsonl")
    accuracy = {decoding: float(per_problem(s).mean()) for decoding, s in scores.items()}
    exact = _quality_of_pass_rates(task, found.tokenizer, output / "held_out.jsonl")
    write_json(output / "task.json", {"name": name, "seed": seed, "base": accuracy, "exact": exact})


def _quality_of_pass_rates(task: Task, tokenizer, held_out: Path) -> dict[str, Any]:
    """What the best critic would know: it says the demonstrator's exact chance, which the base model imitates."""
    from benchmarks.evidence.critic_quality import pass_rates, quality_of_values

    rows = read_rows(str(held_out))
    episodes = make_episodes(rows, tokenizer, vocab_size=len(tokenizer), max_length=256)
    rates = [pass_rates(task.arith, str(r.prompt), str(r.completion))[: e.action_count] for r, e in zip(rows, episodes)]
    return quality_of_values(rates, episodes)


def _make_long_task(task: Task, initial: Path, output: Path, seed: int) -> None:
    from dqo.train.run import train

    taken = set(task.problems(seed))
    problems = distinct_problems(task.arith, rng_of(seed, "rollouts"), task.recipe.prompts, taken)
    write_demonstrations(task.arith, task.recipe, output / "demonstrations.jsonl", seed, taken)
    fitting = COMMON | {
        "method": "sft",
        "model_name_or_path": str(initial),
        "dataset_name": str(output / "demonstrations.jsonl"),
        "output_dir": str(output / "base"),
        "eval_fraction": 0.0,
        "per_device_train_batch_size": task.recipe.sft_batch,
        "max_steps": task.recipe.demonstrations // task.recipe.sft_batch,
        "learning_rate": task.recipe.sft_learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "save_steps": 100,
        "save_total_limit": 1,
        "seed": seed,
    }
    train(options_of(fitting, "the task's base model"), "base")
    if not (output / "rollouts.jsonl").exists():
        write_rollouts(task.arith, task.recipe, output / "base", output / "rollouts.jsonl", seed, problems)


def run(directory: Path) -> None:
    """Trains what spec.json says, and measures: {"task": a task's directory, "options": of `dqo train`, "evaluate_at": updates
    after which the held-out responses are looked at, "answers": whether the policy answers problems}."""
    from transformers import TrainerCallback

    from dqo.data.batches import distinct
    from dqo.train.inputs import Given
    from dqo.train.run import begin

    spec = json.loads((directory / "spec.json").read_text())
    place = Path(spec["task"])
    options = options_of(
        as_planned(spec["options"]) | {"output_dir": str(directory / "run")}, str(directory / "spec.json")
    )

    class Meter(TrainerCallback):
        """The processor's time of the updates alone, and what the critic knows whenever the run is evaluated."""

        seconds = begun = 0.0

        def on_step_begin(self, *_, **__):
            self.begun = time.process_time()

        def on_step_end(self, args, state, control, **_):
            self.seconds += time.process_time() - self.begun
            control.should_evaluate |= state.global_step in spec["evaluate_at"]

        def on_evaluate(self, args, state, control, **_):
            found = quality(trainer, distinct(trainer.prepared.held_out))
            stages.append({"update": state.global_step, "cpu_seconds": self.seconds, **found})

    stages: list[dict] = []
    meter = Meter()
    trainer = begin(options, Given(callbacks=[meter]))
    trainer.run(directory.parent.name)
    trainer.finish()
    result: dict[str, Any] = {"spec": spec, "updates": trainer.steps, "stages": stages}
    result |= {"cpu_seconds": meter.seconds, "wall_seconds": trainer.counters["train_seconds"]}
    if spec["answers"]:
        from dqo.demo.report import evaluate_model

        told = json.loads((place / "task.json").read_text())
        task = TASKS[told["name"]]
        problems, seed = task.problems(told["seed"]), spec["options"]["seed"]
        recipe = replace(task.recipe, eval_samples=SAMPLES)
        found = evaluate_model(directory.parent.name, directory / "run", problems, recipe, seed)
        result |= found.accuracy.scores()
    write_json(directory / "result.json", result)


def quality(trainer, episodes) -> dict[str, Any]:
    """Of the value model (implied values or soft values where there is none), and of beta * log(pi / ref) of each token."""
    from benchmarks.evidence.critic_quality import quality_of_scores, quality_of_values
    from dqo.models.policy import policy_stats
    from dqo.train.held_out import of_each
    from dqo.train.learner import values_of

    def of_batch(learner, batch):
        stats = policy_stats(learner.policy, batch, learner.bf16)
        if "values" in batch.columns:  # implied by the policy of another run
            values = batch.columns["values"]
        elif learner.value_model is None:
            values = trainer.objective.beta * (stats.lse - batch.columns["ref_lse"])
        else:
            values = values_of(learner, batch)
        counts = [e.action_count for e in batch.episodes]
        ratio = stats.logprobs - batch.columns["ref_logprobs"]
        return [(v.numpy(), r.numpy()) for v, r in zip(values.cpu().split(counts), ratio.cpu().split(counts))]

    pairs = of_each(trainer.engine, of_batch, episodes, "held-out tokens")
    values, ratios = [v for v, _ in pairs], [r for _, r in pairs]
    return {"value": quality_of_values(values, episodes), "log_ratio": quality_of_scores(ratios, episodes)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise UserError("usage: python -m benchmarks.evidence.critic_runs RUN")
    run(Path(sys.argv[1]))
