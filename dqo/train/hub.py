"""A model card, and the upload of a run's models to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import yaml
from transformers import TrainerState

from dqo import __version__
from dqo.config.options import Options, dump_options
from dqo.data.named import named_sources
from dqo.errors import UserError
from dqo.files import write_whole
from dqo.train.saved import Saved, command_of, metrics_of

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
    evaluations = [row for row in state.log_history if any(name.startswith("eval_") for name in row)]
    sections = {
        "Held-out metrics": _table(["metric", "value"], [evaluations[-1]] if evaluations else []),
        "Options": f"```yaml\n{dump_options(options)}```\n",
    }
    method = type(options.objective).__name__
    more = [tags] if isinstance(tags, str) else list(tags or [])
    name, steps = model_name or output_dir.resolve().name, f", {state.global_step} steps"
    path = output_dir / "README.md"
    write_whole(path, _card(name, method, [config.method, *more], base, data, steps, sections).encode())
    return path


def _card(
    name: str, method: str, tags: list[str], base: str | None, data: str | None, more: str, sections: dict[str, str]
) -> str:
    """A model card with the hub's metadata; sections without text are left out. The license is the user's to state."""
    head: dict = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dqo", *tags]}
    if base and not Path(base).exists():  # the hub links names, not directories
        head["base_model"] = base
    names = [named.name for named in named_sources(data or "")]
    if on_hub := [
        name.partition(":")[0].partition("@")[0] for name in names if "/" in name and not Path(name).exists()
    ]:
        head["datasets"] = on_hub
    text = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name}\n",
        f"Trained with {method} by [dqo](https://arxiv.org/abs/2410.09302) {__version__}, from {base or 'a given model'} on "
        f"{data or 'given rows'}{more}.\n",
        *(f"## {title}\n\n{content}" for title, content in sections.items() if content),
    ]
    return "\n".join(text)


def _table(head: list[str], columns: list[dict]) -> str:
    """Markdown: a line a metric, a column for each dict that has any."""
    if not any(columns):
        return ""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name) for column in columns]
        shown = [f"{v:.6g}" if isinstance(v, (int, float)) else "-" if v is None else str(v) for v in values]
        lines.append(f"| {' | '.join([name, *shown])} |")
    return "\n".join(lines) + "\n"


def exported_card(saved: Saved, name: str, base: str | None, dtype: str) -> str:
    """README.md of exported models: results before and after, the data's hash, the command and all options.

    Args:
        base: of the adapter that was merged; None where none was.
    """
    options, identity = saved.options, saved.state.get("identity", {})
    method, data = options.get("method", "a method that is not known here"), options.get("dataset_name")
    steps = "" if saved.steps is None else f", {saved.steps} steps"
    steps += "; its adapter is merged into the base's weights" if base else ""
    facts = [f"- weights: {dtype}"]
    if "data" in identity:
        facts.append(f"- sha256 of the rows as they were trained on: `{identity['data']}`")
    if "model" in identity:
        facts.append(f"- sha256 of the weights before training: `{identity['model']}`")
    command = command_of(saved)
    sections = {
        "Results on held-out rows": _table(["metric", "before training", "this model"], list(metrics_of(saved))),
        "Data and weights": "\n".join(facts) + "\n",
        "Command": f"```bash\n{command}\n```\n" if command else "",
        "Options": f"```yaml\n{yaml.safe_dump(options, sort_keys=False)}```\n" if options else "",
        "License": "Not stated. It follows from those of the base model and of the data.\n",
    }
    tags = [options["method"]] if "method" in options else []
    return _card(name, method, tags, base or options.get("model_name_or_path"), data, steps, sections)


def check_name(repo_id: str) -> None:
    """Refuses a name that no repository can have, before any work."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"push_to_hub {repo_id!r}: {error}") from error


def upload_exported(directory: Path, repo_id: str) -> str:
    """Uploads an exported directory. What goes wrong is one line, and the directory stays."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        return upload(directory, repo_id, "Export of dqo", None, None, None)
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"{directory} is written and whole, and its upload to {repo_id} failed: {why}. Log in with `hf auth login`, then "
            f"`hf upload {repo_id} {directory}`"
        ) from error


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
