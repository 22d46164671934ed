"""Memory of each of two processes that train a model and its critic under FSDP2, phase by phase.

    python -m benchmarks.trainer.sharded_memory RESULT.json [--layers 12] [--width 768]

A Llama of random weights and the default value model, DQO, two steps and a checkpoint, on CPUs by gloo. The memory is anonymous
memory (RssAnon), sampled every 20 ms, less what the process had before: its packages. `share` is what a process keeps: its half
of weights, gradients and AdamW's averages. `layer` is the largest set of weights that is gathered at once.
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
        self.lock = threading.Lock()  # or the watch puts a maximum back that was taken
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            with self.lock:
                self.most = max(self.most, anonymous())
            time.sleep(0.02)

    def take(self) -> float:
        with self.lock:
            found, self.most = (max(self.most, anonymous()) - self.first) / MB, anonymous()
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
    peak = Peak()
    trainer = begin(options)
    phases = {"loading and reference pass": peak.take()}
    save_checkpoint, saved = trainer.save, {}

    def saving() -> None:
        saved["two steps"] = peak.take()
        save_checkpoint()
        saved["checkpoint"] = peak.take()

    trainer.save = saving  # type: ignore[method-assign]
    trainer.run("steps")
    phases |= saved
    peak.take()
    trainer.finish()
    phases["final models"] = peak.take()
    Path(folder, f"{rank}.json").write_text(json.dumps(phases))
    os._exit(0)


def measured(width: int, layers: int) -> dict:
    torch.set_num_threads(1)  # threads do not survive a fork
    tokenizer = character_tokenizer(TEXT)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tempfile.mkdtemp()
    model = LlamaForCausalLM(config)
    weights = 2 * 4 * sum(p.numel() for p in model.parameters())  # the critic's trunk is as large
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
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
        "weights_mb": round(weights / MB),
        "layer_mb": round(layer / MB),
        "share_of_weights_mb": round(weights / WORLD / MB),
        "share_mb": round(4 * weights / WORLD / MB),
        "peak_mb": {f"process {rank}": phases for rank, phases in enumerate(found)},
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
    parser.add_argument("--name", default="now")
    arguments = parser.parse_args()
    there = json.loads(arguments.result.read_text()) if arguments.result.exists() else {}
    told = {"date": datetime.date.today().isoformat(), "commit": commit()}
    there[arguments.name] = told | measured(arguments.width, arguments.layers)
    arguments.result.write_text(json.dumps(there, indent=1) + "\n")
    print(json.dumps(there[arguments.name], indent=1))


if __name__ == "__main__":
    main()
