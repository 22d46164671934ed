"""How weights are updated: the optimizer, its learning rates over the steps, and where its states lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# "constant", "linear" and "cosine" are this trainer's own; all others are transformers', with its warm-up.
Schedule = Literal[
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class OptimizerOptions:
    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    """The optimizer is AdamW. adamw_8bit keeps its averages in 8 bits, a quarter of the memory, and needs the package
    bitsandbytes."""
    lr_scheduler_type: Schedule = "cosine"
    """The learning rates follow this schedule of transformers. constant, linear and cosine have a warm-up that begins above
    0."""
    lr_scheduler_kwargs: tuple[str, ...] | None = None
    """The schedule has these arguments of transformers, such as min_lr_rate=0.1 for cosine_with_min_lr, or num_decay_steps=0.2
    for warmup_stable_decay. A number of steps below 1 is a share of all steps."""
    critic_lr_scheduler_type: Schedule | None = None
    """The value model's learning rate follows this schedule after the warm-up. None takes lr_scheduler_type, with its
    arguments."""
    critic_lr_scheduler_kwargs: tuple[str, ...] | None = None
    """The schedule of critic_lr_scheduler_type has these arguments."""
    warmup_steps: float = 0
    """The learning rates rise linearly over this many steps. A number below 1 is a share of all steps."""
    weight_decay: float = 0.0
    """AdamW decays the weights of matrices at this rate."""
    adam_beta1: float = 0.9
    """AdamW averages gradients with this decay."""
    adam_beta2: float = 0.999
    """AdamW averages squared gradients with this decay."""
    adam_epsilon: float = 1e-8
    """AdamW adds this to the root of the averaged squared gradients."""
    max_grad_norm: float = 1.0
    """The gradients of the policy and of the value model are each clipped to this norm."""
    critic_max_grad_norm: float | None = None
    """The gradients of the value model are clipped to this norm. None takes max_grad_norm."""
    fsdp: bool = False
    """Weights, gradients and optimizer states are sharded over the processes (FSDP2), as accelerate launch --use_fsdp does."""
    fsdp_cpu_offload: bool = False
    """The shards of fsdp lie in main memory, and the optimizer works there. A layer is on the device only while it computes."""

    def schedule_of(self, model: str) -> tuple[str, tuple[str, ...]]:
        """(name, arguments) of the schedule of "policy" or "critic"."""
        if model == "critic" and self.critic_lr_scheduler_type is not None:
            return self.critic_lr_scheduler_type, self.critic_lr_scheduler_kwargs or ()
        return self.lr_scheduler_type, self.lr_scheduler_kwargs or ()

    def optimizer_problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) of every value that does not fit the others here."""
        wrong = []
        if self.optim != "adamw" and self.fsdp:
            wrong.append(("optim", "must be adamw with fsdp, whose shards bitsandbytes does not know"))
        if self.fsdp_cpu_offload and not self.fsdp:
            wrong.append(("fsdp_cpu_offload", "must be False without fsdp, whose shards it moves"))
        if self.critic_lr_scheduler_kwargs and self.critic_lr_scheduler_type is None:
            wrong.append(("critic_lr_scheduler_kwargs", "must be None without critic_lr_scheduler_type"))
        for name in ("lr_scheduler_kwargs", "critic_lr_scheduler_kwargs"):
            for text in getattr(self, name) or ():
                if "=" not in text:
                    wrong.append((name, f"must be name=value, got {text!r}"))
        return wrong


def argument_values(texts: tuple[str, ...]) -> dict[str, Any]:
    """{"min_lr_rate": 0.1} of ("min_lr_rate=0.1",): whole numbers, other numbers, words."""
    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        for kind in (int, float, str):
            try:
                found[name.strip()] = kind(value.strip())
                break
            except ValueError:
                continue
    return found
