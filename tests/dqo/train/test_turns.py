"""Trajectories of several turns in training: what the environment wrote is read, and is neither trained nor counted."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from dqo.config.options import load_options
from dqo.data.batches import Batching, collate, distinct, groups_of, unit_count
from dqo.data.selection import selected
from dqo.models import attention
from dqo.models.critic import make_value_model, value_rows
from dqo.models.policy import policy_stats
from dqo.objectives import DPO, DQO, DRO, KTO, OREO, REBEL, RFT, SFT
from dqo.processes import Processes
from dqo.reference.columns import add_reference, check_agreement
from dqo.train.engine import Engine
from dqo.train.held_out import held_out_metrics, tokens_of
from dqo.train.learner import Learner, objective_sums
from dqo.train.run import train
from dqo.train.step import accumulate
from dqo_kernels import TokenStats, soft_bellman_loss
from tests.dqo.helpers import arguments, episodes, gradients, policy, tokenizer

CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 against float64


def trajectories(count=8, seed=0, **options):
    """Episodes whose completions have holes; the actions, and their arrays, are those of `episodes`."""
    rng = np.random.default_rng(seed)
    found = []
    for e in episodes(count, seed, **options):
        ids, mask, ends = [], [], []
        for i, token in enumerate(e.completion_ids):
            if rng.random() < 0.4:
                read = rng.integers(3, 19, int(rng.integers(1, 4))).tolist()
                ids, mask = ids + read, mask + [False] * len(read)
                ends += [i - 1] * (i > 0)
            ids, mask = [*ids, token], [*mask, True]
        behavior = -rng.random(e.action_count).astype(np.float32)
        ends.append(e.action_count - 1)
        changes = {"completion_ids": ids, "env_mask": np.array(mask), "turn_ends": ends, "behavior_logprobs": behavior}
        found.append(dataclasses.replace(e, **changes))
    assert sum((~e.env_mask).sum() for e in found) > 8 and max(len(e.turn_ends) for e in found) > 2
    return found


def critic_of(model, kind="separate"):
    critic = make_value_model(kind, model)
    torch.manual_seed(1)
    for parameter in list(critic.parameters())[-2:]:
        torch.nn.init.normal_(parameter, std=0.3)
    return critic


def by_hand(model, e):
    """float64 log-probabilities (L, vocabulary) at every position of the episode's tokens, and its logits."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([e.prompt_ids + e.completion_ids])).logits[0]
    model.float()
    return logits.log_softmax(-1), logits


def positions(e):
    """(position of the state, token) of each action, one by one."""
    whole = e.prompt_ids + e.completion_ids
    own = [False] * len(e.prompt_ids) + e.env_mask.tolist()
    return [(i - 1, token) for i, (token, mine) in enumerate(zip(whole, own)) if mine]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_statistics_of_actions_are_those_of_the_whole_conversations_logits(packed):
    model, members = policy(), trajectories()
    expected = []
    for e in members:
        logprobs, logits = by_hand(model, e)
        expected += [
            (logprobs[i, token], logits[i].logsumexp(-1), -(logprobs[i].exp() * logprobs[i]).sum())
            for i, token in positions(e)
        ]
    if packed:
        attention.enable(model)
    stats = policy_stats(model, collate(members, 0, packed=packed), False)
    for got, want in zip((stats.logprobs, stats.lse, stats.entropy), map(torch.stack, zip(*expected))):
        torch.testing.assert_close(got.double(), want, **CLOSE)


OBJECTIVES = [
    DQO(lam=0.7, gamma=0.9, is_cap=None),
    DQO(is_level="suffix", policy_target="td", lam=0.5),
    DQO(value_model="none", is_level="token"),
    DQO(gamma=0.5, discount="turns", lam=0.9),
    DPO(), DRO(), OREO(alpha=0.0), OREO(alpha=0.0, level="response"), KTO(), SFT(), RFT(), REBEL(),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_every_loss_is_that_of_the_actions_alone(objective):
    model, members = policy(), trajectories(terminated=False)
    critic = critic_of(model) if objective.needs_values else None
    groups = selected(objective, members)
    order = [e for group in groups for e in group]
    batch = collate(order, 0, sizes=[len(group) for group in groups])
    loss, metrics = objective_sums(Learner(model, critic), objective, batch, means={"companion_mean": 0.3})
    # The same with every action picked out of whole conversations by hand.
    rows, statistics, values, bootstrap = {}, [], [], []
    if critic is not None:
        every, _ = value_rows(critic, dataclasses.replace(batch, states=torch.arange(batch.positions)), None)
    for b, e in enumerate(order):
        logprobs, logits = by_hand(model, e)
        statistics += [(logprobs[i, token], logits[i].logsumexp(-1)) for i, token in positions(e)]
        if critic is not None:
            of_row = every[b * batch.input_ids.shape[1] :]
            values += [of_row[i] for i, _ in positions(e)]
            bootstrap += [0.0] * (e.action_count - 1) + [of_row[e.length - 1].item()]
    logprobs, lse = map(torch.stack, zip(*statistics))
    stats = TokenStats(logprobs, lse, torch.zeros_like(lse))
    lengths = torch.tensor([len(positions(e)) for e in order])
    for name in ("rewards", "ref_logprobs", "ref_lse", "behavior_logprobs"):
        rows[name] = torch.tensor(np.concatenate([getattr(e, name) for e in order])).double()
    rows |= {name: torch.tensor(np.concatenate([e.columns[name] for e in order])) for name in order[0].columns}
    rows["label"] = torch.tensor([float(e.label) for e in order]).repeat_interleave(lengths)
    rows["group"] = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(batch.sizes)).repeat_interleave(
        lengths
    )
    rows["turn_end"] = torch.cat(
        [torch.isin(torch.arange(e.action_count), torch.tensor(e.turn_ends)).double() for e in order]
    )
    rows["companion_mean"] = torch.full_like(rows["rewards"], 0.3)
    if critic is not None:
        rows |= {"values": torch.stack(values).double(), "bootstrap": torch.tensor(bootstrap).double()}
    expected, more = objective(stats, rows, torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]))
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-4, atol=1e-4)
    for name, pair in more.items():
        torch.testing.assert_close(metrics[name].double(), pair.double(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("is_level", ["trajectory", "suffix", "prefix", "token", "none"])
def test_the_loss_is_that_of_the_kernels_masks_with_holes(is_level):
    """Returns, values and discounts pass the environment's tokens unchanged."""
    options = {"lam": 0.7, "gamma": 0.9, "is_level": is_level, "is_cap": 0.5}
    model, members = policy(), trajectories()
    critic = critic_of(model)
    batch = collate(members, 0)
    loss, _ = objective_sums(Learner(model, critic), DQO(nll_coef=0.0, **options), batch)
    with torch.no_grad():
        logits = model(batch.input_ids).logits[:, :-1]
        every, _ = value_rows(critic, dataclasses.replace(batch, states=torch.arange(batch.positions)))
    wide = {"mask": torch.zeros(logits.shape[:2], dtype=torch.bool)}
    names = ("rewards", "ref_logprobs", "behavior_logprobs")
    wide |= {name: torch.full(logits.shape[:2], float("nan")) for name in names}
    for b, e in enumerate(members):
        for t, (i, _) in enumerate(positions(e)):
            wide["mask"][b, i] = True
            for name in names:
                wide[name][b, i] = float(getattr(e, name)[t])
    expected = soft_bellman_loss(
        logits,
        batch.input_ids[:, 1:],
        wide.pop("rewards"),
        every.view_as(batch.input_ids)[:, :-1],
        **wide,
        **options,
        reduction="sum",
    )
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-4)


def test_a_discount_of_turns_acts_on_their_last_token_alone():
    """Two turns of two actions. lam is 1 and the policy is the reference, so that returns are sums of discounted rewards."""
    model = policy()
    (e,) = episodes(1, reference=False)
    e.completion_ids, e.env_mask, e.turn_ends = [3, 4, 9, 9, 5, 6], np.array([1, 1, 0, 0, 1, 1], bool), [1, 3]
    e.rewards = np.array([0.0, 1.0, 0.0, 8.0], np.float32)
    add_reference([e], lambda batch: policy_stats(model, batch, False), Batching(0, 10**6), Processes())

    def returns(**options):
        _, metrics = objective_sums(Learner(model, critic_of(model)), DQO(**options), collate([e], 0))
        return metrics["returns/mean"][0].item()  # their sum

    assert returns(gamma=0.5, discount="turns") == pytest.approx((1 + 4) + (1 + 4) + 8 + 8, abs=1e-4)
    assert returns(gamma=0.5) == pytest.approx((0.5 + 1) + (1 + 2) + 4 + 8, abs=1e-4)
    assert returns(gamma=0.0, discount="turns") == pytest.approx(1 + 1 + 8 + 8, abs=1e-4)
    assert returns(discount="turns") == pytest.approx(9 + 9 + 8 + 8, abs=1e-4)


def test_a_mask_of_ones_changes_no_bit():
    plain = episodes(6)
    masked = [dataclasses.replace(e, env_mask=np.ones(len(e.completion_ids), bool)) for e in plain]
    one, other = collate(plain, 0), collate(masked, 0)
    for name in ("input_ids", "states", "end_states", "actions", "cu_seqlens", "terminated"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.columns.keys() == other.columns.keys()
    model = policy()
    critic = critic_of(model)
    for objective in (DQO(lam=0.9), SFT()):
        losses = [objective_sums(Learner(model, critic), objective, batch)[0] for batch in (one, other)]
        assert torch.equal(*losses)


@pytest.mark.parametrize("objective", [DQO(gamma=0.9, discount="turns"), DPO(), OREO()], ids=lambda o: type(o).__name__)
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(objective):
    model, members = policy(), trajectories(12)
    critic = critic_of(model) if objective.needs_values else None
    learner = Learner(model, critic, policy(seed=1) if objective.needs_kl else None)
    groups, found = groups_of(members, objective.group_size), []
    for max_tokens, packed in ((10**6, False), (30, False), (30, True)):
        if packed:
            attention.enable(model)
            for one in filter(None, (critic, learner.reference)):
                attention.enable(one)
        learner.zero_grad(set_to_none=True)
        accumulate(Engine(learner, learner, Batching(0, max_tokens, packed=packed), Processes()), objective, groups)
        found.append(gradients(learner))
    assert found[0].abs().max() > 0
    for split in found[1:]:
        torch.testing.assert_close(split, found[0], rtol=1e-4, atol=1e-6 * found[0].abs().max().item())


def test_the_references_columns_are_of_the_actions_and_belong_to_the_mask():
    model, batching = policy(), Batching(0, 10**6)
    members = trajectories(reference=False)

    def stats_of(batch):
        return policy_stats(model, batch, False)

    one = next(e for e in members if (~e.env_mask).any())
    everything = dataclasses.replace(
        one, env_mask=np.ones_like(one.env_mask), rewards=np.zeros(len(one.env_mask)), behavior_logprobs=None
    )
    assert add_reference([*members, everything], stats_of, batching, Processes()) == len(members) + 1
    logprobs, _ = by_hand(model, one)
    expected = np.array([logprobs[i, token].item() for i, token in positions(one)])
    np.testing.assert_allclose(one.ref_logprobs, expected, atol=2e-5)
    assert len(everything.ref_logprobs) == len(one.completion_ids) > len(one.ref_logprobs)
    check_agreement(members, stats_of, batching)
    members[0].ref_logprobs = members[0].ref_logprobs + 0.1
    with pytest.raises(Exception, match="differ from the initial policy's"):
        check_agreement(members, stats_of, batching)


def test_held_out_metrics_and_values_count_actions():
    model, members = policy(), trajectories()
    learner = Learner(model, critic_of(model))
    engine = Engine(learner, learner, Batching(0, 10**6), Processes())
    groups = [[e] for e in members]
    actions = sum(len(positions(e)) for e in members)
    assert unit_count(groups, "token") == actions
    found, _ = held_out_metrics(engine, DQO(), groups)
    assert found["eval_completions/mean_length"] == pytest.approx(actions / len(members))
    for said, e in zip(tokens_of(learner, collate(members, 0)), members, strict=True):
        assert {len(values) for values in said.values()} == {len(positions(e))}


def test_companions_keep_their_turns_and_are_cut_after_an_action():
    members = trajectories(8)
    members[0].prompt_ids = [3] * 20  # with a longer completion it would be too long
    longest = max(e.length for e in members)
    groups = selected(KTO(), members)
    companions = [e.companion for e in distinct(groups) if e.companion is not None]
    assert companions and any((~c.env_mask).any() for c in companions)
    for c in companions:
        assert c.env_mask[-1] and len(c.rewards) == c.action_count == len(positions(c)) > 0
        assert c.length <= max(longest, len(c.prompt_ids) + int(c.actions[0]) + 1)
        assert all(end < c.action_count for end in c.turn_ends)


def test_a_run_on_conversations_counts_its_actions(files):
    """Text, and ids that were sampled, in one file; what the environment says decides the reward."""
    rng, tok, rows = np.random.default_rng(0), tokenizer(), []
    for i in range(24):
        asked, told, answer = (str(rng.integers(1, 9)) for _ in range(3))
        row = {"prompt": f"{i % 6}+", "reward": float(answer == told), "turn_rewards": [0.0, float(answer == told)]}
        if i % 2:
            row |= {"completion": f"{asked}={told}+{answer}", "turn_spans": [[0, 1], [4, 5]]}
        else:
            ids = tok(f"{asked}={told}+{answer}", add_special_tokens=False)["input_ids"]
            row |= {"completion": "1", "completion_ids": [*ids, tok.eos_token_id], "env_mask": [1, 0, 0, 0, 1, 1]}
        rows.append(row)
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "max_steps": 4,
        "gamma": 0.9,
        "discount": "turns",
        "process_reward": "additive",
        "logging_steps": 1,
        "lam": 0.9,
    }
    finished = train(load_options(arguments(files, **options)))
    logged = [json.loads(line) for line in (files / "out" / "metrics.jsonl").read_text().splitlines()]
    lengths = {row["completions/mean_length"] for row in logged if "completions/mean_length" in row}
    assert finished.steps == 4 and lengths == {3.0}  # two turns of one token, and the end token
    assert finished.held_out.get("eval_completions/mean_length", 3.0) == 3.0
    assert train(load_options(arguments(files, **options))).steps == 4  # the same data come again
