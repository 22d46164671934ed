"""DQO in a transformers.Trainer: one method overridden, nothing else of ours but the loss.

    python examples/transformers_trainer.py --model DIR_OR_HUB_NAME --data rollouts.jsonl --output_dir out

Values are soft values, beta * (logsumexp of the policy - logsumexp of the reference): no value model is needed.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dqo_kernels import soft_bellman_loss


class DQOLossTrainer(Trainer):
    def __init__(self, *args, beta: float = 0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta = beta
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rewards, labels = inputs.pop("rewards")[:, 1:], inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]  # logits[:, t] predicts the token after position t
        with torch.no_grad():
            ref_logits = self.reference(**inputs).logits[:, :-1]
        mask = labels != -100
        out = soft_bellman_loss(
            logits,
            labels.where(mask, 0),
            rewards,
            ref_logits=ref_logits,
            mask=mask,
            beta=self.beta,
            is_level="none",  # the data need not be the reference's own samples
            reduction="sum",
        )
        loss = out.loss / (mask.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, out) if return_outputs else loss


def tokenized(path: str, tokenizer) -> list[dict]:
    """Prompt and completion tokenised apart; the outcome reward is paid on the EOS."""
    rows = []
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rewards = [0.0] * (len(prompt) + len(completion))
        rewards[-1] = float(row["reward"])
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion, "rewards": rewards})
    return rows


def padded(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """Masks come from lengths, never from ids: EOS may be the pad token."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name, fill):
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    batch = {
        "input_ids": column("input_ids", pad_id),
        "labels": column("labels", -100),
        "rewards": column("rewards", 0.0),
    }
    batch["attention_mask"] = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    )
    return batch


def main(model: str, data: str, output_dir: str, **options) -> list[dict]:
    """Trains, saves, and returns the log."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-5, "logging_steps": 10, "report_to": "none"}
    settings |= {"remove_unused_columns": False} | options
    trainer = DQOLossTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=TrainingArguments(output_dir=output_dir, **settings),
        train_dataset=tokenized(data, tokenizer),
        data_collator=lambda rows: padded(rows, pad_id),
    )
    trainer.train()
    trainer.save_model(output_dir)
    return trainer.state.log_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--model", "--data", "--output_dir"):
        parser.add_argument(name, required=True)
    print(main(**vars(parser.parse_args()))[-1])
