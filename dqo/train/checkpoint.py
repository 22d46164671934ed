"""Checkpoints: transformers' layout plus optimizer states and counters, safetensors and JSON, written aside and renamed.

base_model/      config.json model.safetensors                what the policy's adapter is of, where that lies nowhere else
checkpoint-600/  config.json model.safetensors tokenizer*     the policy; with LoRA its adapter, in peft's layout
                 critic/                                      the value model, AutoModelForTokenClassification if separate
                 adapters.safetensors                         LoRA: what is trained of policy and value model
                 target.safetensors                           the value model's moving average, where there is one
                 optimizer.safetensors                        AdamW states of both
                 dqo_state.json                               step, counters, metrics position, hashes, options, checksums

Tensors are whole, however they were sharded: a run may go on with another number of processes.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dqo.config.lora import PREFIX
from dqo.config.options import Options, dump_options
from dqo.errors import UserError
from dqo.files import aside, remove_asides, replacing, sync, sync_tree, temporary, write_whole, writing
from dqo.models.critic import save_value_model
from dqo.models.lora import base_state, has_adapter, merged_state, plain_name, save_adapter
from dqo.models.named import load_config
from dqo.models.policy import architecture, load_policy
from dqo.processes import Processes
from dqo.train.damage import (
    STATE_FILE,
    check_whole,
    checkpoints,
    loading,
    newest_whole,
    put_away,
    read_state,
    write_state,
)
from dqo.train.learner import Learner
from dqo.train.masters import has_masters, master_of
from dqo.train.parallel import like, load_whole_state, whole, whole_state
from dqo.train.resume import (
    CONFIGURATIONS,
    LATER,
    changed_source,
    check_configurations,
    default_values,
    option_differences,
    taken_options,
    versions,
)
from dqo.train.streamed import (
    in_dtype,
    load_model,
    load_tensors,
    load_value_model,
    save_sharded_value_model,
    save_streamed,
    write_tensors,
)

logger = logging.getLogger(__name__)


def _updated(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the optimizer updates, in the order in which its states are numbered."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """{"policy/17/exp_avg": ...}: everything an AdamW holds, by parameter number, sharded as it is."""
    return {
        f"{name}/{index}/{key}": torch.as_tensor(value)
        for name, optimizer in optimizers.items()
        for index, parameter in enumerate(_updated(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for name, optimizer in optimizers.items():
        parameters = _updated(optimizer)
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            owner, index, field = key.split("/")
            if owner == name:  # copied: out of the file's mapping
                own = like(value, parameters[int(index)])
                state.setdefault(int(index), {})[field] = value.clone() if own is value else own
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            continue
        for number, fields in state.items():  # of bitsandbytes, which counts steps in an int
            moved = {field: value.to(parameters[number].device) for field, value in fields.items()}
            optimizer.state[parameters[number]] = moved | {"step": int(fields["step"])}


def parameter_names(optimizers: dict[str, torch.optim.Optimizer], learner: Learner) -> dict[str, list[str]]:
    """{"policy": ["model.embed_tokens.weight", ...]}: what the numbers in an optimizer's state stand for."""
    models = {"policy": learner.policy, "critic": learner.value_model}
    found = [item for model in filter(None, models.values()) for item in model.named_parameters()]
    names = {id(master_of(parameter)): plain_name(name) for name, parameter in found}
    return {owner: [names[id(p)] for p in _updated(optimizer)] for owner, optimizer in optimizers.items()}


def _renumbered(
    checkpoint: Path, tensors: dict[str, Tensor], then: dict[str, list[str]], now: dict[str, list[str]]
) -> dict[str, Tensor]:
    """Optimizer states under today's numbers of the same parameters: a later peft or transformers may have another order."""
    for owner, names in now.items():
        _check_names(checkpoint, "optimizer state", set(then.get(owner, ())), set(names))
    places = {owner: {name: index for index, name in enumerate(names)} for owner, names in now.items()}
    found = {}
    for key, tensor in tensors.items():
        owner, index, field = key.split("/")
        found[f"{owner}/{places[owner][then[owner][int(index)]]}/{field}"] = tensor
    return found


def _check_names(checkpoint: Path, what: str, then: set[str], now: set[str]) -> None:
    for names, where in ((now - then, "the checkpoint"), (then - now, "this model")):
        if names:
            raise UserError(
                f"{checkpoint}: its {what} is of other parameters; {min(names)} is not in {where} ({len(names)} such names). "
                "Go on with the versions of transformers and peft that its dqo_state.json names, or choose another --output_dir"
            )


def _trained(learner: Learner) -> dict[str, nn.Parameter]:
    """The parameters that are trained, of a run with adapters."""
    parts = {"policy": learner.policy} | ({} if learner.value_model is None else {"critic": learner.value_model})
    return {
        f"{part}/{name}": parameter
        for part, model in parts.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_models(
    directory: Path,
    learner: Learner,
    tokenizer,
    processes: Processes,
    value_model: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Policy (or its adapter) and value model (its adapter merged) as transformers loads them, in `dtype` or as they are updated.
    All processes must call it."""
    if dtype is None and has_masters(learner.policy):
        dtype = torch.float32
    if hasattr(learner.policy, "on_disk"):
        save_streamed(learner.policy, directory, processes, dtype)
        if processes.main:
            tokenizer.save_pretrained(directory)
        if learner.value_model is not None and value_model:
            save_sharded_value_model(learner.value_model, directory / "critic", processes, dtype)
        return
    policy = in_dtype(learner.policy, whole_state(learner.policy), dtype)
    critic = None
    if learner.value_model is not None and value_model:
        critic = (
            merged_state(learner.value_model) if has_adapter(learner.value_model) else whole_state(learner.value_model)
        )
        critic = in_dtype(learner.value_model, {name: whole(tensor) for name, tensor in critic.items()}, dtype)
    if processes.main:
        if has_adapter(learner.policy):
            save_adapter(learner.policy, policy, directory)
        else:
            learner.policy.save_pretrained(directory, state_dict=policy)
            if dtype is not None:  # it wrote the dtype that the weights have here
                described = copy.deepcopy(learner.policy.config)
                described.dtype = dtype
                described.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if learner.value_model is not None and critic is not None:
            save_value_model(learner.value_model, critic, directory / "critic")


def save_base(policy: PreTrainedModel, directory: Path, again: bool) -> None:
    """The model under the adapter of `policy`, as transformers loads it; `again`: also where it is there already."""
    if directory.exists() and not again:
        return
    with torch.device("meta"):
        plain: Any = type(policy)(policy.config)  # only its names and config are used
        plain.to(policy.dtype)
    plain.generation_config = policy.generation_config
    with replacing(directory) as beside:
        plain.save_pretrained(beside, state_dict=base_state(whole_state(policy)))


def publish_models(
    directory: Path, learner: Learner, tokenizer, processes: Processes, dtype: torch.dtype | None = None
) -> None:
    """Puts the models, in `dtype` or as they are, into a directory that holds other files. Each file is whole whenever it exists.
    All processes must call it."""
    with writing(directory), temporary(directory / "models") as beside:
        save_models(beside, learner, tokenizer, processes, dtype=dtype)
        if not processes.main:
            return
        sync_tree(beside)
        folders = [beside, *(path for path in sorted(beside.rglob("*")) if path.is_dir())]
        for folder in folders:
            target = directory / folder.relative_to(beside)
            target.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if path.is_file():
                    path.replace(target / path.name)
            sync(target)


def save_checkpoint(
    output_dir: Path,
    step: int,
    learner: Learner,
    tokenizer,
    optimizers: dict[str, torch.optim.Optimizer],
    state: dict,
    keep: int,
    processes: Processes,
    best: Path | None = None,
) -> Path:
    """Writes checkpoint-<step> atomically: a directory of that name is whole, whatever happened. All processes must call it.
    `keep` of them stay; the newest and `best` always do."""
    final = output_dir / f"checkpoint-{step}"
    adapters: dict[str, Tensor] = {}
    if has_adapter(learner.policy):
        adapters.update(_trained(learner))
    target = {} if learner.target is None else {name: master_of(x) for name, x in _state(learner.target).items()}
    optimizer, names = optimizer_tensors(optimizers), parameter_names(optimizers, learner)
    with replacing(final) as beside:
        save_models(beside, learner, tokenizer, processes, value_model=not adapters)
        kept: list[tuple[str, dict[str, Tensor]]] = [
            ("adapters", adapters),
            ("target", target),
            ("optimizer", optimizer),
        ]
        for name, tensors in kept:
            if tensors:
                write_tensors(beside / f"{name}.safetensors", tensors, processes)
        if processes.main:
            write_state(beside, state | {"parameters": names, "versions": versions()})
    if processes.main:
        for old in surplus(checkpoints(output_dir), keep, best):
            old.rename(aside(old))  # at once, then file by file: half a checkpoint must not look like one
        remove_asides(output_dir)
    processes.barrier()
    return final


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, in which a tied parameter is one object."""
    return module.state_dict(keep_vars=True)


def surplus(found: list[Path], keep: int, best: Path | None) -> list[Path]:
    """Those of `found`, oldest first, that are more than `keep`; neither the newest nor `best` is one of them."""
    kept = found[-keep:]
    if best in found and best not in kept:
        kept = [best, *found[-max(1, keep - 1) :]]
    return [path for path in found if path not in kept]


def left_behind(found: list[Path], chosen: Path | None) -> list[Path]:
    """Those of `found`, oldest first, that are later than the one of them that a run goes on from."""
    places = [path.resolve() for path in found]
    at = None if chosen is None else chosen.resolve()
    return found[places.index(at) + 1 :] if at in places else []


def load_models(checkpoint: Path, learner: Learner) -> None:
    """Copies a checkpoint's weights into a learner, sharded or not."""
    if has_adapter(learner.policy):
        saved = {plain_name(name): tensor for name, tensor in load_file(checkpoint / "adapters.safetensors").items()}
        trained = {plain_name(name): parameter for name, parameter in _trained(learner).items()}
        _check_names(checkpoint, "adapter", set(saved), set(trained))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(like(saved[name], parameter))
    else:
        load_model(learner.policy, checkpoint, lambda: load_policy(str(checkpoint)))
        if learner.value_model is not None:
            load_value_model(learner.value_model, checkpoint / "critic")
    if learner.target is not None:
        if hasattr(learner.policy, "on_disk"):
            load_tensors(learner.target, checkpoint / "target.safetensors")
        else:
            load_whole_state(learner.target, load_file(checkpoint / "target.safetensors"))


def load_optimizers(checkpoint: Path, optimizers: dict[str, torch.optim.Optimizer], learner: Learner) -> None:
    tensors = load_file(checkpoint / "optimizer.safetensors")
    then = read_state(checkpoint).get("parameters")
    if then is not None:  # earlier checkpoints tell the numbers alone
        tensors = _renumbered(checkpoint, tensors, then, parameter_names(optimizers, learner))
    load_optimizer_tensors(optimizers, tensors)


def check_same_run(checkpoint: Path, identity: dict, defaults: dict | None = None) -> None:
    """Refuses to go on from a checkpoint of other data, another model or other options, and says what differs. `defaults` are
    today's, of all options."""
    state = read_state(checkpoint)
    saved, differences = state["identity"], []
    for key in sorted(saved.keys() | identity.keys()):
        old, new = saved.get(key), identity.get(key)
        if key == "options":
            assert new is not None  # a run tells its options, an old checkpoint may not
            if _untold_adapter(checkpoint, old):
                new = {name: value for name, value in new.items() if not name.startswith(PREFIX)}
            differences += option_differences(checkpoint, state, new, defaults or {})
        elif old != new and key not in CONFIGURATIONS and (key in saved or key not in LATER):
            differences.append(f"{key}: {str(old)[:12]} then, {str(new)[:12]} now")
    if differences:
        raise UserError(
            f"{checkpoint} belongs to another run:\n  "
            + "\n  ".join(differences)
            + "\nChoose another --output_dir, or repeat "
            "the options of that run"
        )
    if "configuration" not in saved and "configuration" in identity and (checkpoint / "config.json").is_file():
        with loading(checkpoint):
            saved = saved | {"configuration": architecture(load_config(str(checkpoint)))}
    same = state.get("versions", {}).get("transformers") == versions()["transformers"]
    check_configurations(checkpoint, saved, identity, same)


def _untold_adapter(checkpoint: Path, options: dict) -> bool:
    """Whether adapters were trained there and no option says by which peft_config: so of checkpoints that are older."""
    told = options.get("use_peft") or any(name.startswith(PREFIX) for name in options)
    return not told and (checkpoint / "adapters.safetensors").exists()


def claim_output(options: Options, identity: dict, processes: Processes) -> Path | None:
    """Makes output_dir this run's before anything else is written there; returns the checkpoint to go on from.

    Raises:
        UserError: when the checkpoint is of another run, or damaged and no other is whole; everything is then left as it is.
    """
    output_dir = Path(options.train.output_dir)
    chosen, damaged = processes.from_main(lambda: _chosen(options, identity))
    if processes.main:
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        remove_asides(output_dir)
        for path, message in damaged.items():
            logger.warning("%s. It is now %s; going on from %s", message, put_away(path), chosen)
        for path in left_behind(checkpoints(output_dir), chosen):
            logger.warning("%s is behind %s and is not used: it is now %s", path, chosen, put_away(path, "left"))
        if chosen is not None:
            said = taken_options(options, chosen), changed_source(options, chosen, read_state(chosen))
            for line in filter(None, said):
                logger.warning(line)
        write_whole(output_dir / "config.yaml", dump_options(options).encode())
    processes.barrier()
    return chosen


def _chosen(options: Options, identity: dict) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to go on from, and the damaged ones behind it."""
    output_dir, named = Path(options.train.output_dir), options.train.resume_from_checkpoint
    if named in ("auto", "never"):
        chosen, damaged = newest_whole(checkpoints(output_dir))
        if damaged and chosen is None:
            raise UserError(
                f"{next(iter(damaged.values()))}, and no other checkpoint in {output_dir} is whole; put its files back, or "
                "choose another --output_dir"
            )
    else:
        chosen, damaged = Path(named), {}
        if not (chosen / STATE_FILE).is_file():
            raise UserError(
                f"resume_from_checkpoint {chosen} is no checkpoint (it has no {STATE_FILE}); give a checkpoint-N directory, or "
                '"auto" for the last one in output_dir'
            )
        check_whole(chosen)
    if chosen is not None:
        check_same_run(chosen, identity, default_values(options) | options.objective.earlier)
    return chosen, damaged
