"""The built-in demonstration: arithmetic chains, from nothing to report.html.

    dqo-train

A small Llama learns from demonstrations that are systematically wrong on a quarter of the table ("hard" entries, right 42 % of
the time), so it knows the right step but does not prefer it. Of its own graded samples the offline data set keeps those that are
wrong and half right, and a few that are right; their steps are labelled, exactly in one file, and in another a fifth of them
wrongly. Every method then trains on one, from the same base model, for the same number of updates.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqo.config.options import Options, command_line, options_of
from dqo.demo.half_right import write_half_right
from dqo.demo.recipe import DemoConfig, Recipe
from dqo.demo.rollouts import distinct_problems, rng_of, write_demonstrations, write_graded, write_rollouts
from dqo.errors import UserError
from dqo.files import write_whole, writing
from dqo.grading.arith import VOCABULARY, ArithTask
from dqo.objectives import OBJECTIVES


def _train_options(recipe: Recipe, given: dict[str, Any], data: Path, model: Path, output: Path, seed: int) -> Options:
    settings: dict[str, Any] = {
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "output_dir": str(output),
        "eval_fraction": 0.0,
        "max_length": 256,
        "process_reward": "none",
        "per_device_train_batch_size": recipe.batch // (OBJECTIVES[given["method"]].group_size or 1),
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.99,
        "save_steps": 1000,
        "save_total_limit": 1,
        "seed": seed,
    }
    return options_of(settings | given, "the demonstration's options")


@dataclass
class Stage:
    """Prints what runs and how long it took."""

    started: float = field(default_factory=time.perf_counter)
    number: int = 0

    def begin(self, text: str) -> None:
        self.number += 1
        print(f"[{self.number}/5] {time.perf_counter() - self.started:4.0f}s  {text}", flush=True)


def run_demo(config: DemoConfig, recipe: Recipe | None = None) -> Path:
    """Runs the whole demonstration and returns the path of report.html."""
    stage = Stage()
    recipe = recipe or Recipe()
    task = ArithTask(recipe.min_steps, recipe.max_steps)
    output = Path(config.output_dir)
    _claim(output, config, recipe)
    stage.begin(
        f"task arith: chains of {recipe.min_steps}-{recipe.max_steps} steps modulo 10, a quarter of the table hard"
    )
    taken: set[str] = set()
    data = output / "data"
    data.mkdir(exist_ok=True)
    evaluation = distinct_problems(task, rng_of(config.seed, "evaluation"), recipe.eval_problems, taken)
    problems = distinct_problems(task, rng_of(config.seed, "rollouts"), recipe.prompts, taken)
    write_demonstrations(task, recipe, data / "demonstrations.jsonl", config.seed, set(taken))

    from dqo.demo.report import evaluate_model, write_demo_report  # torch from here on
    from dqo.models.new import character_tokenizer, new_llama, save
    from dqo.train.run import train

    initial, base = output / "initial", output / "base"
    if not initial.exists():
        tokenizer = character_tokenizer(VOCABULARY)
        size: dict[str, Any] = {"hidden_size": recipe.hidden_size, "layers": recipe.layers, "heads": recipe.heads}
        size |= {"intermediate_size": recipe.intermediate_size, "initializer_range": recipe.initializer_range}
        model = new_llama(tokenizer, **size, max_length=256, seed=config.seed)
        save(model, tokenizer, initial)

    stage.begin(f"base model: {recipe.demonstrations:,} demonstrations x {recipe.sft_epochs:g} epochs")
    sft = {
        "method": "sft",
        "per_device_train_batch_size": recipe.sft_batch,
        "num_train_epochs": recipe.sft_epochs,
        "learning_rate": recipe.sft_learning_rate,
        "warmup_steps": 50,
        "lr_scheduler_type": "cosine",
    }
    train(_train_options(recipe, sft, data / "demonstrations.jsonl", initial, base, config.seed), "base")

    rollouts = data / "rollouts.jsonl"
    stage.begin(f"rollouts: {recipe.samples} samples of the base model for each of {recipe.prompts:,} problems")
    if not rollouts.exists():
        write_rollouts(task, recipe, base, rollouts, config.seed, problems)
    write_half_right(recipe, rollouts, data, config.seed)

    stage.begin(f"every method from the same base model, {recipe.updates} updates each")
    results = [evaluate_model("base", base, evaluation, recipe, config.seed)]
    held_out = data / "held_out.jsonl"
    tokenizer, samples = results[0].tokenizer, [[a.response for a in row] for row in results[0].accuracy.sampling]
    write_graded(
        task, evaluation[: recipe.held_out_problems], tokenizer, samples, held_out
    )  # no method trains on these
    for name, given in recipe.methods.items():
        options = given | {"max_steps": recipe.updates}
        source = data / options.pop("file")
        if given["method"] == "dqo":
            warmup = recipe.value_warmup_updates
            options |= {"value_warmup_steps": warmup, "max_steps": warmup + recipe.updates}
            options["eval_dataset_name"] = str(held_out)
        run = train(_train_options(recipe, options, source, base, output / name, config.seed), name)
        results.append(evaluate_model(name, run.output_dir, evaluation, recipe, config.seed, run))

    stage.begin("report")
    seconds = time.perf_counter() - stage.started
    return write_demo_report(output, config, recipe, results, command_line(), seconds)


def _claim(output: Path, config: DemoConfig, recipe: Recipe) -> None:
    """Takes an empty directory, or one of the same demonstration, which then goes on."""
    identity = {"seed": config.seed, "recipe": dataclasses.asdict(recipe)}
    marker = output / "demo.json"
    if marker.exists():
        try:
            found = json.loads(marker.read_bytes())
        except ValueError as error:
            raise UserError(f"{marker} is damaged; choose another output_dir, or delete {output}") from error
        if found != identity:
            raise UserError(
                f"output_dir {output} holds a demonstration with another seed or recipe; choose another directory"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output_dir {output} is in use; choose another with --output_dir")
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    write_whole(marker, json.dumps(identity, indent=1).encode())
