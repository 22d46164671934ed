"""What a run keeps for its report, beside config.yaml and metrics.jsonl.

run.json         the commands, the data's hash and counts, sizes of the models, phases, penalised steps, machine; and at the end
                 the time, the held-out metrics and the value along some responses
answers.jsonl    a line for each problem of eval_tasks: what the model before and the model after training answered
held_out.jsonl   a line for each held-out response: its log-probabilities, the values at three of its states, its lengths, and
                 scores of its steps; held_out_start.jsonl has those of the initial model

They are written whole, run.json before the first step and again at the end.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import dqo
from dqo.config.options import TrainConfig, command_line
from dqo.data.episode import Episode
from dqo.data.episodes import Episodes
from dqo.data.named import named_sources
from dqo.data.rows import Row
from dqo.data.segments import file_hash
from dqo.data.selection import EpisodeColumns
from dqo.data.stored import several
from dqo.files import write_whole

RUN_FILE, ANSWERS_FILE, HELD_OUT_FILE = "run.json", "answers.jsonl", "held_out.jsonl"
PENALISED_SHOWN = 6


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def stored_record(output_dir: Path) -> dict:
    """run.json; {} where it is not there, or cannot be read: it decides nothing about the models."""
    try:
        found = json.loads((output_dir / RUN_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def begin_record(output_dir: Path, begun: dict[str, Any]) -> None:
    """run.json as a run begins, or goes on: the commands that began it before are kept."""
    before = stored_record(output_dir)
    command = command_line()
    commands = [*(c for c in before.get("commands", []) if c != command), command]
    created = before.get("created") or datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    finished = before.get("finished", False)  # one that is begun again repeats its evaluation alone
    write_json(
        output_dir / RUN_FILE, before | {"created": created, "commands": commands, **begun, "finished": finished}
    )


def end_record(output_dir: Path, found: dict[str, Any]) -> None:
    """run.json as a run ends."""
    write_json(output_dir / RUN_FILE, stored_record(output_dir) | found | {"finished": True})


def data_hash(name: str | None, rows: Iterable[Row]) -> dict[str, str]:
    """sha256 of a file, or of those of several and their weights; of the rows, whatever their order, where data are no files."""
    named = [] if name is None else named_sources(name)
    if named and all(Path(one.name).is_file() for one in named):
        told = [file_hash(Path(one.name)) for one in named]
        if len(told) == 1:
            return {"sha256": told[0], "of": "file"}
        told += [str(one.weight) for one in named]
        return {"sha256": hashlib.sha256(" ".join(told).encode()).hexdigest(), "of": "files"}
    names = [f.name for f in fields(Row) if f.name != "source"]
    digests = sorted(
        hashlib.sha256(json.dumps({n: getattr(row, n) for n in names}, sort_keys=True).encode()).digest()
        for row in rows
    )
    return {"sha256": hashlib.sha256(b"".join(digests)).hexdigest(), "of": "rows"}


def data_record(config: TrainConfig, episodes: Sequence[Episode], rows: Sequence[Row], held_out: Sequence[Row]) -> dict:
    """Hash and counts of the data, and the hash of the rows that are held out. `rows`: all but those."""
    return {
        "name": config.dataset_name or "given rows",
        **data_hash(config.dataset_name, chain(rows, held_out)),
        "counts": data_counts(episodes) | {"held_out_rows": len(held_out)},
        "held_out_sha256": data_hash(None, held_out)["sha256"] if held_out else None,
    }


def data_counts(episodes: Sequence[Episode]) -> dict[str, float]:
    """Counts of the responses that were trained on."""
    columns = EpisodeColumns(episodes)
    lengths, count = columns.length, len(episodes)
    problems, mixed = several(columns.prompt, columns.label)
    return {
        "rows": count,
        "problems": problems,
        "share_correct": int(columns.label.sum()) / count,
        "mixed_prompts": mixed,
        "mean_length": int(lengths.sum()) / count,
        "max_length": int(lengths.max()),
        "tokens": int(columns.tokens.sum()),
    }


def parameters(policy: nn.Module, value_model: nn.Module | None) -> dict[str, int]:
    """Numbers of weights, all and those that are trained."""
    found = {}
    for name, model in (("policy", policy), ("value model", value_model)):
        if model is not None:
            found[name] = sum(p.numel() for p in model.parameters())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if trained != found[name]:
                found[f"{name}, trained"] = trained
    return found


def penalised_steps(tokenizer, episodes: Sequence[Episode], process_reward: str | None) -> dict | None:
    """How many steps are penalised, and some of them, of distinct prompts. None where no step has a reward.

    A step is penalised by a negative reward; where rewards are potentials, by one below the step before it.
    """
    count = rows = steps = 0
    total = 0.0
    shown: list[dict] = []
    prompts: set[int] = set()
    for e in episodes.take(episodes.has_steps) if isinstance(episodes, Episodes) else episodes:
        paid = list(e.step_rewards)
        if process_reward == "potential":
            paid = [now - before for now, before in zip(paid[1:], paid)]
            paid = [0.0, *paid] if e.step_rewards else []  # the first step is not known to be better or worse
        bad = [i for i, reward in enumerate(paid) if reward < 0]
        steps, count, rows = steps + len(paid), count + len(bad), rows + bool(bad)
        total += sum(paid[i] for i in bad)
        if bad and len(shown) < PENALISED_SHOWN and e.prompt_index not in prompts:
            prompts.add(e.prompt_index)
            begin = e.step_ends[bad[0] - 1] + 1 if bad[0] else 0
            end = e.step_ends[bad[0]] + 1
            ids = e.action_ids
            pieces = ids[:begin], ids[begin:end], ids[end:]
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in pieces]
            prompt = tokenizer.decode(e.prompt_ids, skip_special_tokens=True)
            place = {"step": bad[0] + 1, "steps": len(e.step_ends), "reward": paid[bad[0]], "source": e.source}
            shown.append({"prompt": prompt, "before": texts[0], "text": texts[1], "after": texts[2], **place})
    if not steps:
        return None
    mean = total / count if count else None
    found = {"rows": rows, "of_rows": len(episodes), "steps": count, "of_steps": steps, "mean_reward": mean}
    return {**found, "process_reward": process_reward or "none", "examples": shown}


def machine() -> dict[str, Any]:
    """Versions and device."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        device = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    versions = {
        "dqo": dqo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"versions": versions, "device": device}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.processor() or platform.machine()} CPU"
