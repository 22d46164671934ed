"""`dqo-train` in the processes of a launch, of which the second sends itself SIGTERM in the fifth step."""

import os
import signal

from dqo.commands import train
from dqo.train import loop


def main() -> None:
    calls = []
    accumulate = loop.accumulate

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*arguments)

    loop.accumulate = counted
    train.main()


if __name__ == "__main__":
    main()
