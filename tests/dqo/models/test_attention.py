"""Packed sequences give what each gives alone: hidden states, losses and gradients of both models."""

import dataclasses
import logging

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.trainer.small_models import small_config
from dqo.data.batches import Batching, collate, groups_of
from dqo.errors import UserError
from dqo.models import attention
from dqo.models.architecture import recompute_activations
from dqo.models.critic import value_rows
from dqo.models.generate import Request, Sampling, generate
from dqo.processes import Processes
from dqo.train.engine import Engine
from dqo.train.learner import Learner
from dqo.train.step import accumulate
from tests.dqo.helpers import episodes, gradients, hidden_rows
from tests.dqo.packing_models import PACKED, WINDOW, WITH_VALUES, critic_of, model, objective_and_critic, packing

IDS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("name", PACKED)
def test_packed_hidden_states_are_those_of_the_padded_batch_and_of_each_sequence_alone(name):
    made, members = model(name), episodes(9)
    assert max(e.length for e in members) > 2 * WINDOW
    with torch.no_grad():
        padded = hidden_rows(made, collate(members, 0))
        alone = torch.cat([hidden_rows(made, collate([e], 0)) for e in members])
        packed = hidden_rows(packing(made), collate(members, 0, packed=True))
    assert torch.allclose(packed, padded, atol=2e-5)
    assert torch.allclose(packed, alone, atol=2e-5)


@pytest.mark.parametrize("name", WITH_VALUES)
def test_packed_values_are_those_of_the_padded_batch(name):
    critic, members = critic_of(model(name)), episodes(9)
    values, end_values = value_rows(critic, collate(members, 0))
    packed, packed_end = value_rows(packing(critic), collate(members, 0, packed=True))
    assert values.abs().max() > 0.1
    assert torch.allclose(packed, values, atol=2e-5) and torch.allclose(packed_end, end_values, atol=2e-5)


def gradient(made, critic, objective, max_tokens=10_000, half=False):
    """(loss, gradients of the policy and the value model)."""
    models = [m for m in (made, critic) if m is not None]
    for m in models:
        m.zero_grad(set_to_none=True)
    learner = Learner(made, critic, bf16=half)
    batching = Batching(0, max_tokens, packed=attention.packs(made))
    sums, _ = accumulate(Engine(learner, learner, batching, Processes()), objective, groups_of(episodes(9), 1))
    return (sums["loss"][0] / sums["loss"][1]).item(), gradients(*models)


# Full attention, also in half precision; learned positions; layers with and without a window.
OFTEN = [("llama", False), ("llama", True), ("gpt2", False), ("gemma3", False)]
SELDOM = [(name, half) for name in PACKED for half in (False, True) if (name, half) not in OFTEN]


@pytest.mark.parametrize("name, half", [*OFTEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM)])
def test_loss_and_gradients_are_those_of_the_padded_batch(name, half):
    made = model(name)
    objective, critic = objective_and_critic(name, made)
    loss, padded = gradient(made, critic, objective, half=half)
    packed_loss, packed = gradient(packing(made), critic and packing(critic), objective, half=half)
    split_loss, split = gradient(packing(made), critic and packing(critic), objective, max_tokens=20, half=half)
    bound = 0.03 if half else 1e-5
    assert packed_loss == pytest.approx(loss, rel=bound) and split_loss == pytest.approx(loss, rel=bound)
    assert (packed - padded).norm() <= bound * padded.norm()
    assert (split - padded).norm() <= bound * padded.norm()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_recomputing_activations_gives_the_same_gradients(name, monkeypatch):
    made = model(name)
    objective, critic = objective_and_critic(name, made)
    loss, expected = gradient(packing(made), critic and packing(critic), objective)
    recomputing = [m and packing(m).train() for m in (made, critic)]
    for m in recomputing:
        if m is not None:
            recompute_activations(m)
    calls, by_length = [], attention._by_length
    monkeypatch.setattr(attention, "_by_length", lambda *x: calls.append(x[3]) or by_length(*x))
    found_loss, found = gradient(*recomputing, objective)
    assert len(calls) == 2 * 2 * (1 if critic is None else 2)  # layers, forward and again, models
    assert found_loss == loss and torch.equal(found, expected)


def changed(e, **fields):
    return dataclasses.replace(e, **fields)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma3"]
)  # experts are computed together, so Mixtral's may round
def test_a_sequence_does_not_see_the_one_before_it(name):
    made, members = packing(model(name)), episodes(4)
    others = [changed(members[0], prompt_ids=[3 + (i - 2) % 16 for i in members[0].prompt_ids]), *members[1:]]
    rows = len(members[0].completion_ids)
    with torch.no_grad():
        before, after = (hidden_rows(made, collate(batch, 0, packed=True)) for batch in (members, others))
    assert torch.equal(before[rows:], after[rows:])  # bit for bit
    assert not torch.isclose(before[:rows], after[:rows]).all()


def test_a_sequence_does_not_depend_on_its_place_in_the_pack():
    made, members = packing(model("mistral")), episodes(9)
    e = members[4]
    with torch.no_grad():
        first = hidden_rows(made, collate([e, *members[:4]], 0, packed=True))[: len(e.completion_ids)]
        last = hidden_rows(made, collate([*members[5:], e], 0, packed=True))[-len(e.completion_ids) :]
    assert torch.allclose(first, last, atol=1e-5)


def block_mask(lengths, window):
    """(1, 1, T, T) of 0 and -inf: the same sequence, not later, and not too long ago."""
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    at = torch.arange(len(owner))
    back = at[:, None] - at[None, :]
    seen = (owner[:, None] == owner[None, :]) & (back >= 0) & (back < (window or len(owner)))
    return torch.where(seen, 0.0, float("-inf"))[None, None]


@pytest.mark.parametrize("name, window", [("llama", None), ("mistral", WINDOW)])
def test_packing_is_eager_attention_under_a_block_mask(name, window):
    made, members = model(name), episodes(6)
    batch = collate(members, 0, packed=True)
    made.set_attn_implementation("eager")
    expected = made.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.model_inputs["position_ids"],
        attention_mask=block_mask([e.length for e in members], window),
        use_cache=False,
    ).last_hidden_state
    found = packing(made).base_model(input_ids=batch.input_ids, use_cache=False, **batch.model_inputs)
    assert torch.allclose(found.last_hidden_state, expected, atol=2e-5)


def test_sequences_that_lie_in_order_are_not_copied_and_get_the_same_bits(monkeypatch):
    torch.manual_seed(0)
    pieces = [[torch.randn(length, heads, 8) for heads in (4, 2, 2)] for length in (5, 3, 5, 7)]
    read, plain = [], attention.scaled_dot_product_attention
    noted = lambda q, *x, **y: read.append(q.untyped_storage().data_ptr()) or plain(q, *x, **y)  # noqa: E731
    monkeypatch.setattr(attention, "scaled_dot_product_attention", noted)

    def attended(order):
        """The output and the gradients of each sequence, and whether attention read the queries where they lay."""
        qkv = [torch.cat([pieces[i][part] for i in order]).requires_grad_() for part in range(3)]
        lengths = [len(pieces[i][0]) for i in order]
        read.clear()
        output = attention._by_length(*qkv, lengths, 0.3, None)
        output.square().sum().backward()
        split = zip(*(x.split(lengths) for x in (output, *(leaf.grad for leaf in qkv))))
        return dict(zip(order, split)), set(read) == {qkv[0].untyped_storage().data_ptr()}

    (found, in_place), (expected, copied_too) = attended([0, 2, 1, 3]), attended([0, 1, 2, 3])
    assert in_place and not copied_too
    for i in found:
        assert all(torch.equal(one, other) for one, other in zip(found[i], expected[i])), i


def test_sequences_of_one_length_are_one_call_and_no_mask_is_larger_than_a_sequence(monkeypatch):
    calls = []

    def counted(query, key, value, attn_mask=None, **options):
        calls.append((tuple(query.shape), None if attn_mask is None else tuple(attn_mask.shape)))
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    lengths = [4, 2, 4, 9, 2, 4]
    x = torch.randn(sum(lengths), 2, 8)
    attention._by_length(x, x, x, lengths, 1.0, window=3)
    assert sorted(calls) == [((1, 2, 9, 8), (9, 9)), ((2, 2, 2, 8), None), ((3, 2, 4, 8), (4, 4))]


# refusals


@pytest.mark.parametrize(
    "name, why",
    [
        ("gemma2", "caps its attention scores, but there is no attention kernel for packed sequences on cpu"),
        ("gpt_oss", r"more than causal attention \(s_aux\)"),
        ("lfm2", r"layers that are not plain causal attention \(conv\)"),
        ("bloom", "does not let its attention be chosen"),
        ("bart", "no mask of padding"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_the_cure(name, why):
    made = model(name)
    with pytest.raises(UserError, match=f"({why}).*--padding_free False"):
        attention.choose(made, True, IDS)


def forward_of_llama(change):
    """A Llama whose trunk's output is changed."""
    made = model("llama")
    original = made.model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.last_hidden_state = change(output.last_hidden_state, kwargs)
        return output

    made.model.forward = forward
    return made


def test_a_model_that_mixes_neighbours_is_refused():
    made = forward_of_llama(lambda h, _: h + 1e-3 * h.roll(1, dims=1))  # as a convolution over the pack does
    with pytest.raises(UserError, match="does not keep packed sequences apart"):
        attention.choose(made, True, IDS)


def test_in_half_precision_a_leak_is_told_from_rounding():
    made = forward_of_llama(lambda h, _: h + 0.03 * h.roll(1, dims=1)).bfloat16()
    attention.enable(made)
    with pytest.raises(UserError, match="does not keep packed sequences apart"):
        attention.check_packing(made, IDS[:5], IDS[5:])
    made = model("llama").bfloat16()
    attention.enable(made)
    attention.check_packing(made, IDS[:5], IDS[5:])


def test_a_model_that_ignores_positions_is_refused():
    made = model("gpt2")
    original = made.transformer.forward
    made.transformer.forward = lambda position_ids=None, **kwargs: original(**kwargs)
    with pytest.raises(UserError, match="does not keep packed sequences apart"):
        attention.choose(made, True, IDS)


def test_a_model_that_takes_no_positions_is_refused():
    made = model("llama")
    original = made.model.forward
    made.model.forward = lambda input_ids, use_cache: original(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(UserError, match="does not take packed sequences.*position_ids"):
        attention.choose(made, True, IDS)


def test_a_padded_batch_never_reaches_packed_attention():
    made, ids = packing(model("llama")), torch.tensor([[4, 5], [6, 0]])
    with pytest.raises(UserError, match="boundaries"):
        made(ids)
    with pytest.raises(UserError, match="mask of padding"):
        made(ids, attention_mask=torch.tensor([[1, 1], [1, 0]]))


@pytest.mark.parametrize(
    "extra, why",
    [
        ({"dropout": 0.1}, "dropout"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(2)}, "position_bias"),
        ({"is_causal": False}, "is_causal=False"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "attention_mask"),
    ],
)
def test_what_attention_does_not_know_is_refused(extra, why):
    x = torch.randn(1, 2, 4, 8)
    arguments = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 4]), "max_length_q": 4, "use_cache": False}
    attention.attention(torch.nn.Identity(), x, x, x, **arguments)
    with pytest.raises(UserError, match=why):
        attention.attention(torch.nn.Identity(), x, x, x, **(arguments | extra))


def test_a_mask_that_is_more_than_causal_is_refused():
    assert attention.no_mask(batch_size=1, attention_mask=None) is None
    with pytest.raises(UserError, match="not plain causal"):
        attention.no_mask(batch_size=1, attention_mask=None, use_vmap=True)


# choosing


def test_nobody_packs_without_a_kernel_unless_asked(caplog):
    caplog.set_level(logging.INFO)
    made = model("llama")
    assert not attention.choose(made, None, IDS) and not attention.packs(made)
    assert "batches are padded: there is no attention kernel for packed sequences on cpu" in caplog.text
    assert not attention.choose(made, False, IDS) and not attention.packs(made)
    assert attention.choose(made, True, IDS) and attention.packs(made)


def with_kernel(monkeypatch):
    """A machine that has a kernel for packed sequences."""
    kernel = lambda q, k, v, cu, longest, scaling, window, _: attention._by_length(  # noqa: E731
        q, k, v, cu.diff().tolist(), scaling, window
    )
    monkeypatch.setattr(attention, "_fused", lambda *_: (kernel, None))


def test_a_kernel_is_used_where_there_is_one(monkeypatch):
    with_kernel(monkeypatch)
    made = model("llama")
    assert attention.choose(made, None, IDS) and attention.packs(made)


def test_a_model_that_cannot_be_packed_is_padded_when_nobody_insists(monkeypatch, caplog):
    with_kernel(monkeypatch)
    made = forward_of_llama(lambda h, _: h + 1e-3 * h.roll(1, dims=1))
    before = made.config._attn_implementation
    assert not attention.choose(made, None, IDS)
    assert "batches are padded: LlamaForCausalLM does not keep packed sequences apart" in caplog.text
    assert made.config._attn_implementation == before


def test_generating_uses_the_models_own_attention_and_leaves_it_packing():
    made = model("mistral")
    requests = [Request(prompt, (0,)) for prompt in ([4, 5, 6], [7], [8, 9, 10, 11, 12])]
    arguments = requests, Sampling(temperature=0.0, max_new_tokens=8)
    options = {"stop_ids": [2], "pad_id": 0, "quiet": True}
    copied = packing(made)
    assert list(generate(copied, *arguments, **options)) == list(generate(made, *arguments, **options))
    assert attention.packs(copied) and not attention.packs(made)


def test_a_model_under_a_wrapper_is_found():
    wrapped = torch.nn.Sequential(model("llama"))
    attention.enable(wrapped)
    assert attention.packs(wrapped) and attention.packs(wrapped[0])
    with attention.unpacked(wrapped):
        assert not attention.packs(wrapped[0])


def test_a_value_model_inherits_packing_and_can_be_unpacked():
    critic = critic_of(packing(model("llama")))
    assert attention.packs(critic)
    with attention.unpacked(critic):
        assert critic(torch.tensor([[4, 5]])).logits.shape == (1, 2, 1)


def test_packing_is_not_saved_with_the_model(tmp_path):
    made = packing(model("llama"))
    made.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert not attention.packs(type(made).from_pretrained(tmp_path))


def test_a_model_with_heads_of_several_sizes_says_why_its_batches_are_padded():
    config = small_config("gemma4_text")
    assert attention._head_dim(config) == max(
        layer.head_dim for layer in (config.per_layer_config[i] for i in range(2))
    )
    assert "no attention kernel" in attention.unavailable(config, torch.device("cpu"), torch.float32)


def test_on_a_cpu_wide_models_are_packed_and_narrow_ones_are_padded(monkeypatch):
    cpu, chosen = torch.device("cpu"), {}
    for name in ("llama", "gemma3", "gemma2", "lfm2"):
        made = model(name)
        assert attention.unavailable(made.config, cpu, torch.float32) is not None
        monkeypatch.setattr(attention, "WIDE", made.config.hidden_size)
        chosen[name] = attention.choose(made, None, [4, 5, 6, 7])
        assert attention.packs(made) == chosen[name]
        monkeypatch.undo()
    # one caps its scores, which torch's attention cannot, the other has layers that are no attention
    assert chosen == {"llama": True, "gemma3": True, "gemma2": False, "lfm2": False}
