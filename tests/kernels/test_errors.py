"""Every wrong argument raises ValueError with a message that names it, says what came and what was expected.
Nothing wrong is computed in silence."""

import pytest
import torch

import dqo_kernels
from tests.kernels.oracle import padded, random_batch

N, V, B, D = 9, 6, 4, 3
BATCH = random_batch(0, (3, 1, 0, 5), V)
MASK = torch.arange(5) < torch.tensor([3, 1, 0, 5])[:, None]
ONES = torch.ones(N, dtype=torch.float64)
META = torch.zeros(N, dtype=torch.float64, device="meta")


def boundaries(*ends):
    return torch.tensor(ends)


SCAN = {"rewards": BATCH.rewards, "values": BATCH.values, "cu_seqlens": BATCH.cu_seqlens}
ROWS = dict(logprobs=BATCH.logprobs, ref_logprobs=BATCH.ref_logprobs, **SCAN)
STATS = {"logits": BATCH.logits, "actions": BATCH.actions, "ref_logits": BATCH.ref_logits}
LOSS = dict(**STATS, **SCAN)
PADDED = {
    "logits": padded(BATCH.logits, MASK), "actions": padded(BATCH.actions, MASK),
    "rewards": padded(BATCH.rewards, MASK),
    "values": padded(BATCH.values, MASK), "ref_logits": padded(BATCH.ref_logits, MASK), "mask": MASK,
}  # fmt: skip
LINEAR = {
    "hidden": torch.ones(N, D).double(), "weight": torch.ones(V, D).double(), "actions": BATCH.actions,
    "ref_hidden": torch.ones(N, D).double(), "ref_weight": torch.ones(V, D).double(),
}  # fmt: skip
LINEAR_LOSS = dict(**LINEAR, **SCAN)
ROW_LOSS = dict(
    **LINEAR,
    row_loss=lambda stats, rows, cu: (stats.logprobs.sum(), {}),
    cu_seqlens=BATCH.cu_seqlens,
    rows={},
)

BOUNDARIES = [
    ({"cu_seqlens": boundaries(0, 3, 4, 8)}, r"cu_seqlens.*9.*8"),
    ({"cu_seqlens": boundaries(1, 3, 4, 9)}, r"cu_seqlens.*start at 0.*1"),
    ({"cu_seqlens": boundaries(0, 5, 3, 9)}, r"cu_seqlens.*decrease.*5, 3"),
    ({"cu_seqlens": torch.tensor([0.0, 9.0])}, r"cu_seqlens.*integer.*float32"),
    ({"cu_seqlens": torch.tensor([[0, 9]])}, r"cu_seqlens.*\(B\+1,\).*\(1, 2\)"),
    ({"cu_seqlens": [0, 9]}, r"cu_seqlens.*tensor.*list"),
    ({"cu_seqlens": torch.tensor([], dtype=torch.long)}, r"cu_seqlens.*\(B\+1,\).*\(0,\)"),
]
ACTIONS = [
    ({"actions": torch.full((N,), V)}, r"actions.*\[0, 6\).*6"),
    ({"actions": torch.full((N,), -1)}, r"actions.*\[0, 6\).*-1"),
    ({"actions": ONES}, r"actions.*integer.*float64"),
    ({"actions": BATCH.actions[:5]}, r"actions.*\(9,\).*\(5,\)"),
    ({"actions": [1] * N}, r"actions.*tensor.*list"),
]
STATISTICS = [
    ({"temperature": 0.0}, r"temperature.*positive.*0"),
    ({"temperature": -1.0}, r"temperature.*positive.*-1"),
    ({"temperature": 0 * ONES}, r"temperature.*positive.*0"),
    ({"temperature": torch.tensor(0.0)}, r"temperature.*positive.*0"),
    ({"temperature": ONES[:4]}, r"temperature.*\(9,\).*\(4,\)"),
    ({"temperature": float("nan")}, r"temperature.*positive.*nan"),
    ({"softcap": 0.0}, r"softcap.*positive.*0"),
    ({"softcap": -3.0}, r"softcap.*positive.*-3"),
    ({"backend": "fast"}, r"backend.*reference.*fast"),
]
SCALARS = [
    ({"gamma": 1.5}, r"gamma.*\[0, 1\].*1.5"),
    ({"lam": -0.1}, r"lam.*\[0, 1\].*-0.1"),
    ({"lam": 1.1}, r"lam.*\[0, 1\].*1.1"),
    ({"lam": float("nan")}, r"lam.*\[0, 1\].*nan"),
    ({"bootstrap": ONES}, r"bootstrap.*\(4,\).*\(9,\)"),
]
OPTIONS = [
    ({"beta": 0.0}, r"beta.*positive.*0"),
    ({"beta": -0.1}, r"beta.*positive.*-0.1"),
    ({"policy_target": "mc"}, r"policy_target.*return, td, one_step.*'mc'"),
    ({"target": "ema"}, r"target.*detach, residual.*'ema'"),
    ({"is_level": "sequence"}, r"is_level.*trajectory, suffix, prefix, token, none.*'sequence'"),
    ({"reduction": "batchmean"}, r"reduction.*mean, sum, none.*'batchmean'"),
    ({"is_cap": 0.0, "is_floor": 1.0}, r"is_floor.*is_cap = 0.*1"),
    ({"target": "residual", "target_values": ONES}, r"target_values.*None.*residual"),
    ({"target_values": ONES[:3]}, r"target_values.*\(9,\).*\(3,\)"),
    ({"behavior_logprobs": ONES[:3]}, r"behavior_logprobs.*\(9,\).*\(3,\)"),
    ({"behavior_logprobs": ONES.long()}, r"behavior_logprobs.*floating.*int64"),
    ({"rewards": ONES[:3]}, r"rewards.*\(9,\).*\(3,\)"),
    ({"rewards": ONES.long()}, r"rewards.*floating.*int64"),
    ({"rewards": META}, r"rewards.*device cpu.*meta"),
    ({"rewards": [1.0] * N}, r"rewards.*tensor.*list"),
    ({"values": ONES[:, None]}, r"values.*\(9,\).*\(9, 1\)"),
]
FEATURES = [
    ({"ref_logprobs": ONES}, r"ref_logprobs.*None.*ref_(logits|hidden)"),
    ({"ref_lse": ONES}, r"ref_lse.*None.*ref_(logits|hidden)"),
    ({"cu_seqlens": None}, r"cu_seqlens.*packed.*None"),
    ({"mask": MASK}, r"mask.*None for packed.*a tensor"),
]

CASES = {
    "lambda_return": (SCAN, BOUNDARIES + SCALARS + [
        ({"rewards": ONES[:, None]}, r"rewards.*\(N,\).*\(9, 1\)"),
        ({"values": ONES[:4]}, r"values.*\(9,\).*\(4,\)"),
        ({"values": META}, r"values.*device cpu.*meta"),
        ({"rewards": ONES.long()}, r"rewards.*floating.*int64"),
        ({"backend": "fast"}, r"backend.*reference.*fast"),
    ]),
    "token_stats": (STATS, ACTIONS + STATISTICS + [
        ({"logits": ONES}, r"logits.*\(N, V\).*\(9,\)"),
        ({"logits": torch.ones(N, V).long()}, r"logits.*floating.*int64"),
        ({"logits": torch.ones(N, 0)}, r"logits.*\(N, V\).*\(9, 0\)"),
        ({"logits": torch.ones(N, V).to(torch.float8_e5m2)}, r"logits.*bfloat16.*float8_e5m2"),
        ({"ref_logits": torch.ones(N, V).to(torch.float8_e5m2)}, r"ref_logits.*bfloat16.*float8_e5m2"),
        ({"ref_logits": torch.ones(N, V + 1)}, r"ref_logits.*\(9, 6\).*\(9, 7\)"),
        ({"ref_logits": torch.ones(N, V, device="meta")}, r"ref_logits.*device cpu.*meta"),
    ]),
    "soft_bellman": (ROWS, BOUNDARIES + SCALARS + OPTIONS + [
        ({"logprobs": ONES[:, None]}, r"logprobs.*\(N,\).*\(9, 1\)"),
        ({"ref_logprobs": ONES[:2]}, r"ref_logprobs.*\(9,\).*\(2,\)"),
        ({"values": None, "ref_lse": ONES}, r"lse.*soft values.*None"),
        ({"values": None, "lse": ONES}, r"ref_lse.*soft values.*None"),
        ({"values": None, "lse": ONES[:2], "ref_lse": ONES}, r"lse.*\(9,\).*\(2,\)"),
        ({"backend": "fast"}, r"backend.*reference.*fast"),
    ]),
    "soft_bellman_loss": (LOSS, BOUNDARIES + ACTIONS + STATISTICS + SCALARS + OPTIONS + FEATURES + [
        ({"ref_logits": None}, r"ref_logits or ref_logprobs.*reference"),
        ({"ref_logits": None, "ref_logprobs": ONES, "kl_coef": 0.1}, r"ref_logits.*kl_coef = 0.1.*None"),
        ({"ref_logits": None, "ref_logprobs": ONES, "values": None}, r"ref_lse.*soft values.*None"),
        ({"ref_logits": None, "ref_logprobs": ONES[:2]}, r"ref_logprobs.*\(9,\).*\(2,\)"),
        ({"ref_logits": BATCH.ref_logits[:, :3]}, r"ref_logits.*\(9, 6\).*\(9, 3\)"),
        ({"logits": ONES}, r"logits.*2 dimensions.*3 with mask.*\(9,\)"),
    ]),
    "linear_token_stats": (LINEAR, ACTIONS + STATISTICS + [
        ({"hidden": ONES}, r"hidden.*\(N, D\).*\(9,\)"),
        ({"weight": torch.ones(V, D + 1)}, r"weight.*\(V, 3\).*\(6, 4\)"),
        ({"weight": torch.ones(V, D, device="meta")}, r"weight.*device cpu.*meta"),
        ({"bias": ONES}, r"bias.*\(6,\).*\(9,\)"),
        ({"ref_weight": None}, r"ref_weight.*ref_hidden.*None"),
        ({"ref_hidden": None}, r"ref_hidden.*ref_weight.*None"),
        ({"ref_hidden": None, "ref_weight": None, "ref_bias": ONES[:V]}, r"ref_hidden.*ref_bias.*None"),
        ({"ref_hidden": torch.ones(())}, r"ref_hidden.*shape.*got shape \(\)"),
        ({"weight": None}, r"weight: expected a tensor, got NoneType"),
        ({"ref_hidden": torch.ones(N - 1, D)}, r"ref_hidden.*\(9, 3\).*\(8, 3\)"),
        ({"ref_weight": torch.ones(V + 1, D)}, r"ref_weight.*\(6, 3\).*\(7, 3\)"),
        ({"workspace_bytes": 0}, r"workspace_bytes.*positive.*0"),
    ]),
    "linear_soft_bellman_loss": (LINEAR_LOSS,
    BOUNDARIES + ACTIONS + STATISTICS + SCALARS + OPTIONS + FEATURES + [
        ({"ref_hidden": None, "ref_weight": None}, r"ref_hidden or ref_logprobs.*reference"),
        ({"ref_hidden": None, "ref_weight": None, "ref_logprobs": ONES, "kl_coef": 0.1},
        r"ref_hidden.*kl_coef.*None"),
        ({"hidden": torch.ones(N, 1, D)}, r"(cu_seqlens|mask).*padded"),
        ({"weight": None}, r"weight: expected a tensor, got NoneType"),
        ({"seqlens": [4, 5]}, r"seqlens.*4 lengths.*N = 9.*2, sum 9"),
        ({"workspace_bytes": -1}, r"workspace_bytes.*positive.*-1"),
    ]),
    "linear_row_loss": (ROW_LOSS, BOUNDARIES + ACTIONS + STATISTICS + [
        ({"coupling": "pair"}, r"coupling.*group, batch.*'pair'"),
        ({"cu_groups": boundaries(0, 2)}, r"cu_groups.*4.*2"),
        ({"cu_groups": boundaries(0, 3, 2, 4)}, r"cu_groups.*decrease.*3, 2"),
        ({"cu_groups": torch.tensor([0.0, 4.0])}, r"cu_groups.*integer.*float32"),
        ({"cu_groups": torch.tensor([], dtype=torch.long)}, r"cu_groups"),
        ({"rows": {"rewards": ONES[:3]}}, r"rewards.*9.*\(3,\)"),
        ({"rows": {"rewards": 1.0}}, r"rewards.*tensor.*float"),
    ]),
}  # fmt: skip


def flat(cases):
    return [
        pytest.param(name, good, bad, message, id=f"{name}-{i}-{'-'.join(bad)}")
        for name, (good, wrongs) in cases.items()
        for i, (bad, message) in enumerate(wrongs)
    ]


@pytest.mark.parametrize("name, good, bad, message", flat(CASES))
def test_a_wrong_argument_is_named_with_what_came_and_what_was_expected(name, good, bad, message):
    function = getattr(dqo_kernels, name)
    function(**good)
    with pytest.raises(ValueError, match=message):
        function(**{**good, **bad})


PADDED_CASES = [
    ({"mask": None}, r"mask.*padded.*None"),
    ({"mask": MASK.long()}, r"mask.*bool.*int64"),
    ({"mask": MASK[:, :4]}, r"mask.*\(4, 5\).*\(4, 4\)"),
    ({"mask": MASK.tolist()}, r"mask.*bool.*list"),
    ({"cu_seqlens": BATCH.cu_seqlens}, r"cu_seqlens.*None for padded"),
    ({"actions": BATCH.actions}, r"actions.*\(4, 5\).*\(9,\)"),
    ({"rewards": BATCH.rewards}, r"rewards.*\(4, 5\).*\(9,\)"),
    ({"values": PADDED["values"].t()}, r"values.*\(4, 5\).*\(5, 4\)"),
    ({"ref_logits": BATCH.ref_logits}, r"ref_logits.*\(4, 5, 6\).*\(9, 6\)"),
    ({"temperature": ONES}, r"temperature.*\(4, 5\).*\(9,\)"),
    ({"bootstrap": torch.ones(4, 5)}, r"bootstrap.*\(4,\).*\(4, 5\)"),
    ({"actions": torch.full((4, 5), V)}, r"actions.*\[0, 6\).*6"),
]


@pytest.mark.parametrize(
    "bad, message", PADDED_CASES, ids=[f"{i}-{'-'.join(c[0])}" for i, c in enumerate(PADDED_CASES)]
)
def test_a_wrong_padded_argument_is_named_in_the_callers_layout(bad, message):
    dqo_kernels.soft_bellman_loss(**PADDED)
    with pytest.raises(ValueError, match=message):
        dqo_kernels.soft_bellman_loss(**{**PADDED, **bad})
