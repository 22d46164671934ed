"""tensorboard, wandb and trackio, through accelerate; metrics.jsonl is written in any case."""

from __future__ import annotations

import os
from pathlib import Path

from dqo.config.options import Options
from dqo.files import writing
from dqo.processes import Processes


class Trackers:
    """Gets every row of metrics.jsonl. Does nothing with report_to none, and in all processes but the first."""

    def __init__(self, options: Options, processes: Processes):
        self.accelerator = None
        config = options.train
        self.directory = Path(config.output_dir)
        if config.report_to == "none":
            return
        from accelerate import Accelerator

        self.accelerator = Accelerator(
            cpu=processes.device.type == "cpu", log_with=config.report_to, project_dir=config.output_dir
        )
        plain = {n: v if isinstance(v, (int, float, str, bool)) else str(v) for n, v in options.flat().items()}
        run = config.run_name or Path(config.output_dir).resolve().name
        project = config.project or os.environ.get("WANDB_PROJECT") or "dqo"
        if config.report_to == "tensorboard":  # has no projects: its directory is output_dir/run
            project = run
        self.accelerator.init_trackers(project, plain, {"wandb": {"name": run}, "trackio": {"name": run}})

    def log(self, row: dict) -> None:
        if self.accelerator is not None:
            with writing(self.directory):
                self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        if self.accelerator is not None:
            with writing(self.directory):
                self.accelerator.end_training()
