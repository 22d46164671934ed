"""Two processes (with Triton) and three (the other backends) that hold a slice of V each, against one that holds all of it."""

import json

import pytest
import torch
import torch.distributed as dist

from dqo_kernels import token_stats
from dqo_kernels.core import dispatch
from dqo_kernels.core.row_stats import Coefficients
from dqo_kernels.core.vocab_parallel import VocabSlices
from tests.dqo import forked
from tests.kernels.core.vocab_parallel_cases import CASES, backends_of, main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
]


@pytest.fixture(scope="module", params=[2, 3])
def outcomes(request, tmp_path_factory):
    """{case: {backend: what each process said}}; all cases run in one start of the processes."""
    backends = [name for name in backends_of(request.param) if dispatch.unavailable(name) is None]
    if not backends:
        pytest.skip(f"none of {', '.join(backends_of(request.param))} runs here")
    place = tmp_path_factory.mktemp("group")
    arguments = request.param, str(place / "store"), str(place / "results")
    processes = [forked.start(main, rank, *arguments) for rank in range(request.param)]
    for process in processes:
        process.join(900)
        process.kill()
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    found = [json.loads((place / f"results.{rank}").read_text()) for rank in range(request.param)]
    return {
        case: {backend: [outcome[f"{case}-{backend}"] for outcome in found] for backend in backends} for case in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_the_processes_agree_with_one_process(outcomes, name):
    said = [(backend, rank, text) for backend, texts in outcomes[name].items() for rank, text in enumerate(texts)]
    assert not any(text for *_, text in said), "\n".join(
        f"{backend}, process {rank}: {text}" for backend, rank, text in said
    )


def test_what_is_no_group_is_refused():
    with pytest.raises(ValueError, match="group: expected a torch.distributed process group or None, got str"):
        token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), group="world")


def test_an_id_outside_the_vocabulary_is_left_for_the_row_kernel_to_answer_with_nan():
    slices = VocabSlices(None, first=2, last=5, vocab=7, widest=3)
    here, columns = slices.local(torch.tensor([-1, 0, 2, 4, 5, 7]))
    assert here.tolist() == [False, False, True, True, False, False]
    assert columns.tolist() == [-1, 0, 0, 2, 0, -1]
    ones = torch.ones(6)
    found = slices.coefficients(here, columns, Coefficients(logprobs=ones, lse=None, entropy=None, kl=None))
    assert found.logprobs.tolist() == [1, 0, 1, 1, 0, 1] and found.lse.tolist() == [0, -1, 0, 0, -1, 0]
    assert found.entropy is found.kl is None
