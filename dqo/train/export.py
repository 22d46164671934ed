"""Saved models as transformers and vLLM load them: one directory without adapters, compared with what was trained.

    DIR/config.json  model.safetensors  generation_config.json  tokenizer*  chat_template.jinja  README.md
    DIR/critic/                                                 the value model, where it was asked for

The directory is built beside DIR, loaded again, compared, and renamed: DIR is whole whenever it exists.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel

from dqo.data.ends import ends_of
from dqo.errors import UserError
from dqo.files import check_room, remove_asides, sync, sync_tree, temporary, writing
from dqo.models.adapters import adapter_base, attach, merged
from dqo.models.critic import score_of
from dqo.models.limits import position_limit
from dqo.models.lora import has_adapter, merged_state
from dqo.models.named import load_config, load_tokenizer, stop_ids
from dqo.models.policy import load_policy
from dqo.models.value_source import FORM_FILE, HEAD_FILE, IMPLICIT_FILE, Q_FILE
from dqo.processes import Processes
from dqo.reference.columns import AGREEMENT_BOUNDS
from dqo.train import hub
from dqo.train.checkpoint import save_models
from dqo.train.damage import STATE_FILE
from dqo.train.learner import Learner
from dqo.train.parallel import whole_state
from dqo.train.resume import TRAINED_END
from dqo.train.saved import Saved, find_saved, is_checkpoint_name
from dqo.train.saved_critic import PLAIN_FORM, saved_critic
from dqo.train.streamed import in_dtype

# How far a policy in another type may be from the trained one, relative to 1 + |logprob|; of bfloat16 see `AGREEMENT_BOUNDS`, and
# float16 keeps three more bits.
BOUNDS = AGREEMENT_BOUNDS | {"float16": AGREEMENT_BOUNDS["bfloat16"] / 8}
_PROBE = (2, 24)  # rows and tokens on which models are compared
_ABANDONED = 3600.0  # seconds; what a killed export left beside DIR is deleted after them


@dataclass(frozen=True)
class Exported:
    directory: Path
    parameters: int
    dtype: str
    adapter: bool  # whether one was merged
    critic: bool
    difference: float  # the largest of a log-probability to the trained policy's, relative to 1 + |logprob|
    commit: str | None  # its address on the hub, where it was uploaded

    def __str__(self) -> str:
        text = f"{self.directory}: {self.parameters:,} parameters in {self.dtype}"
        text += ", the adapter merged" * self.adapter + ", the value model in critic/" * self.critic
        text += (
            f"\nloaded again: every weight is as it was written, and log-probabilities differ from the trained policy's by "
            f"{self.difference:.2g} at most, relative to 1 + |logprob| (bound: {BOUNDS[self.dtype]:g})"
        )
        return text + (f"\nuploaded: {self.commit}" if self.commit else "")


def check_destination(path: Path, run: Path) -> None:
    """Refuses an output_dir that is in use, and one that a run owns, before anything is loaded."""
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file; choose a new directory")
    if path.exists() and any(path.iterdir()):
        where = " (it is the run itself)" if path.resolve() == run.resolve() else ""
        raise UserError(f"output_dir {path} is in use{where}; choose a new or empty directory")
    above = list(path.resolve().parents)
    owner = next((folder for folder in above if (folder / STATE_FILE).exists() or folder == run.resolve()), None)
    if owner is not None:
        raise UserError(f"output_dir {path} lies in {owner}, whose folders a run replaces and deletes; choose another")
    if is_checkpoint_name(path.resolve().name):
        raise UserError(
            f"output_dir {path} has the name of a checkpoint, for which a run would take it; choose another"
        )


def export(
    run: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | None = None,
    value_model: bool = False,
    push_to_hub: str | None = None,
) -> Exported:
    """Writes the policy of a run, merged, with tokenizer, chat template, stop tokens and model card, and compares what
    transformers loads from there with what was trained.

    Args:
        run: a run's output_dir, a checkpoint in it, or the directory of an adapter.
        output_dir: a new or empty directory.
        dtype: "float32", "bfloat16" or "float16"; None: that of the final models, for an adapter that of its base's files.
        value_model: writes the value model too, as critic/, for AutoModelForTokenClassification.
        push_to_hub: "name" or "organisation/name" of a repository to upload the directory to.

    Raises:
        UserError: for a run that is unfinished or damaged, a directory in use, a full disk, or models that differ; then nothing
            is written.
    """
    if dtype is not None and dtype not in BOUNDS:
        raise UserError(f"dtype must be one of {', '.join(sorted(BOUNDS))}, or None, got {dtype!r}")
    saved, destination = find_saved(Path(run)), Path(output_dir)
    check_destination(destination, saved.run)
    destination = destination.resolve()
    if push_to_hub is not None:
        hub.check_name(push_to_hub)
    path = str(saved.path)
    base = adapter_base(path)
    kind = dtype or _dtype_of(saved, base)
    tokenizer = load_tokenizer(path)
    policy = load_policy(path if base is None else base)
    critic = _critic_of(saved, policy, base) if value_model else None
    trained: Any = policy if base is None else attach(policy, path, base)
    ids = _probe_ids(tokenizer, policy)
    expected = _logprobs(trained, ids)
    if base is not None:
        policy = merged(trained, path, base)
        _check_close(expected, _logprobs(policy, ids), "float32", f"{path}, merged into {base},")
    _end_as_trained(policy, tokenizer, saved, base or path)
    models = [policy, *([critic] if critic is not None else [])]
    size = sum(p.numel() for model in models for p in model.parameters()) * getattr(torch, kind).itemsize
    check_room(destination, size, "the models need", "free some, or choose another --output_dir or --dtype")
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        remove_asides(destination.parent, older_than=_ABANDONED, of=destination.name)
        with temporary(destination) as beside:
            save_models(beside, Learner(policy, critic), tokenizer, Processes(), dtype=getattr(torch, kind))
            policy.generation_config.save_pretrained(beside)
            difference = _check_policy(beside, policy, expected, ids, kind)
            _check_tokenizer(beside, tokenizer)
            if critic is not None:
                _check_critic(beside / "critic", critic, kind)
            (beside / "README.md").write_text(hub.exported_card(saved, destination.name, base, kind), encoding="utf-8")
            sync_tree(beside)
            _put(beside, destination)
    commit = None
    if push_to_hub is not None:
        commit = hub.upload_exported(destination, push_to_hub)
    return Exported(
        Path(output_dir), policy.num_parameters(), kind, base is not None, critic is not None, difference, commit
    )


def _put(beside: Path, destination: Path) -> None:
    """Renames; another process may have been faster."""
    try:
        beside.rename(destination)  # replaces an empty directory, and no other
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(
            f"output_dir {destination} was written by another process meanwhile; it is left as it is"
        ) from error
    sync(destination.parent)


def _dtype_of(saved: Saved, base: str | None) -> str:
    """Of the final models: what the run resolved, or that of the files."""
    told: Any = saved.state.get("derived", {}).get("save_dtype")
    if told is None:
        told = load_config(str(saved.path) if base is None else base).dtype
    name = str(told or "float32").removeprefix("torch.")
    if name not in BOUNDS:
        raise UserError(f"{saved.path} has weights in {name}; choose one of --dtype {', '.join(sorted(BOUNDS))}")
    return name


_NO_CLASS = [
    ("head", HEAD_FILE, "a head on the policy's hidden states"),
    ("implicit", IMPLICIT_FILE, "a language model beside its reference"),
    ("q_model", Q_FILE, "a language model of Q beside its reference"),
]


def _critic_of(saved: Saved, policy: PreTrainedModel, base: str | None) -> nn.Module:
    """The value model of a run, in a class of transformers."""
    kind = saved.options.get("value_model")
    for name, file, what in _NO_CLASS:
        if kind == name or (saved.path / "critic" / file).exists():
            raise UserError(
                f"{saved.path}: its value model is {what}, which no class of transformers describes; train with --value_model "
                "separate, or leave --value_model out here"
            )
    told = {name: saved.options.get(name, plain[0]) for name, plain in PLAIN_FORM.items()}
    other = [f"{name} {value}" for name, value in told.items() if value not in PLAIN_FORM[name]]
    if other or (saved.path / "critic" / FORM_FILE).exists():
        raise UserError(
            f"{saved.path}: its value model was trained with {' and '.join(other) or FORM_FILE}, which no class of transformers "
            "describes; leave --value_model out here"
        )
    critic = saved_critic(saved, policy, base)
    if critic is None:
        raise UserError(f"{saved.path} has no value model (critic/); leave --value_model out")
    return critic


def _probe_ids(tokenizer, policy: PreTrainedModel) -> Tensor:
    """Tokens from all over the vocabulary, none of them special."""
    special, rows, length = set(tokenizer.all_special_ids), *_PROBE
    limit, _ = position_limit(policy.config)
    length = min(length, limit or length)
    known = min(len(tokenizer), policy.config.get_text_config().vocab_size)
    usable = [i for i in range(known) if i not in special] or list(range(known))
    chosen = [usable[i * len(usable) // (rows * length)] for i in range(rows * length)]
    return torch.tensor(chosen).view(length, rows).T  # each row sees the whole vocabulary


@torch.no_grad()
def _logprobs(model: Any, ids: Tensor) -> Tensor:
    """(rows, tokens - 1) float32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def _check_close(expected: Tensor, found: Tensor, dtype: str, what: str) -> float:
    """The largest difference, relative to 1 + |logprob|."""
    difference = ((found - expected).abs() / (1 + expected.abs())).nan_to_num(torch.inf).max().item()
    if not difference <= BOUNDS[dtype]:
        raise UserError(
            f"{what} gives log-probabilities that differ from the trained policy's by {difference:.3g}, relative to "
            f"1 + |logprob|; rounding to {dtype} explains {BOUNDS[dtype]:g}. Nothing is written"
        )
    return difference


def _end_as_trained(policy: PreTrainedModel, tokenizer, saved: Saved, its_path: str) -> None:
    """The generation_config stops at the end token that was trained, which comes first, and at the model's others."""
    ends = ends_of(tokenizer, stop_ids(its_path), messages=tokenizer.chat_template is not None)
    first = saved.state.get("identity", {}).get(TRAINED_END, ends.trained)
    stops = [first, *sorted(ends.stops - {first})]
    settings = policy.generation_config
    settings.eos_token_id = stops if len(stops) > 1 else first
    settings.pad_token_id = tokenizer.pad_token_id
    settings._from_model_config = False  # it is no copy of defaults any more


def _different(loaded: nn.Module, told: dict, expected: dict[str, Tensor]) -> str | None:
    """What is wrong with a model that was loaded again; bytes are compared."""
    missing = sorted({*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]}, key=str)
    if missing:
        return f"{missing[0]} is not in the files as the model has it"
    state = loaded.state_dict()
    if state.keys() != expected.keys():
        return f"{min(state.keys() ^ expected.keys())} is in one of both alone"
    for name, tensor in state.items():
        raw = [x.detach().contiguous().flatten().view(torch.uint8) for x in (tensor, expected[name])]
        if tensor.dtype != expected[name].dtype or not torch.equal(*raw):
            return f"{name} has other values"
    return None


def _loaded(loader: Any, path: Path) -> tuple[Any, dict]:
    """As a reader loads it, without an argument that says how."""
    try:
        return loader.from_pretrained(path, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"what was written cannot be loaded by transformers' {loader.__name__}: {error}") from error


def _refuse_difference(found: str | None, what: str) -> None:
    if found is not None:
        raise UserError(f"{what}, loaded again, differs from what was written: {found}. Nothing is left of it")


def _check_policy(path: Path, policy: PreTrainedModel, expected: Tensor, ids: Tensor, dtype: str) -> float:
    """Loads it again; returns the largest difference of a log-probability to the trained policy's."""
    loaded, told = _loaded(AutoModelForCausalLM, path)
    wanted = in_dtype(policy, whole_state(policy), getattr(torch, dtype))
    _refuse_difference(_different(loaded, told, wanted), "the policy")
    tied = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (policy, loaded)]
    if tied[0] != tied[1]:
        _refuse_difference("its embeddings are tied in one of both alone", "the policy")
    ends = [model.generation_config.eos_token_id for model in (policy, loaded)]
    if ends[0] != ends[1]:
        _refuse_difference(f"it stops at {ends[1]} and not at {ends[0]}", "the policy")
    return _check_close(expected, _logprobs(loaded.eval(), ids), dtype, "the policy, loaded again,")


def _check_critic(path: Path, critic: nn.Module, dtype: str) -> None:
    loaded, told = _loaded(AutoModelForTokenClassification, path)
    state = merged_state(critic) if has_adapter(critic) else critic.state_dict()
    _refuse_difference(_different(loaded, told, in_dtype(critic, state, getattr(torch, dtype))), "the value model")
    assert score_of(loaded).out_features == 1


def _check_tokenizer(path: Path, tokenizer) -> None:
    loaded: Any = AutoTokenizer.from_pretrained(path)
    text = " ".join(tokenizer.convert_ids_to_tokens(list(range(min(100, len(tokenizer))))))
    same = loaded(text)["input_ids"] == tokenizer(text)["input_ids"] and len(loaded) == len(tokenizer)
    if not same or loaded.chat_template != tokenizer.chat_template:
        _refuse_difference("it makes other tokens of a text" if not same else "its chat template", "the tokenizer")
