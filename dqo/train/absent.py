"""What users of transformers' and TRL's trainers may look for in DQOTrainer, and why it is not there."""

from __future__ import annotations

ABSENT = {
    "hyperparameter_search": "run DQOTrainer once for each set of options",
    "compute_loss": "the loss is the objective's: DQOConfig(method=YourObjective), or use dqo_kernels in a loop of your own",
    "training_step": "a step is made of micro-batches whose loss is divided once; use callbacks, or a loop of your own",
    "prediction_step": "use predict, or compute_metrics",
    "get_train_dataloader": "a step's responses come from an index of the rows, not from a DataLoader",
    "get_eval_dataloader": "a step's responses come from an index of the rows, not from a DataLoader",
    "get_test_dataloader": "a step's responses come from an index of the rows, not from a DataLoader",
    "create_optimizer": "both optimizers are AdamW with the options adam_*, weight_decay and the learning rates",
    "create_scheduler": "the schedule is lr_scheduler_type with warmup_steps",
    "create_optimizer_and_scheduler": "both optimizers are AdamW, and the schedule is lr_scheduler_type",
    "optimizer": "there are two, of policy and value model; callbacks get the policy's",
    "lr_scheduler": "the schedule is a function of the step: lr_scheduler_type and warmup_steps",
    "data_collator": "rows are tokenised and batched as their columns say",
    "tokenizer": "it is processing_class",
    "log_metrics": "train and evaluate return their metrics, and metrics.jsonl has them",
    "save_metrics": "train and evaluate return their metrics, and metrics.jsonl has them",
    "metrics_format": "train and evaluate return their metrics as numbers",
    "init_hf_repo": "push_to_hub makes the repository",
}
