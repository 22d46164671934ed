"""Memory of each of two processes that train a model and its critic under FSDP2, phase by phase.

    python -m benchmarks.trainer.sharded_memory RESULT.json [--layers 12] [--width 768] [--vocabulary 32000] [--untied]

A Llama of random weights and the default value model, DQO, two steps and a checkpoint, on CPUs by gloo. Figures of each phase:

tensors    the greatest sum of the storages of all tensors alive (benchmarks.harness.tensors)
peak       anonymous memory (RssAnon), sampled every 20 ms, less what the process had before: its packages. What allocators keep
           and what gloo copies for itself is in it

`share` is what a process keeps: its half of weights, gradients and AdamW's averages. `layer` and `table` are the weights of a
layer, and of the embeddings or the head.
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
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.environment import commit
from benchmarks.harness.tensors import Tensors
from dqo.config.options import load_options
from dqo.models.new import character_tokenizer, save
from dqo.train.run import begin

WORLD, MB = 2, 1e6
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


def work(rank: int, port: int, folder: str) -> None:
    environment = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": WORLD}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    flags = {
        "dataset_name": f"{folder}/rows.jsonl",
        "model_name_or_path": f"{folder}/model",
        "output_dir": f"{folder}/out",
    }
    flags |= {"max_steps": 2, "per_device_train_batch_size": 2, "eval_fraction": 0, "save_steps": 2}
    options = load_options([*(part for name, value in flags.items() for part in (f"--{name}", str(value))), "--fsdp"])
    peak, tensors = Peak(), Tensors()
    found: dict[str, dict[str, int]] = {"tensors_mb": {}, "peak_mb": {}}

    def over(phase: str) -> None:
        found["tensors_mb"][phase], found["peak_mb"][phase] = round(tensors.take() / MB, 1), peak.take()

    with tensors:
        trainer = begin(options)
        over("loading and reference pass")
        save_checkpoint = trainer.save

        def saving() -> None:
            over("two steps")
            save_checkpoint()
            over("checkpoint")

        trainer.save = saving  # type: ignore[method-assign]
        trainer.run("steps")
        peak.take(), tensors.take()
        trainer.finish()
        over("final models")
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def measured(width: int, layers: int, vocabulary: int | None = None, tied: bool = True) -> dict:
    """Sizes and figures in MB. `vocabulary`: None has the characters of the rows alone; `tied`: the table is the head too."""
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
    weights = 4 * sum(p.numel() for part in (model, model.model) for p in part.parameters())  # the critic has no head
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    table = 4 * model.lm_head.weight.numel()
    save(model, tokenizer, Path(folder, "model"))
    del model
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}", "reward": float(i % 2)} for i in range(16)]
    Path(folder, "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    context, port = multiprocessing.get_context("fork"), 20_000 + os.getpid() % 20_000
    children = [context.Process(target=work, args=(rank, port, folder)) for rank in range(WORLD)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)]
    shutil.rmtree(folder)
    return {
        "weights_mb": round(weights / MB, 1),
        "layer_mb": round(layer / MB, 1),
        "table_mb": round(table / MB, 1),
        "share_of_weights_mb": round(weights / WORLD / MB, 1),
        "share_mb": round(4 * weights / WORLD / MB, 1),
        **{
            figure: {f"process {rank}": phases[figure] for rank, phases in enumerate(found)}
            for figure in ("tensors_mb", "peak_mb")
        },
    }


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
    parser.add_argument("--name", default="now")
    arguments = parser.parse_args()
    there = json.loads(arguments.result.read_text()) if arguments.result.exists() else {}
    told = {"date": datetime.date.today().isoformat(), "commit": commit()}
    there[arguments.name] = told | measured(
        arguments.width, arguments.layers, arguments.vocabulary, not arguments.untied
    )
    arguments.result.write_text(json.dumps(there, indent=1) + "\n")
    print(json.dumps(there[arguments.name], indent=1))


if __name__ == "__main__":
    main()
