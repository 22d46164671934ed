"""Options that were given and change nothing in this run, so that nobody waits for their effect."""

from __future__ import annotations

import dataclasses

from dqo.config.options import Options

VALUE_OPTIONS = ["critic_learning_rate", "value_warmup_steps", "critic_lr_scheduler_type", "critic_max_grad_norm"]
VALUE_OPTIONS += ["critic_lr_scheduler_kwargs", "value_init", "value_input", "value_loss"]


def without_effect(options: Options, adapters: bool, held_out_given: bool) -> str:
    """One line that names each such option with the reason; "" when there is none. An option at its default is not named.

    Args:
        adapters: whether adapters are trained. held_out_given: whether there are rows to evaluate on beside the training rows.
    """
    config, objective = options.train, options.objective
    turned = objective.reads_rewards == "labels"  # a factor below 0 turns the order of rewards, and no label
    reasons = {
        "the method trains no value model": (objective.needs_values, VALUE_OPTIONS),
        "the value model is frozen": (not options.frozen_values, [*VALUE_OPTIONS, "value_coef"]),
        "no new value model is implicit": (objective.value_kind == "implicit", ["implicit_beta"]),
        "the method has no reference policy": (objective.needs_reference, ["ref_cache_dir"]),
        "no adapters are trained": (adapters, ["lora_r", "lora_alpha", "lora_target_modules"]),
        "the evaluation rows are given": (not held_out_given, ["eval_fraction"]),
        "eval_tasks is not given": (
            config.eval_tasks is not None,
            ["verifier", "num_generations", "max_completion_length"],
        ),
        "eval_tasks and eval_steps are not both given": (
            config.eval_tasks is not None and config.eval_steps > 0,
            ["eval_task_problems"],
        ),
        "step rewards are not used": (config.process_reward not in (None, "none"), ["process_coef"]),
        "report_to is none": (config.report_to != "none", ["run_name", "project"]),
        "the method does not read the size of rewards": (
            objective.reads_rewards == "size",
            ["normalize_rewards", "reward_shift", *["reward_scale"] * (turned or config.reward_scale > 0)],
        ),
    }
    why, unread = objective.idle()
    if unread:
        reasons[why] = (False, list(unread))
    values = options.flat()
    defaults = {field.name: field.default for part in (config, objective) for field in dataclasses.fields(part)}
    found = []
    for reason, (used, names) in reasons.items():
        idle = [n for n in names if n in options.sources and n in values and values[n] != defaults[n]]
        if idle and not used:
            found.append(f"{', '.join(idle)} ({reason})")
    return f"these options have no effect: {'; '.join(found)}" if found else ""
