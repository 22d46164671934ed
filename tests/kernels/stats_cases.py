"""Rows of logits; their statistics and gradients by closed forms in float64, and by torch as a yardstick."""

import numpy as np
import torch

from dqo_kernels import token_stats
from tests.kernels.oracle import exact_kl, row_stats

FIELDS = ("logprobs", "lse", "entropy", "kl")


def make(seed, rows, vocab, dtype=torch.float64, scale=3.0, offset=0.0):
    rng = torch.Generator().manual_seed(seed)
    z, z_ref, upstream = (
        torch.randn(3, max(rows, 4), vocab, generator=rng, dtype=torch.float64) * scale + offset
    ).unbind()
    actions = torch.randint(vocab, (rows,), generator=rng)
    gradients = (upstream[:4, :1] - offset) * torch.ones(1, rows, dtype=torch.float64)
    return z[:rows].to(dtype), z_ref[:rows].to(dtype), actions, gradients.contiguous()


def oracle(z, z_ref, actions, temperature=1.0, softcap=None):
    policy = row_stats(z.double(), actions, temperature, softcap)
    ref = row_stats(z_ref.double(), actions, temperature, softcap)
    values = (policy.logprobs, policy.lse, policy.entropy, ref.logprobs, ref.lse, exact_kl(policy, ref))
    return [torch.from_numpy(v) for v in values], policy, ref


def closed_gradient(z, z_ref, actions, upstream, temperature=1.0, softcap=None):
    """Of sum(upstream * fields) in the raw logits, float64; an impossible token has none."""
    values, policy, ref = oracle(z, z_ref, actions, temperature, softcap)
    c_logprob, c_lse, c_entropy, c_kl = upstream.double().numpy()
    entropy, kl = values[2].numpy(), values[5].numpy()
    a = c_lse - c_logprob - c_kl * kl - c_entropy * entropy
    with np.errstate(invalid="ignore"):
        u, u_ref = policy.scaled - policy.lse[:, None], ref.scaled - ref.lse[:, None]
        dz = policy.probs * (a[:, None] + (c_kl - c_entropy)[:, None] * u - c_kl[:, None] * u_ref)
    dz = np.where(policy.probs > 0, dz, 0.0)
    dz[np.arange(len(actions)), actions] += c_logprob
    dz /= np.broadcast_to(np.asarray(temperature, dtype=np.float64), (len(actions),))[:, None]
    if softcap is not None:
        dz *= 1 - np.tanh(z.double().numpy() / softcap) ** 2
    return torch.from_numpy(dz)


def all_fields(stats):
    return torch.stack([getattr(stats, name) for name in FIELDS])


def gradient(z, z_ref, actions, upstream, **options):
    z = z.detach().clone().requires_grad_()
    fields = all_fields(token_stats(z, actions, z_ref, **options))
    (fields * upstream.to(fields.dtype)).sum().backward()
    return z.grad


def torch_gradient(z, z_ref, actions, upstream, temperature=1.0, softcap=None):
    """The same sum by log_softmax in float32: the yardstick of the error bound."""
    z = z.detach().clone().requires_grad_()

    def logp(x):
        x = x.float()
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        x = x / (temperature[:, None].float() if isinstance(temperature, torch.Tensor) else temperature)
        return x, x.log_softmax(-1)

    (scaled, policy), (_, ref) = logp(z), logp(z_ref)
    rows = (policy.gather(1, actions[:, None])[:, 0], scaled.logsumexp(-1))
    entropy, kl = -(policy.exp() * policy).sum(-1), (policy.exp() * (policy - ref)).sum(-1)
    (torch.stack([*rows, entropy, kl]) * upstream.float()).sum().backward()
    return z.grad
