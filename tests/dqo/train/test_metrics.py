import json

import pytest
import torch

from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.objectives.sums import moments, response_metrics, sequence_means, sequence_sums
from dqo.train import metrics
from dqo_kernels import TokenStats
from tests.dqo.helpers import episodes


def test_means_of_micro_batches_add_by_their_counts():
    total = metrics.add({}, {"a": torch.tensor([2.0, 1.0])})
    total = metrics.add(total, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 5.0])})
    assert metrics.finish(total) == {"a": 1.0, "b": 1.0}


def test_explained_variance_is_one_minus_the_ratio_of_variances():
    returns, values = torch.randn(2, 50)
    halves = [
        metrics.add(moments("returns", r), moments("value_error", r - v))
        for r, v in zip(returns.chunk(2), values.chunk(2))
    ]
    found = metrics.finish(metrics.add(*halves))
    expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert found["value/explained_variance"] == pytest.approx(expected.item(), rel=1e-4)
    assert "returns/mean_square" not in found and "value_error/mean" not in found


def test_advantages_are_logged_with_their_standard_deviation():
    advantages = torch.randn(50) + 3
    halves = [moments("advantages", part) for part in advantages.chunk(2)]
    found = metrics.finish(metrics.add(*halves))
    assert found.keys() == {"advantages/mean", "advantages/std"}
    assert found["advantages/std"] == pytest.approx(advantages.std(correction=0).item(), rel=1e-4)


def test_the_bar_shows_what_the_weights_leave():
    row = {"loss": 8.6e-19, "importance_weight/mean": 8e-20, "importance_weight/effective_sample_share": 0.02}
    assert metrics.on_the_bar(row) == "loss 8.6e-19, mean weight 8e-20, 2% effective"
    assert metrics.on_the_bar({"loss": 0.5}) == "loss 0.5"


def test_a_variance_is_never_negative():
    rounded = {"advantages/mean": torch.tensor([1.0, 1.0]), "advantages/mean_square": torch.tensor([1.0 - 1e-7, 1.0])}
    assert metrics.finish(rounded)["advantages/std"] == 0


def test_a_metric_nobody_contributed_to_is_left_out():
    assert metrics.finish({"rewards/chosen": torch.tensor([0.0, 0.0])}) == {}


def test_the_logged_kl_is_zero_at_the_reference_and_positive_elsewhere():
    def kl(logprobs):
        stats = TokenStats(torch.tensor(logprobs), torch.zeros(2), torch.zeros(2))
        return metrics.finish(metrics.common(stats, {"ref_logprobs": torch.tensor([-1.0, -2.0])}))["kl"]

    assert kl([-1.0, -2.0]) == 0
    assert kl([-1.5, -2.0]) > 0 and kl([-0.5, -2.0]) > 0


ONE, PAIR = torch.tensor(1.0), torch.ones(2)


@pytest.mark.parametrize(
    "returned, message",
    [
        (ONE, r"shape \(\); expected \(loss_sum, metrics\)"),
        (None, r"type NoneType; expected \(loss_sum, metrics\)"),
        ((ONE, {}, {}), r"type tuple; expected \(loss_sum, metrics\)"),
        ((1.0, {}), "a loss of type float; expected a scalar tensor"),
        ((PAIR, {}), r"a loss of shape \(2,\); expected a scalar tensor"),
        ((ONE, None), "metrics of type NoneType; expected a dict"),
        ((ONE, {"a": 1.0}), "the metric a of type float; expected a tensor"),
        ((ONE, {"a": ONE}), r"the metric a of shape \(\); expected a tensor \(2,\)"),
        ((ONE, {"a": torch.ones(3)}), r"the metric a of shape \(3,\); expected"),
        ((ONE, {"a/min": PAIR}), "the metric a/min; this name is the trainer's"),
        ((ONE, {"a/max": PAIR}), "the metric a/max; this name is the trainer's"),
        ((ONE, {"a/mean_square": PAIR}), "the metric a/mean_square without a/mean, which it is centred by"),
    ],
)
def test_what_an_objective_gives_is_checked(returned, message):
    with pytest.raises(UserError, match=f"^Mine.__call__ gives {message}"):
        metrics.checked(returned, "Mine")


def test_no_metric_of_an_objective_has_a_name_of_ours():
    stats = TokenStats(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    batch = collate(episodes(2), 0)
    ours = metrics.common(stats, {"ref_logprobs": torch.zeros(2)}) | metrics.of_batch(batch) | {"loss": PAIR}
    for name in [*ours, "router_aux_loss"]:
        with pytest.raises(UserError, match=f"gives the metric {name}; this name is the trainer's"):
            metrics.checked((ONE, {name: PAIR}), "Mine")
    assert metrics.checked((ONE, moments("a", PAIR)), "Mine")[0] is ONE


def test_returns_without_an_error_of_values_explain_nothing():
    assert "value/explained_variance" not in metrics.finish(moments("returns", torch.arange(4.0)))


def test_sequence_sums_stay_inside_their_sequence():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert sequence_sums(x, torch.tensor([0, 1, 1, 4])).tolist() == [1.0, 0.0, 14.0]


def test_sequence_means_are_of_each_sequence():
    assert sequence_means(torch.tensor([1.0, 2.0, 4.0, 9.0]), torch.tensor([0, 1, 4])).tolist() == [1.0, 5.0]


def test_responses_are_summed_by_label_or_by_what_is_given():
    stats = TokenStats(torch.tensor([-1.0, -2.0, -4.0]), torch.zeros(3), torch.zeros(3))
    rows = {"label": torch.tensor([1.0, 1.0, 0.0]), "ref_logprobs": torch.tensor([-1.0, -1.0, -1.0])}
    cu_seqlens = torch.tensor([0, 2, 3])
    found = response_metrics(stats, rows, cu_seqlens, beta=0.5)
    assert {name: pair.tolist() for name, pair in found.items()} == {
        "logps/chosen": [-3.0, 1.0],
        "logps/rejected": [-4.0, 1.0],
        "rewards/chosen": [-0.5, 1.0],
        "rewards/rejected": [-1.5, 1.0],
    }
    given = response_metrics(stats, rows, cu_seqlens, chosen=torch.tensor([False, True]))
    assert {name: pair.tolist() for name, pair in given.items()} == {
        "logps/chosen": [-4.0, 1.0],
        "logps/rejected": [-3.0, 1.0],
    }


def test_a_metrics_file_is_cut_back_to_its_position(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = metrics.MetricsFile(path)
    first.write({"step": 1})
    position = first.position()
    first.write({"step": 2})
    first.close()
    second = metrics.MetricsFile(path, position)
    second.write({"step": 3})
    second.close()
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 3]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3}


def test_rows_before_a_position_are_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(metrics.os, "fsync", lambda descriptor: synced.append((tmp_path / "m.jsonl").read_text()))
    log = metrics.MetricsFile(tmp_path / "m.jsonl")
    log.write({"step": 1})
    assert log.position() == len('{"step": 1}\n')
    assert synced == ['{"step": 1}\n']


ROWS = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n{"step": 3, "loss": NaN}\n'


@pytest.mark.parametrize(
    "content, kept, message",
    [
        (ROWS[:30], [1], "is shorter than the checkpoint says"),
        ("", [], "is shorter than the checkpoint says"),
        (ROWS.replace("0.25", "0.35"), [1, 2, 3], "was altered"),
        (ROWS.replace('{"step": 2', "\0" * 10), [1, 3], "was altered"),
        (ROWS.replace('"step": 2', '"step": x'), [1, 3], "was altered"),
        (None, [], "is shorter than the checkpoint says"),
    ],
)
def test_a_damaged_file_keeps_the_rows_that_can_be_read_and_says_so(tmp_path, caplog, content, kept, message):
    path = tmp_path / "m.jsonl"
    log = metrics.MetricsFile(path)
    for line in ROWS.splitlines():
        log.write(json.loads(line))
    position, crc32 = log.position(), log.crc32
    log.close()
    assert path.read_text() == ROWS
    path.unlink()
    if content is not None:
        path.write_text(content)
    log = metrics.MetricsFile(path, position, crc32)
    assert message in caplog.text and f"{len(kept)} are left; it is now {tmp_path}/damaged-m.jsonl" in caplog.text
    assert (tmp_path / "damaged-m.jsonl").read_text() == (content or "")
    log.write({"step": 4})
    again, crc32 = log.position(), log.crc32
    log.close()
    assert [row["step"] for row in metrics.read_metrics(path)] == [*kept, 4]
    caplog.clear()
    metrics.MetricsFile(path, again, crc32).close()
    assert not caplog.records


def test_a_line_that_is_no_row_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(UserError, match="m.jsonl:2: not a row of metrics"):
        metrics.read_metrics(tmp_path / "m.jsonl")


def test_rows_after_a_position_are_cut_off_before_any_is_written(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    metrics.MetricsFile(tmp_path / "m.jsonl", 12).close()
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'
