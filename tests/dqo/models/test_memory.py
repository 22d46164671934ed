import pytest
import torch

from dqo.errors import UserError, is_out_of_memory
from dqo.models.memory import in_memory

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"
    ),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("std::bad_alloc"),
]
OTHERS = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), UserError("out of memory"), KeyError("x")]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_memory_that_ran_out_is_known_in_all_its_forms(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        in_memory(lambda tokens: (_ for _ in ()).throw(error), 64, lambda tokens: tokens // 2, "step 1", "cpu")


def test_this_machine_says_it_in_one_of_these_forms():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", FULL, ids=str)
def test_the_work_is_done_again_from_the_same_random_state_and_said_once(error, caplog):
    seen = []

    def work(tokens):
        seen.append((tokens, torch.rand(1).item()))
        if tokens > 20:
            raise error
        return tokens

    assert in_memory(work, 64, lambda tokens: tokens // 2, "step 3", "cpu") == 16
    assert [tokens for tokens, _ in seen] == [64, 32, 16] and len({drawn for _, drawn in seen}) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("step 3: out of memory on cpu (peak ")
    assert (
        "micro-batches of up to 64 tokens. It was done again with up to 16, as all that follows; the result does not"
        in (record.getMessage())
    )
    assert record.getMessage().endswith("Begin with --max_batch_tokens 16")


def test_where_nothing_smaller_is_left_it_ends_in_one_line():
    def work(tokens):
        raise torch.OutOfMemoryError

    with pytest.raises(UserError) as caught:
        in_memory(work, 4, lambda tokens: tokens // 2 or None, "step 3", "cpu")
    said = str(caught.value)
    assert said.startswith("step 3: out of memory on cpu (peak ") and "\n" not in said
    assert "up to 1 tokens, although each holds one response, or those that stay together. --gradient_check" in said


def test_no_tensor_of_the_failed_try_is_held_during_the_next():
    import weakref

    held = []

    def work(tokens):
        assert not any(tensor() is not None for tensor in held)
        large = torch.zeros(tokens)
        held.append(weakref.ref(large))
        if tokens > 20:
            raise torch.OutOfMemoryError
        return tokens

    in_memory(work, 64, lambda tokens: tokens // 2, "step 3", "cpu")
    assert len(held) == 3
