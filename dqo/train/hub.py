"""A model card, and the upload of a run's models to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import yaml
from transformers import TrainerState

from dqo import __version__
from dqo.config.options import Options, dump_options
from dqo.files import write_whole

UPLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "critic/*"]
NOT_UPLOADED = [
    "trainer_state.json",
    "run.json",
    "report.json",
    "checkpoint-*",
    "ref_cache/*",
]  # run.json quotes the data


def write_model_card(
    output_dir: Path,
    options: Options,
    state: TrainerState,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> Path:
    """README.md with the hub's metadata, the options and the last held-out metrics. Returns its path."""
    config = options.train
    base, data = config.model_name_or_path, dataset_name or config.dataset_name
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    head: dict = {"library_name": "transformers", "tags": ["dqo", config.method, *tags]}
    if base and not Path(base).exists():  # the hub links names, not directories
        head["base_model"] = base
    if data and not Path(data).exists() and "/" in data:
        head["datasets"] = [data]
    evaluations = [row for row in state.log_history if any(name.startswith("eval_") for name in row)]
    rows = [f"| {name} | {value:.6g} |" for name, value in (evaluations[-1] if evaluations else {}).items()]
    text = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {model_name or output_dir.resolve().name}\n",
        f"Trained with {type(options.objective).__name__} by [dqo](https://arxiv.org/abs/2410.09302) {__version__}, from "
        f"{base or 'a given model'} on {data or 'given rows'}, {state.global_step} steps.\n",
        "## Held-out metrics\n\n| metric | value |\n|---|---|\n" + "\n".join(rows) + "\n" if rows else "",
        f"## Options\n\n```yaml\n{dump_options(options)}```\n",
    ]
    path = output_dir / "README.md"
    write_whole(path, "\n".join(part for part in text if part).encode())
    return path


def upload(
    output_dir: Path, repo_id: str | None, message: str, private: bool | None, token: str | None, revision: str | None
) -> str:
    """Makes the repository where it is not there, and uploads models, tokenizer and model card. Returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id or output_dir.resolve().name, private=private, exist_ok=True).repo_id
    done = api.upload_folder(
        repo_id=repo,
        folder_path=output_dir,
        commit_message=message,
        revision=revision,
        allow_patterns=UPLOADED,
        ignore_patterns=NOT_UPLOADED,
    )
    return done.commit_url
