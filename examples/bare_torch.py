"""soft_bellman_loss in a training loop of your own: no trainer, a policy and a value model of plain torch.

    python examples/bare_torch.py

Strings of eight digits earn 1 when they never fall (1 1 2 5 5 6 7 9). A small GRU is the policy, another the value model; 4,096
stored samples of the untrained policy, rewarded, are all the data there is.
"""

import argparse

import torch
from torch import nn

from dqo_kernels import soft_bellman_loss

DIGITS, LENGTH, START = 10, 8, 10


class Model(nn.Module):
    """(B, T) actions -> (B, T, outputs); position t has seen the actions before t, and nothing after."""

    def __init__(self, outputs: int):
        super().__init__()
        self.embed, self.gru, self.head = nn.Embedding(11, 64), nn.GRU(64, 64, batch_first=True), nn.Linear(64, outputs)

    def forward(self, actions):
        start = torch.full((len(actions), 1), START)
        return self.head(self.gru(self.embed(torch.cat([start, actions[:, :-1]], 1)))[0])


@torch.no_grad()
def sample(policy, count):
    actions = torch.zeros(count, LENGTH, dtype=torch.long)
    for t in range(LENGTH):
        actions[:, t] = policy(actions)[:, t].softmax(-1).multinomial(1)[:, 0]
    return actions


def success(actions):
    return (actions.diff(dim=1) >= 0).all(1).float()


def main(steps: int = 300, seed: int = 0) -> tuple[float, float]:
    """Share of samples that earn the reward, before and after."""
    torch.manual_seed(seed)
    policy, value_model = Model(DIGITS), Model(1)
    nn.init.zeros_(value_model.head.weight)
    stored = sample(policy, 4096)
    with torch.no_grad():
        stored[:2048] = stored[:2048].sort(1).values  # half of the data shows that success exists
        reference = policy(stored).log_softmax(-1).gather(-1, stored[..., None])[..., 0]
    rewards = torch.zeros(len(stored), LENGTH)
    rewards[:, -1] = success(stored)  # paid on the last action
    before = success(sample(policy, 2000)).mean().item()

    optimizer = torch.optim.Adam([*policy.parameters(), *value_model.parameters()], 3e-3)
    for step in range(steps):
        batch = torch.randint(len(stored), (256,))
        out = soft_bellman_loss(
            policy(stored[batch]),  # (B, T, V): logits[:, t] predicts actions[:, t]
            stored[batch],
            rewards[batch],
            value_model(stored[batch])[..., 0],  # (B, T)
            ref_logprobs=reference[batch],
            mask=torch.ones(256, LENGTH, dtype=torch.bool),
            beta=0.1,
            is_level="none",  # half of the data is not the reference's own
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1:4}  loss {out.loss.item():.4f}  value {out.returns.mean().item():.3f}")
    after = success(sample(policy, 2000)).mean().item()
    print(f"samples that earn the reward: {before:.1%} before, {after:.1%} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
