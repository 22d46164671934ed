"""What a run found, as the sections of a report: curves, the value model on held-out responses, data, machine."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import dqo
from dqo.data.batches import distinct
from dqo.data.episodes import Episode
from dqo.models import attention
from dqo.processes import Processes
from dqo.report.schema import Curve, Machine, ValueFindings, ValueTrace
from dqo.stats import auc_interval
from dqo.train.engine import Engine
from dqo.train.held_out import value_auc, value_traces
from dqo.train.metrics import read_metrics
from dqo.train.run import Run

CURVES = (
    "loss",
    "loss/value",
    "value/explained_variance",
    "kl",
    "entropy",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
)


def curves(method: str, metrics_path: Path) -> list[Curve]:
    """One curve for each of CURVES that the run logged."""
    rows = [row for row in read_metrics(metrics_path) if "loss" in row]
    found: list[Curve] = []
    for name in CURVES:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if len(points) > 1:
            x, y = map(list, zip(*points))
            found.append({"name": name, "method": method, "x": x, "y": y, "x_label": "step"})
    return found


def value_findings(run: Run) -> ValueFindings:
    """value_auc, value_calibration and value_traces on the held-out responses; {} without a value model or held-out rows."""
    prepared = run.prepared
    if prepared.learner.value_model is None or not prepared.held_out:
        return {}
    episodes = distinct(prepared.held_out)
    learner = prepared.learner
    batching = replace(prepared.batching, max_tokens=16_384, packed=attention.packs(learner.policy))
    traces = value_traces(Engine(learner, learner, batching, Processes(device=learner.device)), episodes)
    at_end, at_half = value_auc(traces, episodes)
    sections: ValueFindings = {
        "value_calibration": {"predicted": [trace[0] for trace in traces], "observed": [e.reward for e in episodes]},
        "value_traces": [_trace(prepared.tokenizer, episodes[i], traces[i]) for i in _shown(episodes)],
    }
    if at_end is not None:
        labels, groups = [e.label for e in episodes], [e.prompt_index for e in episodes]
        interval = auc_interval([trace[-1] for trace in traces], labels, groups)
        sections["value_auc"] = {
            "at_end": at_end,
            "at_half": at_half,
            "n": len(labels),
            "interval": [interval.low, interval.high] if interval else None,
        }
    return sections


def _shown(episodes: list[Episode], each: int = 3) -> list[int]:
    """The first correct and the first wrong responses of distinct prompts."""
    chosen: dict[bool, list[int]] = {True: [], False: []}
    prompts: set[int] = set()
    for i, e in enumerate(episodes):
        if len(chosen[e.label]) < each and e.prompt_index not in prompts:
            chosen[e.label].append(i)
            prompts.add(e.prompt_index)
    return chosen[True] + chosen[False]


def _trace(tokenizer, episode: Episode, values: list[float]) -> ValueTrace:
    wrong = [i for i, reward in enumerate(episode.step_rewards) if reward < 0]
    return {
        "prompt": tokenizer.decode(episode.prompt_ids, skip_special_tokens=True),
        "tokens": [tokenizer.decode([token]) for token in episode.action_ids],
        "values": values,
        "reward": episode.reward,
        "step_ends": [end + 1 for end in episode.step_ends],
        "first_wrong_step": wrong[0] if wrong else None,
    }


def data_findings(episodes: list[Episode]) -> dict[str, float]:
    """Counts of the responses that were trained on."""
    by_prompt: dict[int, set[bool]] = {}
    for e in episodes:
        by_prompt.setdefault(e.prompt_index, set()).add(e.label)
    lengths = [e.action_count for e in episodes]
    return {
        "rows": len(episodes),
        "problems": len(by_prompt),
        "share_correct": sum(e.label for e in episodes) / len(episodes),
        "mixed_prompts": sum(len(labels) == 2 for labels in by_prompt.values()),
        "mean_length": sum(lengths) / len(lengths),
        "max_length": max(lengths),
    }


def machine() -> Machine:
    """Versions and device, for the foot of a report."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads"
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
