"""`dqo-train` in the processes of a launch, of which the second sends itself SIGTERM in the fifth step:

accelerate launch --multi_gpu --num_processes 2 -m tests.dqo.run_signalled --dataset_name ...
"""

import os
import signal

from dqo.commands.train import main
from dqo.train import loop

calls = []
accumulate = loop.accumulate


def counted(*arguments):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return accumulate(*arguments)


loop.accumulate = counted
main()
