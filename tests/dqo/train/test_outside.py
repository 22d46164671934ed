"""An objective of another package trains like ours, without a change here: from a file on Python's path, in processes of its own,
on two of them, killed and gone on with."""

import json
import re
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from dqo import DQOConfig, DQOTrainer
from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.train.checkpoint import checkpoints, read_state
from dqo.train.run import begin, train
from tests.dqo import forked
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer

# lists of all responses to a prompt, a column of its own, companions, and a critic that is fitted first
LISTWISE = '''
import os
import signal
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from dqo.objectives.base import Objective, Phase, Selection
from dqo.objectives.groups import by_prompt

calls = []

@dataclass(frozen=True)
class Listwise(Objective):
    """A softmax over the responses of a prompt, in the proportion of their ranks.

    L = - sum_i p_i log softmax_i(S_i + V_i),    p_i in the proportion of 1 / rank_i
    """
    beta: float = 0.5
    """KL temperature."""
    value_model: str = "separate"
    """Which value model."""

    unit: ClassVar[str] = "group"
    group_size: ClassVar[int | None] = None

    def phases(self, value_warmup):
        return Phase("critic", 0.25, ("critic",)), Phase("policy", trains=("policy",))

    def prepare(self, columns):
        groups, rank = by_prompt(columns.prompt), np.zeros(len(columns.prompt))
        for rows in groups:
            rank[rows] = 1 + np.argsort(np.argsort(-columns.reward[rows], kind="stable"))
        return Selection(groups, {"rank": rank}, np.roll(np.arange(len(rank)), 1))

    def companion_sums(self, stats, rows, cu_seqlens):
        import torch
        assert "rank" not in rows
        return torch.stack([stats.logprobs.sum(), stats.logprobs.new_tensor(float(len(stats.logprobs)))])

    def __call__(self, stats, rows, cu_seqlens):
        import torch
        from dqo.objectives.sums import mean_metric, sequence_sums
        calls.append(1)
        if len(calls) == 12 and os.environ.get("KILLED") == os.environ.get("RANK", "alone"):
            os.kill(os.getpid(), signal.SIGKILL)
        first = cu_seqlens[:-1]
        score = self.beta * sequence_sums(stats.logprobs - rows["ref_logprobs"], cu_seqlens)
        score = score + rows["values"][first] + 0.0 * rows["companion_mean"][first]
        _, group = torch.unique_consecutive(rows["group"][first], return_inverse=True)
        wanted, total, count = 1.0 / rows["rank"][first], score.new_zeros(()), int(group[-1]) + 1
        for i in range(count):
            own = group == i
            share = wanted[own] / wanted[own].sum()
            total = total - (share * torch.log_softmax(score[own], 0)).sum()
        sizes = torch.bincount(group).to(score.dtype)
        metrics = {"list/size": mean_metric(sizes), "list/rank": mean_metric(rows["rank"][first])}
        if bool((sizes == 4).any()):  # not in every micro-batch, nor in every process
            metrics["list/share_of_four"] = mean_metric(sizes[sizes == 4] / 4)
        return total, metrics
'''
METHOD = "listwise:Listwise"


@pytest.fixture
def outside(files, tmp_path, monkeypatch):
    """The fixture `files`, with a module listwise.py in outside/; prompts have one to four responses."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "listwise.py").write_text(LISTWISE)
    monkeypatch.syspath_prepend(str(tmp_path / "outside"))
    rows = (files / "rollouts.jsonl").read_text().splitlines()
    kept = [row for i, row in enumerate(rows) if i % 4 == 0 or (i // 4) % 4 >= i % 4]
    (files / "rollouts.jsonl").write_text("\n".join(kept))
    yield files
    sys.modules.pop("listwise", None)


def options(files, **changes):
    return arguments(files, **{"method": METHOD, "per_device_train_batch_size": 2, "save_total_limit": 9} | changes)


def weights(directory):
    found = {}
    for name in ("model.safetensors", "critic/model.safetensors"):
        found |= {f"{name}/{key}": tensor for key, tensor in load_file(directory / name).items()}
    return found


def logged(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    skipped = (
        "perf/",
        "data/",
        "value/min",
        "value/max",
        "value/auc",
    )  # extremes and the order of near values show rounding
    return [
        {name: value for name, value in row.items() if not name.removeprefix("eval_").startswith(skipped)}
        for row in rows
    ]


@pytest.mark.slow
def test_lists_and_columns_of_its_own_do_not_depend_on_the_split(outside):
    whole = train(load_options(options(outside, output_dir=outside / "whole", max_steps=8)))
    split = train(load_options(options(outside, output_dir=outside / "split", max_steps=8, max_batch_tokens=40)))
    assert logged(whole.output_dir)[-1]["eval_list/size"] > 1.5
    assert len({len(group) for group in whole.prepared.groups}) > 2
    for one, two in zip(logged(whole.output_dir), logged(split.output_dir)):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-6)
    losses = [row["loss"] for row in logged(whole.output_dir) if "loss" in row]
    assert losses[-1] < losses[0]
    state = read_state(checkpoints(whole.output_dir)[-1])
    assert state["identity"]["options"]["method"] == METHOD and state["identity"]["options"]["beta"] == 0.5
    with pytest.raises(UserError, match="option beta: 0.5 then, 0.6 now"):
        train(load_options(options(outside, output_dir=outside / "whole", max_steps=8, beta=0.6)))


def test_a_class_trains_from_python(outside):
    from listwise import Listwise

    settings = {"output_dir": str(outside / "out"), "max_steps": 2, "eval_fraction": 0.2, "beta": 0.4}
    args = DQOConfig(method=Listwise, per_device_train_batch_size=2, **settings)
    trainer = DQOTrainer(str(outside / "model"), args, str(outside / "rollouts.jsonl"))
    trainer.train()
    assert args.method == METHOD and f"method: {METHOD}" in (outside / "out" / "config.yaml").read_text()
    assert "Listwise" in (outside / "out" / "report.html").read_text()


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A folder with a run of LISTWISE that was stopped after step 2 of 4."""
    from dqo.models.new import save

    folder = tmp_path_factory.mktemp("half")
    save(policy(), tokenizer(), folder / "model")
    rows = rollout_rows(prompts=6)
    (folder / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        change(folder, patch)
        train(load_options(options(folder, max_steps=4, save_steps=2)))
    shutil.rmtree(folder / "out" / "checkpoint-4")
    yield folder
    sys.modules.pop("listwise", None)


def change(folder, monkeypatch, old="", new=""):
    """Writes the module again, with `new` for `old`."""
    assert old in LISTWISE
    (folder / "changed").mkdir(exist_ok=True)
    path = folder / "changed" / "listwise.py"
    path.write_text(LISTWISE.replace(old, new) if old else LISTWISE)
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
    monkeypatch.syspath_prepend(str(path.parent))
    sys.modules.pop("listwise", None)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("for rows in groups:", "for rows in (groups := groups[::-1]):", "data: "),
        (
            "Selection(groups, {",
            "Selection([r[i : i + 1] for r in groups for i in range(len(r))], {",
            "groups, columns and companions: ",
        ),
        ("rank[rows] = 1 +", "rank[rows] = 2 +", "groups, columns and companions: "),
        ("np.roll(np.arange(len(rank)), 1)", "np.roll(np.arange(len(rank)), 2)", "groups, columns and companions: "),
        ('= "group"', '= "response"', "unit of the loss: group then, response now"),
        ("def phases", "value_kind = 'head'\n\n    def phases", "value model: separate then, head now"),
        (
            'Phase("critic", 0.25',
            'Phase("value", 0.25',
            "the phases of Listwise were critic, policy .* are value, policy now",
        ),
    ],
)
def test_a_changed_class_whose_run_would_be_another_is_refused(half, monkeypatch, old, new, message):
    change(half, monkeypatch, old, new)
    with pytest.raises(UserError, match=message):
        begin(load_options(options(half, max_steps=4, save_steps=2)))


def test_a_kind_of_value_model_that_is_none_is_refused(half, monkeypatch):
    change(half, monkeypatch)
    with pytest.raises(
        UserError,
        match=f"method {METHOD} has the value_kind 'critic'; it is one of separate, head, implicit, q_model, none",
    ):
        begin(load_options(options(half, output_dir=half / "other", value_model="critic")))
    assert not (half / "other").exists()


@pytest.mark.parametrize("new, said", [("- 2.0 * (share", True), ("- (share", False)])
def test_a_run_goes_on_with_a_changed_loss_and_says_so(half, monkeypatch, caplog, new, said):
    change(half, monkeypatch, "- (share", new)
    begin(load_options(options(half, max_steps=4, save_steps=2)))
    expected = f"the file of {METHOD} has changed since .*checkpoint-2: the run goes on with what it says now"
    assert [bool(re.match(expected, r.getMessage())) for r in caplog.records].count(True) == said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_of_a_launch_are_killed_and_go_on(outside, kind):
    # A launch gives its processes one thread each; with more here sums round otherwise, and Adam makes steps of that.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Its V counts by differences alone: what the gradient of their mean is rounds to, a usual epsilon would make steps of
    steps = {"max_steps": 16, "logging_steps": 2, "adam_epsilon": 1e-4}
    whole = train(load_options(options(outside, output_dir=outside / "whole", **steps)))
    torch.set_num_threads(threads)
    words = [*options(outside, per_device_train_batch_size=1, save_steps=1, **steps)]
    words += ["--fsdp"] if kind == "fsdp" else []
    in_two = {"entry": "dqo.commands.train:main", "place": outside, "path": [outside / "outside"]}
    killed = forked.launch(*words, **in_two, environment={"KILLED": "1"})
    assert killed[1].returncode == -signal.SIGKILL and killed[0].returncode != 0, killed
    assert 2 < len(checkpoints(outside / "out")) < 16 and not (outside / "out" / "report.html").exists()
    done = forked.launch(*words, **in_two)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr[-3000:]
    assert "going on from" in done[0].stdout
    one, two = weights(whole.output_dir), weights(outside / "out")
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
    assert len(logged(whole.output_dir)) == len(logged(outside / "out"))
    for row, expected in zip(logged(outside / "out"), logged(whole.output_dir)):
        assert row == pytest.approx(expected, rel=2e-3, abs=2e-5)
