"""What a process makes when it first needs it: the parser of the options, and how transformers names weights. The server of
tests/dqo/forked.py imports it, so that its forks have both: they would spend a quarter of a tiny run on them."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dqo.config.options import load_options

get_checkpoint_conversion_mapping("llama")
load_options(["--dataset_name", "rows.jsonl", "--model_name_or_path", "model", "--use_cpu"])
