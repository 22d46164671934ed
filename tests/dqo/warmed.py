"""What a process makes or imports when it first needs it: the parser of the options, how transformers names weights, matplotlib.
The server of tests/dqo/forked.py imports this, so that its forks have it: they would spend more than half of a tiny run on it."""

import matplotlib.axes
import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dqo.config.options import load_options

get_checkpoint_conversion_mapping("llama")
load_options(["--dataset_name", "rows.jsonl", "--model_name_or_path", "model", "--use_cpu"])
