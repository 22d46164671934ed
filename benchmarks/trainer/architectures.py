"""Every causal language model class of transformers, made small and trained.

    python -m benchmarks.trainer.architectures [MODEL_TYPE ...]

Each is trained for two steps, dropout as its configuration has it, and must be its own reference before them (importance ratio 1,
kl 0); must change by them; and what it saves must load again as it was. Without names the table is written to
benchmarks/results/architectures.md.
"""

from __future__ import annotations

import copy
import datetime
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness.environment import commit
from benchmarks.trainer.small_models import config_classes, small_model
from dqo import DQOConfig, DQOTrainer
from dqo.errors import UserError
from dqo.models.critic import load_critic
from dqo.models.new import character_tokenizer
from dqo.models.policy import load_policy

COLUMNS = {
    "trains": {"value_model": "none"},
    "value model": {"value_model": "separate"},
    "LoRA": {"value_model": "separate", "use_peft": True, "lora_r": 2},
    "checkpointing": {"value_model": "separate", "gradient_checkpointing": True},
}
FILE = Path(__file__).parents[1] / "results" / "architectures.md"
ROWS = [
    {"prompt": prompt, "completion": completion, "reward": float(right)}
    for prompt, completion, right in (
        ("1+2=", "3", True),
        ("1+2=", "4-1*1=3", True),
        ("1+2=", "12", False),
        ("4*5-7=", "13", True),
        ("4*5-7=", "20-7=13", True),
        ("4*5-7=", "20-7=12", False),
    )
]


def trained(model, directory: Path, **options) -> dict:
    """The first row of metrics.jsonl after two steps on a copy of `model`.

    Raises:
        UserError: for a model that is refused. AssertionError: for one that is not trained as it should be.
    """
    policy, tokenizer = copy.deepcopy(model), character_tokenizer("0123456789+-*=")
    config = DQOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=6,
        max_steps=2,
        max_length=64,
        max_batch_tokens=40,
        logging_steps=1,
        eval_fraction=0.0,
        learning_rate=1e-3,
        critic_learning_rate=1e-2,
        use_cpu=True,
        **options,
    )
    trainer = DQOTrainer(policy, config, ROWS, processing_class=tokenizer)
    trainer.train()
    first, second = trainer.log_history
    assert abs(first["sampling/importance_sampling_ratio/mean"] - 1) < 1e-4 and first["kl"] < 1e-6, first
    assert second["kl"] > first["kl"] and second["grad_norm"] > 0, "the policy does not change"
    if options["value_model"] == "separate":
        assert second["critic/grad_norm"] > 0 and second["value/max"] != 0, "the value model does not change"
        if not options.get("use_peft"):
            same(trainer.value_model, load_critic(directory / "critic"))
    if not options.get("use_peft"):
        same(trainer.model, load_policy(str(directory)))
    return first


def same(expected: nn.Module, found: nn.Module) -> None:
    state = found.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), f"{name} is another when it is loaded again"


def row_of(model_type: str, directory: Path, columns: Iterable[str] = COLUMNS) -> dict[str, str]:
    """Each column's "yes", or why not. What does not train at all is refused in every column."""
    cells, rows = {}, {}
    try:
        model = small_model(model_type)
    except Exception as error:  # of transformers, of any kind
        return {"trains": f"not built: {_line(error)}"}
    cells["class"] = type(model).__name__
    for column in columns:
        try:
            rows[column] = trained(model, directory / column, **COLUMNS[column])
            cells[column] = "yes"
        except UserError as error:
            cells[column] = f"refused: {_line(error)}"
            if column == "trains":
                break
        except Exception as error:
            cells[column] = f"FAILS: {type(error).__name__}: {_line(error)}"
    if cells.get("checkpointing") == cells.get("value model") == "yes":
        plain, recomputed = rows["value model"], rows["checkpointing"]
        for name in ("loss", "grad_norm", "critic/grad_norm"):
            if abs(plain[name] - recomputed[name]) > 1e-4 * abs(plain[name]):
                cells["checkpointing"] = f"FAILS: {name} is {recomputed[name]:.6g} instead of {plain[name]:.6g}"
    return cells


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160].replace("|", "/")


def table(rows: dict[str, dict[str, str]]) -> str:
    lines = ["| model type | class | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for model_type, cells in rows.items():
        lines.append(f"| {model_type} | " + " | ".join(cells.get(name, "") for name in ("class", *COLUMNS)) + " |")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = {}
    for model_type in names or sorted(config_classes()):
        directory = Path(tempfile.mkdtemp())
        rows[model_type] = row_of(model_type, directory)
        shutil.rmtree(directory)
        print(model_type, rows[model_type], flush=True)
    good = sum(all(cells.get(column) == "yes" for column in COLUMNS) for cells in rows.values())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    text = (
        "# Architectures\n\nSmall models of every causal language model class of transformers, trained by "
        f"`python -m benchmarks.trainer.architectures`: {good} of {len(rows)} in every column. {versions}, "
        f"{datetime.date.today()}, commit {commit()}.\n\n{table(rows)}\n"
    )
    if names:
        print(text)
    else:
        FILE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
