"""Where a run's rows go: to callbacks, metrics.jsonl, the tracker and the progress bar, with the pace since the last one."""

from __future__ import annotations

import time
from pathlib import Path

from tqdm import tqdm

from dqo.config.options import Options
from dqo.models import memory
from dqo.processes import Processes
from dqo.train import metrics
from dqo.train.callbacks import Callbacks
from dqo.train.trackers import Trackers
from dqo.train.watch import Watch


class Recorder:
    """`counters` say where metrics.jsonl goes on, and of which content. Only the first process writes."""

    def __init__(self, options: Options, processes: Processes, callbacks: Callbacks, counters: dict, watch: Watch):
        self.options, self.processes, self.callbacks = options, processes, callbacks
        self.watch = watch
        self.open(counters)

    def open(self, counters: dict) -> None:
        """Goes on where `counters` say."""
        self.closed = False
        self.file = None
        if self.processes.main:
            position, crc32 = counters["metrics_position"], counters.get("metrics_crc32")
            self.file = metrics.MetricsFile(Path(self.options.train.output_dir) / "metrics.jsonl", position, crc32)
        self.trackers = Trackers(self.options, self.processes)

    def record(self, row: dict, evaluation: bool = False) -> None:
        """A row to the callbacks, which may add to it, then to metrics.jsonl and the tracker."""
        step = row["step"]
        if self.options.train.shuffle_rewards:
            row["control/shuffle_rewards"] = 1.0  # whoever reads the row alone must know
        self.callbacks.log(row)
        if evaluation:
            self.callbacks.evaluated(row)
        row |= metrics.plain(row) | {"step": step}
        if self.file is not None:
            self.file.write(row)
        self.trackers.log(row)

    def start(self, counters: dict) -> None:
        """Begins to measure the pace."""
        self.mark, self.at_mark = time.perf_counter(), dict(counters)

    def record_steps(self, counters: dict, epoch: float, means: dict, bar: tqdm) -> None:
        """A row of the steps since the last one; warns where it gives reason to."""
        now = time.perf_counter()
        row = {"step": counters["step"], "epoch": epoch, **means, "num_tokens": counters["num_tokens"]}
        row |= {name: counters[name] for name in ("queries", "pseudo_labels") if name in counters}
        row["perf/tokens_per_second"] = (counters["num_tokens"] - self.at_mark["num_tokens"]) / (now - self.mark)
        row["perf/step_time"] = (now - self.mark) / (counters["step"] - self.at_mark["step"])
        row["perf/peak_memory_gb"] = memory.peak_gb()
        self.record(row)
        for warning in self.watch.warnings(row):
            self.processes.say(f"WARNING: {warning}")
        bar.set_postfix_str(metrics.on_the_bar(row))
        self.mark, self.at_mark = now, dict(counters)

    def position(self) -> dict[str, int]:
        """Of the next row in metrics.jsonl, and the checksum of the rows before it; nothing in processes that do not write."""
        if self.file is None:
            return {}
        return {"metrics_position": self.file.position(), "metrics_crc32": self.file.crc32}

    def end(self) -> None:
        """Of a run that is finished."""
        for warning in self.watch.at_end():
            self.processes.say(f"WARNING: {warning}")
        self.close()

    def close(self) -> None:
        self.closed = True
        if self.file is not None:
            self.file.close()
        self.trackers.close()
