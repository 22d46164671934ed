"""Objectives: a frozen dataclass each, whose fields are its flags and whose call is plain torch on packed statistics.

    loss_sum, metrics = objective(stats, rows, cu_seqlens)

`stats` is a TokenStats of N response tokens; `rows` holds (N,) columns: rewards, label (1 on every row of a response that
counts as correct), and where there are such ref_logprobs, ref_lse, behavior_logprobs, values (live), bootstrap (V of the last
state of a response that was cut, on its last row), target_values (of the value model's moving average), companion_mean (below).
`loss_sum` is a sum over the units of the loss, `metrics` maps names to (2,) tensors [sum, count], so that micro-batches and
ranks add; the trainer alone divides, by the global count of units. An objective declares

    unit             "token", "sequence" or "pair" (then episodes alternate chosen, rejected): what the loss sums over
    needs_reference  it reads ref_logprobs
    needs_values     it reads values of a value model, of the kind that its option value_model names
    needs_kl         it reads stats.kl, the exact KL(pi || ref) of every row, differentiable: the reference stays in memory
    needs_contrast   equal rewards everywhere leave it nothing to learn
    prepare(episodes) -> episodes       which responses it trains on, and in which order they are coupled

`prepare` may set `episode.companion`: another response to the same prompt, whose statistics the step needs without a gradient.
Its objective has `companion_sums(stats, rows, cu_seqlens) -> (2,)`, [sum, count] over companions. Those of a whole optimizer
step, all micro-batches and ranks, are added before its first loss; their mean is the column companion_mean, the same on every
row. So the loss does not depend on the split into micro-batches.

None of these files imports torch before it is called: `--help` and the checks of the flags stay fast.
"""

from dqo.objectives.dpo import DPO
from dqo.objectives.dqo import DQO
from dqo.objectives.dro import DRO
from dqo.objectives.kto import KTO
from dqo.objectives.oreo import OREO
from dqo.objectives.rft import RFT
from dqo.objectives.sft import SFT

OBJECTIVES = {"dqo": DQO, "sft": SFT, "rft": RFT, "dpo": DPO, "kto": KTO, "dro": DRO, "oreo": OREO}
UNIT_EPISODES = {"token": 1, "sequence": 1, "pair": 2}  # episodes that stay together in a batch
