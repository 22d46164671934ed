"""The kernels that take packed sequences whole get the right arguments: stand-ins on the CPU, themselves on a GPU."""

import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from dqo.data.batches import Batching, collate, groups_of, packed_inputs
from dqo.models import attention
from dqo.processes import Processes
from dqo.train.engine import Engine
from dqo.train.learner import Learner
from dqo.train.step import accumulate
from tests.dqo.helpers import episodes, gradients, hidden_rows
from tests.dqo.packing_models import WINDOW, model, objective_and_critic, packing

LENGTHS = [5, 1, 9, 5, 2]


def by_the_book(q, k, v, cu, scale, left, right, softcap=0.0):
    """Packed attention row by row: what the kernels' documentation says of their arguments."""
    assert cu.dtype == torch.int32 and q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0  # torch's kernel asks for it
    assert right == 0
    group, output = q.shape[1] // k.shape[1], torch.empty_like(q)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        for i in range(start, end):
            first = start if left < 0 else max(start, i - left)
            for h in range(q.shape[1]):
                scores = scale * k[first : i + 1, h // group] @ q[i, h]
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                output[i, h] = scores.softmax(0) @ v[first : i + 1, h // group]
    return output


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash-attn 2.7's signature."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return by_the_book(q, k, v, cu_seqlens_q, softmax_scale, *window_size, softcap)


def torch_varlen(*arguments, **options):
    """torch's signature, of the version that is here."""
    x = inspect.signature(varlen_attn).bind(*arguments, **options).arguments
    assert torch.equal(x["cu_seq_q"], x["cu_seq_k"])
    assert x["max_q"] == x["max_k"] == int(x["cu_seq_q"].diff().max())
    assert x.get("enable_gqa", False) == (x["query"].shape[1] != x["key"].shape[1])
    return by_the_book(x["query"], x["key"], x["value"], x["cu_seq_q"], x["scale"], *x["window_size"])


def torch_varlen_without_groups(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1]
    return by_the_book(query, key, value, cu_seq_q, scale, *window_size)


def use(monkeypatch, kernel):
    """A machine on which this kernel runs."""
    if kernel is flash_attn_varlen_func:
        adapter = attention._with_flash_attn
        monkeypatch.setattr(attention, "_flash_attn", lambda: kernel)
    else:
        adapter = attention._with_torch
        monkeypatch.setattr(attention, "_torch_varlen", lambda: kernel)
    monkeypatch.setattr(attention, "_fused", lambda *_: (adapter, None))


def inputs(heads=4, groups=2, width=6, value_width=6):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    shapes = [(heads, width), (groups, width), (groups, value_width)]
    states = [torch.randn(1, n, total, d, requires_grad=True) for n, d in shapes]
    found = packed_inputs(LENGTHS, "cpu")
    return states, {name: found[name] for name in ("cu_seq_lens_q", "max_length_q")}


kernels = pytest.mark.parametrize("kernel", [flash_attn_varlen_func, torch_varlen, torch_varlen_without_groups])


@kernels
@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
@pytest.mark.parametrize("shape", [{}, {"groups": 4}, {"width": 16, "value_width": 8}], ids=["gqa", "mha", "mla"])
def test_a_kernel_gives_what_scaled_dot_product_attention_gives(monkeypatch, kernel, window, shape):
    states, boundaries = inputs(**shape)
    module = torch.nn.Identity()
    expected, _ = attention.attention(module, *states, None, sliding_window=window, **boundaries)
    use(monkeypatch, kernel)
    found, _ = attention.attention(module, *states, None, sliding_window=window, **boundaries)
    assert found.shape == expected.shape == (1, sum(LENGTHS), 4, states[2].shape[-1])
    assert torch.allclose(found, expected, atol=1e-6)


@kernels
def test_gradients_through_the_arguments_are_those_of_scaled_dot_product_attention(monkeypatch, kernel):
    states, boundaries = inputs()
    upstream = torch.randn(1, sum(LENGTHS), 4, 6)

    def gradient():
        output, _ = attention.attention(torch.nn.Identity(), *states, None, scaling=0.3, sliding_window=3, **boundaries)
        return torch.autograd.grad(output, states, upstream)

    expected = gradient()
    use(monkeypatch, kernel)
    for found, wanted in zip(gradient(), expected):
        assert torch.allclose(found, wanted, atol=1e-5)


@kernels
@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_model_runs_on_the_kernels(monkeypatch, kernel, name):
    made, members = model(name), episodes(6)
    with torch.no_grad():
        padded = hidden_rows(made, collate(members, 0))
        use(monkeypatch, kernel)
        packed = hidden_rows(packing(made), collate(members, 0, packed=True))
    assert torch.allclose(packed, padded, atol=2e-5)


def test_a_cap_on_attention_scores_runs_on_flash_attn(monkeypatch):
    made, members = model("gemma2"), episodes(6)
    made.set_attn_implementation("eager")  # the only one of transformers' that caps on a CPU
    with torch.no_grad():
        padded = hidden_rows(made, collate(members, 0))
        use(monkeypatch, flash_attn_varlen_func)
        packed = hidden_rows(packing(made), collate(members, 0, packed=True))
        uncapped = model("gemma2")
        for layer in uncapped.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        without = hidden_rows(packing(uncapped), collate(members, 0, packed=True))
    assert torch.allclose(packed, padded, atol=2e-5)
    assert not torch.allclose(without, padded, atol=1e-2)


def test_under_autocast_a_kernel_gets_its_precision(monkeypatch):
    seen = []

    def kernel(q, k, v, *_):
        seen.append({x.dtype for x in (q, k, v)})
        return torch.zeros_like(q)

    monkeypatch.setattr(attention, "_fused", lambda *_: (kernel, None))
    with torch.no_grad():  # rotary embeddings make float32 of q and k
        hidden_rows(packing(model("llama")), collate(episodes(3), 0, packed=True), bf16=True)
    assert seen == [{torch.bfloat16}] * 2


# which kernel


CUDA = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: torch_varlen)


def reason(name="llama", device=CUDA, dtype=torch.bfloat16):
    return attention.unavailable(model(name).config, device, dtype)


def test_torchs_kernel_runs_in_half_precision_on_a_gpu(hopper):
    assert reason() is None and reason(dtype=torch.float16) is None
    assert attention._fused(CUDA, torch.bfloat16, 64, None) == (attention._with_torch, None)


def test_flash_attn_comes_first(hopper, monkeypatch):
    monkeypatch.setattr(attention, "_flash_attn", lambda: flash_attn_varlen_func)
    assert attention._fused(CUDA, torch.bfloat16, 64, 30.0) == (attention._with_flash_attn, None)
    assert reason("gemma2") is None


def test_why_there_is_no_kernel(hopper, monkeypatch):
    assert "no attention kernel for packed sequences on cpu" in reason(device=torch.device("cpu"))
    assert "bfloat16 or float16, not torch.float32" in reason(dtype=torch.float32)
    assert "needs flash-attn" in reason("gemma2")
    assert "not plain causal attention (conv)" in reason("lfm2")
    assert "up to 256 dimensions, not 512" in attention._fused(CUDA, torch.bfloat16, 512, None)[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "compute capability 8.0" in reason()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(attention, "_torch_varlen", lambda: None)
    assert "neither flash-attn nor torch.nn.attention.varlen" in reason()


def test_a_torch_whose_kernel_takes_no_window_is_not_used(monkeypatch):
    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError

    looked_for = attention._torch_varlen.__wrapped__  # without what it remembers
    assert looked_for() is varlen_attn
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_2_10)
    assert looked_for() is None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 100, 4096])
@pytest.mark.parametrize("shape", [(8, 2, 64, 64), (4, 4, 128, 128), (4, 2, 48, 24)], ids=str)
@pytest.mark.parametrize("adapter", [attention._with_flash_attn, attention._with_torch])
def test_the_kernels_themselves_on_a_gpu(monkeypatch, adapter, shape, window):
    found = attention._flash_attn() if adapter is attention._with_flash_attn else attention._torch_varlen()
    if found is None:
        pytest.skip("not installed")
    heads, groups, width, value_width = shape
    lengths = [700, 1, 33, 128, 700, 5]
    torch.manual_seed(0)
    states = [
        torch.randn(1, n, sum(lengths), d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n, d in ((heads, width), (groups, width), (groups, value_width))
    ]
    boundaries = {k: v for k, v in packed_inputs(lengths, "cuda").items() if k in ("cu_seq_lens_q", "max_length_q")}
    upstream = torch.randn(1, sum(lengths), heads, value_width, device="cuda")

    def run(*states):
        output, _ = attention.attention(torch.nn.Identity(), *states, None, sliding_window=window, **boundaries)
        return [output.detach(), *torch.autograd.grad(output, states, upstream.to(output.dtype))]

    expected = run(*(x.detach().float().requires_grad_() for x in states))  # float32: sequence by sequence
    monkeypatch.setattr(attention, "_fused", lambda *_: (adapter, None))
    for mine, wanted in zip(run(*states), expected):
        # Gradients of queries and keys are 0 where a token sees itself alone: rounding is measured by what arrives.
        assert (mine.float() - wanted).norm() <= 0.02 * max(wanted.norm(), upstream.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_on_a_gpu_packed_and_padded(name):
    made = model(name).cuda()
    objective, critic = objective_and_critic(name, made)
    learner = Learner(made, critic, bf16=True)

    def gradient():
        learner.zero_grad(set_to_none=True)
        batching = Batching(0, 10_000, "cuda", attention.packs(made))
        engine = Engine(learner, learner, batching, Processes(device=torch.device("cuda")))
        accumulate(engine, objective, groups_of(episodes(9), 1))
        return gradients(learner)

    padded = gradient()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert attention.choose(made, None, [5, 6, 7, 8, 9, 10, 11, 12])
    if critic is not None:
        attention.enable(critic)
    assert (gradient() - padded).norm() <= 0.05 * padded.norm()
    assert max(e.length for e in episodes(9)) > WINDOW
