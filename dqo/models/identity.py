"""What a model's name stands for: two models of one identity give the same responses."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import PreTrainedConfig

from dqo.errors import UserError
from dqo.models.adapters import adapter_base

_FILES = (
    *("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin"),
    *(
        "value_head.safetensors",
        "value_form.safetensors",
        "implicit_value.json",
        "value_start.safetensors",
        "q_model.json",
    ),
    *("config.json", "adapter_config.json", "generation_config.json", "tokenizer*", "chat_template*"),
)


def check_holds_model(path: str) -> None:
    """Refuses the directory of a run that has checkpoints, and no model yet."""
    directory = Path(path)
    if not directory.is_dir() or any((directory / name).exists() for name in ("config.json", "adapter_config.json")):
        return
    found = [p for p in directory.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    if found:
        newest = max(found, key=lambda p: int(p.name.rpartition("-")[2]))
        raise UserError(
            f"{path}: the run has not ended, and has no model yet; name one of its checkpoints, such as {newest}"
        )


def model_identity(path: str, config: PreTrainedConfig) -> str:
    """The hash of what a directory's model is made of, its adapter's base included; of a hub name that and its commit. `config`
    is the loaded one."""
    directory, base = Path(path), adapter_base(path)
    if not directory.is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256(b"" if base is None else model_identity(base, config).encode())
    for file in sorted({file for pattern in _FILES for file in directory.glob(pattern)}):
        digest.update(f"\n{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while part := content.read(1 << 22):
                digest.update(part)
    return f"sha256:{digest.hexdigest()[:32]}"
