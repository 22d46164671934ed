"""Objectives: a frozen dataclass each, whose fields are its flags and whose call is plain torch on packed statistics.

    loss_sum, metrics = objective(stats, rows, cu_seqlens)

`stats` is a TokenStats of N response tokens; `rows` holds (N,) columns: rewards, label (1 on every row of a response that
counts as correct), and where there are such ref_logprobs, ref_lse, behavior_logprobs, values (live), bootstrap (on the last
row). `loss_sum` is a sum over the units of the loss, `metrics` maps names to (2,) tensors [sum, count], so that micro-batches
and ranks add; the trainer alone divides, by the global count of units. An objective declares

    unit             "token", "sequence" or "pair" (then episodes alternate chosen, rejected): what the loss sums over
    needs_reference  it reads ref_logprobs
    needs_values     it reads values of a value model
    prepare(episodes) -> episodes       which responses it trains on, and in which order they are coupled

None of these files imports torch before it is called: `--help` and the checks of the flags stay fast.
"""

from dqo.objectives.dpo import DPO
from dqo.objectives.dqo import DQO
from dqo.objectives.rft import RFT
from dqo.objectives.sft import SFT

OBJECTIVES = {"dqo": DQO, "sft": SFT, "rft": RFT, "dpo": DPO}
UNIT_EPISODES = {"token": 1, "sequence": 1, "pair": 2}  # episodes that stay together in a batch
