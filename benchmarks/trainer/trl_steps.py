"""The losses of TRL's DPOTrainer and KTOTrainer on episodes of ours, whose reference log-probabilities are given.

A trainer needs a tokenizer and a dataset at its construction: here two words, and one row that is never trained on. It changes
its model: `model(..., fused_lm_head=True)` then gives log-probabilities.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from dqo.data.batches import collate
from dqo.data.episode import Episode
from dqo.objectives import DPO, KTO


def _loss(trainer_class, options_class, model, row: dict, **options) -> Callable[[dict], Tensor]:
    """compute_loss of a trainer for `model`: loss = f(batch)."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    with tempfile.TemporaryDirectory() as directory:
        arguments = options_class(
            directory,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=model.device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        rows = datasets.Dataset.from_dict({name: [value] for name, value in row.items()})
        trainer = trainer_class(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.model.train()
    return lambda batch: trainer.compute_loss(trainer.model, batch)


def dpo_loss(model, objective: DPO) -> Callable[[dict], Tensor]:
    from trl import DPOConfig, DPOTrainer

    row = {"prompt": "<pad>", "chosen": "<pad>", "rejected": "<pad>"}
    kinds = ["sigmoid_norm" if objective.length_normalized else objective.loss_type]
    weights = [1.0]
    if objective.rpo_alpha:  # there a mean over the tokens of all better responses: equal where these have one length
        kinds, weights = [*kinds, "sft"], [1.0, objective.rpo_alpha]
    options = {"loss_type": kinds, "loss_weights": weights, "label_smoothing": objective.label_smoothing}
    return _loss(DPOTrainer, DPOConfig, model, row, beta=objective.beta, **options)


def kto_loss(model, objective: KTO) -> Callable[[dict], Tensor]:
    from trl import KTOConfig, KTOTrainer

    weights = {"desirable_weight": objective.desirable_weight, "undesirable_weight": objective.undesirable_weight}
    row = {"prompt": "<pad>", "completion": "<pad>", "label": True}
    return _loss(KTOTrainer, KTOConfig, model, row, beta=objective.beta, **weights)


def _inputs(episodes: list[Episode], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Padded inputs, and (B,) sums of the reference's log-probabilities."""
    input_ids = collate(episodes, 0, device).input_ids
    completion = torch.zeros_like(input_ids)
    for row, episode in zip(completion, episodes):
        row[len(episode.prompt_ids) : episode.length] = 1
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "completion_mask": completion}
    return inputs, torch.tensor([float(episode.ref_logprobs.sum()) for episode in episodes], device=device)


def dpo_order(episodes: list[Episode]) -> list[Episode]:
    """TRL's: all chosen, then all rejected."""
    return episodes[0::2] + episodes[1::2]


def dpo_batch(episodes: list[Episode], device: torch.device) -> dict[str, Tensor]:
    """Of chosen, rejected, chosen, rejected, ..."""
    inputs, sums = _inputs(dpo_order(episodes), device)
    chosen, rejected = sums.chunk(2)
    return inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def kto_batch(episodes: list[Episode], device: torch.device) -> dict[str, Tensor]:
    """Its KL completions are the companions."""
    inputs, sums = _inputs(episodes, device)
    companions, companion_sums = _inputs([episode.companion for episode in episodes], device)
    inputs |= {f"KL_{name}": value for name, value in companions.items()}
    label = torch.tensor([episode.label for episode in episodes], device=device)
    return inputs | {"label": label, "ref_logps": sums, "ref_KL_logps": companion_sums}
