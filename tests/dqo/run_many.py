"""Several training runs in the processes of one launch, from a JSON list of argument lists."""

import json
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor

from dqo.config.options import load_options
from dqo.train.run import begin, run_of


def main() -> None:
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        trainer = begin(load_options(arguments))
        sharded = all(isinstance(p, DTensor) for p in trainer.learner.parameters())
        held_out = trainer.run("run")
        trainer.finish()
        run = run_of(trainer, held_out)
        if trainer.processes.main:
            found = {"world": trainer.processes.world, "sharded": sharded, "held_out": run.held_out}
            (run.output_dir / "found.json").write_text(json.dumps(found))
    trainer.processes.leave()
    trainer.processes.end()


if __name__ == "__main__":
    main()
