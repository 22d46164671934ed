"""python -m benchmarks.gpu; what it does is said in run.py."""

import signal
import sys

from benchmarks.gpu.run import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends with it
    main()
