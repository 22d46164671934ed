"""The vLLM backend against a stand-in of vLLM's offline interface; vLLM itself is not installed where tests run."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from dqo.errors import UserError
from dqo.models.generate import Request, Sampling, in_order
from dqo.models.new import save
from dqo.sampling.backends import load_backend
from dqo.sampling.run import sample_rows
from tests.dqo.helpers import policy, tokenizer
from tests.dqo.sampling.test_run import options, rows_of


class SamplingParams:
    """Takes what vllm.SamplingParams takes, and nothing else."""

    def __init__(
        self, *, temperature=1.0, top_p=1.0, top_k=0, seed=None, stop_token_ids=None, ignore_eos=False, max_tokens=16,
        logprobs=None, detokenize=True,
    ):  # fmt: skip
        self.__dict__.update(vars())


class LLM:
    made = []

    def __init__(self, model, *, tokenizer, dtype, generation_config, logprobs_mode, **engine):
        self.arguments = {k: v for k, v in vars().items() if k not in ("self", "engine")} | engine
        self.calls = []
        LLM.made.append(self)

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        """The seed's digits, and at even seeds the end."""
        self.calls.append((prompts, sampling_params, lora_request))
        return [SimpleNamespace(outputs=[self.output(params)]) for params in sampling_params]

    def output(self, params):
        ids = [3 + int(digit) for digit in str(params.seed or 0)][: params.max_tokens]
        ended = (params.seed or 0) % 2 == 0
        ids[-1] = params.stop_token_ids[0] if ended else 5
        logprobs = [{token: SimpleNamespace(logprob=-0.5, rank=1), 18: SimpleNamespace(logprob=-0.1)} for token in ids]
        return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="stop" if ended else "length")


class LoRARequest:
    def __init__(self, lora_name, lora_int_id, lora_path):
        self.path = lora_path


@pytest.fixture
def vllm(monkeypatch):
    module, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams, module.__version__ = LLM, SamplingParams, "0.11.0"
    request.LoRARequest = LoRARequest
    for name, made in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, made)
    LLM.made.clear()
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm") / "model"
    save(policy(), tokenizer(), path)
    return path


def test_each_request_has_its_ids_its_seed_and_the_stops_that_training_knows(vllm, model):
    backend = load_backend("vllm", str(model), dtype="bfloat16", batch_size=2, tensor_parallel_size=4)
    requests = [Request([4, 5], ("a", i)) for i in range(5)]
    settings = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=6, seed=3)
    found = in_order(backend.generate(requests, settings, quiet=True))
    (llm,) = LLM.made
    assert llm.arguments == {
        "model": str(model),
        "tokenizer": str(model),
        "dtype": "bfloat16",
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "tensor_parallel_size": 4,
    }
    assert [len(prompts) for prompts, _, _ in llm.calls] == [2, 2, 1]
    given = [params for _, many, _ in llm.calls for params in many]
    assert len({params.seed for params in given}) == 5
    for params, response in zip(given, found):
        assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.7, 0.9, 5, 6)
        assert (params.stop_token_ids, params.ignore_eos, params.logprobs, params.detokenize) == ([2], True, 0, False)
        assert response.ended == (response.ids[-1] == 2) == (params.seed % 2 == 0)
        assert response.logprobs == [-0.5] * len(response.ids)
    again = in_order(backend.generate(requests[3:], settings, quiet=True))
    assert again == found[3:]  # the seed is the request's
    in_order(backend.generate(requests[:1], Sampling(temperature=0.0), quiet=True))
    greedy = llm.calls[-1][1][0]
    assert (greedy.temperature, greedy.seed, greedy.top_p, greedy.top_k) == (0.0, None, 1.0, 0)


def test_the_rows_are_those_of_the_other_backend_but_for_its_name(vllm, model, tmp_path):
    given = options(model, tmp_path, backend="vllm", gpu_memory_utilization=0.5)
    assert sample_rows(given, quiet=True).rows == 18
    assert LLM.made[0].arguments["gpu_memory_utilization"] == 0.5
    sample_rows(options(model, tmp_path, output_file=str(tmp_path / "other.jsonl")), quiet=True)
    rows, others = rows_of(tmp_path / "rollouts.jsonl"), rows_of(tmp_path / "other.jsonl")
    assert rows[0].keys() == others[0].keys() and rows[0]["sampling"].keys() == others[0]["sampling"].keys()
    assert {tuple(row["sampling"]["key"]) for row in rows} == {tuple(row["sampling"]["key"]) for row in others}
    assert (rows[0]["sampling"]["backend"], rows[0]["sampling"]["version"]) == ("vllm", "0.11.0")


@pytest.mark.parametrize("rank, given", [(4, 8), (9, 16), (64, 64)])
def test_an_adapter_is_loaded_beside_its_base(vllm, model, tmp_path, rank, given):
    values = {"base_model_name_or_path": str(model), "r": rank, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    backend = load_backend("vllm", str(tmp_path))
    in_order(backend.generate([Request([4], (0,))], Sampling(), quiet=True))
    (llm,) = LLM.made
    assert llm.arguments["model"] == llm.arguments["tokenizer"] == str(model)
    assert (llm.arguments["enable_lora"], llm.arguments["max_lora_rank"]) == (True, given)
    assert llm.calls[0][2].path == str(tmp_path)


def test_a_missing_and_an_old_vllm_are_named_with_the_cure(vllm, model, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.9.2")
    with pytest.raises(UserError, match=r"needs vllm>=0.10.2, and 0.9.2 is installed: pip install 'vllm>=0.10.2'"):
        load_backend("vllm", str(model))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"backend vllm needs the package vllm: pip install 'dqo\[vllm\]'"):
        load_backend("vllm", str(model))


@pytest.mark.parametrize("change", [{"finish_reason": "abort"}, {"token_ids": []}, {"logprobs": None}])
def test_a_response_that_is_not_whole_is_refused(vllm, model, monkeypatch, change):
    output = LLM.output
    monkeypatch.setattr(LLM, "output", lambda self, params: SimpleNamespace(**vars(output(self, params)) | change))
    with pytest.raises(UserError, match="vllm gave no whole response"):
        in_order(load_backend("vllm", str(model)).generate([Request([4], (0,))], Sampling(), quiet=True))
