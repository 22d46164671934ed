"""Options of `dqo sample`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dqo.config.values import LEAST_TEMPERATURE


@dataclass(frozen=True)
class SampleConfig:
    """Sample responses of a model to prompts, as rollout rows without rewards. A run that was killed goes on where it was."""

    model_name_or_path: str | None = None
    """The model is a hub name or a directory: of a model, of an adapter, of a checkpoint, or the output_dir of a run."""
    prompts: str | None = None
    """The file has one object with a prompt a line (.jsonl or .parquet), or is a data set's name on the Hugging Face hub. A
    prompt is a string or a list of messages; answer, prompt_id, tools and chat_template_kwargs may stand beside it."""
    prefixes: str | None = None
    """In place of prompts: each row has a prompt and the beginning of a response to it, prefix (a string) or prefix_ids, which is
    continued."""
    output_file: str | None = None
    """The rows are written to this file (.jsonl)."""
    num_generations: int = 8
    """This many responses are sampled to each prompt."""
    temperature: float = 1.0
    """The logits are divided by this. 0 takes the most likely token each time."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability are sampled from."""
    top_k: int = 0
    """Only this many of the most likely tokens are sampled from; 0 takes all."""
    max_completion_length: int = 256
    """A response has at most this many tokens. Those of a prefix do not count."""
    seed: int = 0
    """Every response has a random stream of its own, which this seed, its prompt and its number name."""
    batch_size: int | None = None
    """This many responses are generated at once; None takes 64, and 4096 for vllm, which batches by itself inside of them."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """This package generates. vllm needs the extra of its name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The weights have this type. auto takes the one in which they are stored."""
    use_cpu: bool = False
    """The CPU generates although there is a GPU. It is an option of the backend transformers."""
    tensor_parallel_size: int | None = None
    """The model is split over this many GPUs. It is an option of the backend vllm, where None is 1."""
    gpu_memory_utilization: float | None = None
    """This share of a GPU's memory is used. It is an option of the backend vllm, where None is 0.9."""

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value out of range, and of values that exclude each other."""
        found = []

        def expect(fits: bool, name: str, what: str) -> None:
            if not fits:
                found.append((name, what))

        expect(self.model_name_or_path is not None, "model_name_or_path", "is missing: a model's directory or hub name")
        expect(
            self.prompts is not None or self.prefixes is not None, "prompts", "is missing: a file with a prompt a line"
        )
        expect(
            self.prompts is None or self.prefixes is None,
            "prefixes",
            "stands in the place of prompts; give one of them",
        )
        expect(self.output_file is not None, "output_file", "is missing: the file of rows to write, .jsonl")
        for name in ("num_generations", "max_completion_length", "batch_size", "tensor_parallel_size"):
            value = getattr(self, name)
            expect(value is None or value >= 1, name, f"must be at least 1, got {value}")
        for name in ("temperature", "top_k", "seed"):
            expect(getattr(self, name) >= 0, name, f"must be at least 0, got {getattr(self, name)}")
        expect(0 < self.top_p <= 1, "top_p", f"must be in (0, 1], got {self.top_p}")
        small = 0 < self.temperature < LEAST_TEMPERATURE
        expect(not small, "temperature", f"must be 0 or at least {LEAST_TEMPERATURE}, got {self.temperature}")
        if self.temperature == 0:
            repeated = "must be 1 at temperature 0, which gives a prompt the same response each time"
            expect(self.num_generations == 1, "num_generations", f"{repeated}; got {self.num_generations}")
            for name, whole in (("top_p", 1.0), ("top_k", 0)):
                expect(getattr(self, name) == whole, name, "has no effect at temperature 0; leave it out")
        share = self.gpu_memory_utilization
        expect(share is None or 0 < share <= 1, "gpu_memory_utilization", f"must be in (0, 1], got {share}")
        if self.backend != "vllm":
            for name in ("tensor_parallel_size", "gpu_memory_utilization"):
                expect(
                    getattr(self, name) is None,
                    name,
                    "is an option of the backend vllm; add --backend vllm, or leave it out",
                )
        else:
            expect(not self.use_cpu, "use_cpu", "is an option of the backend transformers; leave it out")
        return found
