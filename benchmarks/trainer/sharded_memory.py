"""Memory of one process, and of each of two under FSDP2, that train a model and its critic, phase by phase.

    python -m benchmarks.trainer.sharded_memory RESULT.json [--layers 12] [--width 768] [--vocabulary 32000] [--untied]
    python -m benchmarks.trainer.sharded_memory RESULT.json --layers 24 --vocabulary 32000 --untied --processes 2 1 --name "1 GB"

A Llama of random weights and a value model of its own, DQO, two steps of 4 responses and a checkpoint, on CPUs by gloo. The
second is a model of 1.1 GB: with 16 bytes for each weight of policy and critic one process wants 10 GB, and so do two. Figures of
each phase:

tensors    the greatest sum of the storages of all tensors alive (benchmarks.harness.tensors)
peak       anonymous memory (RssAnon), sampled every 20 ms, less what the process had before: its packages. What allocators keep
           and what gloo copies for itself is in it

`share` is what a process keeps: its part of weights, gradients and AdamW's averages. `layer` and `table` are the weights of a
layer, and of the embeddings or the head. `beyond_share_mb` is what tensors took in the steps beside the share, and `made_of_mb`
the greatest sum of the steps by what it was. `losses` are those of the two steps, and `weights_differ` the greatest difference
between the weights that one and two processes trained, where both ran.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.environment import commit
from benchmarks.harness.tensors import Tensors
from dqo.config.options import load_options
from dqo.models.new import character_tokenizer, save
from dqo.train.run import begin

RESPONSES, MB = 4, 1e6  # of a step
TEXT = "0123456789+=*"
# glibc keeps what is freed for later; so it gives it back, and memory is what is in use
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def anonymous() -> float:
    """Bytes that are this process's own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Peak:
    """The greatest memory since the last `take`, over that of the beginning."""

    def __init__(self):
        self.first = self.most = anonymous()
        self.changing = threading.Lock()  # else the greatest memory of one phase is written back into the next
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            with self.changing:
                self.most = max(self.most, anonymous())
            time.sleep(0.02)

    def take(self) -> float:
        with self.changing:
            found = (max(self.most, anonymous()) - self.first) / MB
            self.most = anonymous()
        return round(found)


def work(rank: int, world: int, port: int, folder: str) -> None:
    environment = {"ACCELERATE_USE_CPU": "true"}
    if world > 1:
        environment |= {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    flags = {
        "dataset_name": f"{folder}/rows.jsonl",
        "model_name_or_path": f"{folder}/model",
        "output_dir": f"{folder}/out-{world}",
        "value_model": "separate",
    }
    flags |= {"max_steps": 2, "per_device_train_batch_size": RESPONSES // world, "eval_fraction": 0, "save_steps": 2}
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    options = load_options([*words, "--logging_steps", "1", *(["--fsdp"] if world > 1 else [])])
    peak, tensors = Peak(), Tensors(parts=True)
    found: dict[str, dict[str, float]] = {"tensors_mb": {}, "peak_mb": {}}

    def over(phase: str) -> None:
        found["tensors_mb"][phase], found["peak_mb"][phase] = round(tensors.take() / MB, 1), peak.take()

    with tensors:
        begun = time.monotonic()
        trainer = begin(options)
        over("loading and reference pass")
        save_checkpoint = trainer.save

        def saving() -> None:
            made_of = {name: round(size / MB, 1) for name, size in tensors.parts.most_common() if size >= 0.05 * MB}
            over("two steps")
            found["made_of_mb"] = made_of
            save_checkpoint()
            over("checkpoint")

        trainer.save = saving  # type: ignore[method-assign]
        trainer.run("steps")
        peak.take(), tensors.take()
        trainer.finish()
        over("final models")
    found["seconds"] = {"all": round(time.monotonic() - begun), "steps": round(trainer.counters["train_seconds"], 1)}
    Path(folder, f"{world}-{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def run(world: int, folder: str) -> dict:
    """Figures of each process, and the losses of the steps."""
    context, port = multiprocessing.get_context("fork"), 20_000 + os.getpid() % 20_000
    children = [context.Process(target=work, args=(rank, world, port, folder)) for rank in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    found = [json.loads(Path(folder, f"{world}-{rank}.json").read_text()) for rank in range(world)]
    for checkpoint in Path(folder, f"out-{world}").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # several times the model
    rows = [json.loads(line) for line in Path(folder, f"out-{world}", "metrics.jsonl").read_text().splitlines()]
    losses = {"losses": [row["loss"] for row in rows if "loss" in row]}
    figures = ("tensors_mb", "peak_mb", "made_of_mb", "seconds")
    return {name: {f"process {rank}": one[name] for rank, one in enumerate(found)} for name in figures} | losses


def differ(folder: str, worlds: list[int]) -> float:
    """The greatest difference between weights of the final policies."""
    files = [safe_open(Path(folder, f"out-{world}", "model.safetensors"), "pt") for world in worlds]
    names = files[0].keys()
    return max((files[0].get_tensor(name) - files[1].get_tensor(name)).abs().max().item() for name in names)


def measured(
    width: int, layers: int, vocabulary: int | None = None, tied: bool = True, worlds: Sequence[int] = (2,)
) -> dict:
    """Sizes and figures in MB.

    Args:
        vocabulary: None has the characters of the rows alone.
        tied: the table is the head too.
        worlds: how many processes train it, one number after the other.
    """
    torch.set_num_threads(1)  # threads do not survive a fork
    tokenizer = character_tokenizer(TEXT)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tempfile.mkdtemp()
    model = LlamaForCausalLM(config)
    model_size, trunk = (4 * sum(p.numel() for p in part.parameters()) for part in (model, model.model))
    weights = model_size + trunk  # the critic has no head
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    table = 4 * model.lm_head.weight.numel()
    save(model, tokenizer, Path(folder, "model"))
    del model
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}", "reward": float(i % 2)} for i in range(16)]
    Path(folder, "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    runs = {world: run(world, folder) for world in worlds}
    for world, its_run in runs.items():
        steps = [phases["two steps"] for phases in its_run["tensors_mb"].values()]
        its_run["share_of_weights_mb"] = round(weights / world / MB, 1)
        its_run["share_mb"] = round(4 * weights / world / MB, 1)
        its_run["beyond_share_mb"] = round(max(steps) - 4 * weights / world / MB, 1)
    found = {f"{world} processes" if world > 1 else "1 process": its_run for world, its_run in runs.items()}
    if len(worlds) == 2:
        found["weights_differ"] = differ(folder, list(worlds))
    shutil.rmtree(folder)
    sizes = {"model_mb": model_size, "weights_mb": weights, "layer_mb": layer, "table_mb": table}
    return {name: round(size / MB, 1) for name, size in sizes.items()} | found


def main() -> None:
    if any(name not in os.environ for name in ALLOCATOR):  # read when a program begins
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.trainer.sharded_memory", *sys.argv[1:]],
            os.environ | ALLOCATOR,
        )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], choices=(1, 2))
    parser.add_argument("--name", default="now")
    arguments = parser.parse_args()
    there = json.loads(arguments.result.read_text()) if arguments.result.exists() else {}
    told = {"date": datetime.date.today().isoformat(), "commit": commit()}
    there[arguments.name] = told | measured(
        arguments.width, arguments.layers, arguments.vocabulary, not arguments.untied, arguments.processes
    )
    arguments.result.write_text(json.dumps(there, indent=1) + "\n")
    print(json.dumps(there[arguments.name], indent=1))


if __name__ == "__main__":
    main()
