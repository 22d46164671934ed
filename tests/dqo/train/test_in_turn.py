"""Exchanges of shards on CPUs give what gloo's own do, and keep nothing."""

import os

import pytest
import torch
import torch.distributed as dist

from dqo.train.in_turn import AllGather, ReduceScatter
from tests.dqo import forked


def compared(variables):
    os.environ.update(variables)
    dist.init_process_group("gloo")
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    for seed, (rows, dtype) in enumerate([(1, torch.float32), (1000, torch.bfloat16), (70_001, torch.float32)]):
        torch.manual_seed(world * seed + rank)
        mine = torch.randn(rows).to(dtype)
        whole, expected = (torch.empty(world * rows, dtype=dtype) for _ in range(2))
        place = whole.chunk(world)[rank]
        place.copy_(mine)
        work = AllGather()(whole, place if seed else mine, group)
        assert isinstance(work, dist.Work)  # by which FSDP2 gives the buffer back at once
        dist.all_gather_into_tensor(expected, mine, group=group)
        assert torch.equal(whole, expected)

        gradients, mean, total = torch.randn(world * rows), torch.empty(rows), torch.empty(rows)
        by_all = gradients.double()
        dist.all_reduce(by_all)
        wanted = by_all.chunk(world)[rank]
        again = gradients.clone()
        ReduceScatter()(mean, gradients, group, dist.ReduceOp.AVG)
        ReduceScatter()(total, again, group, dist.ReduceOp.SUM)
        assert torch.allclose(total.double(), wanted, atol=1e-6) and torch.equal(mean, total / world)
        assert gradients.untyped_storage().nbytes() == again.untyped_storage().nbytes() == 0
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_they_give_what_gloo_gives(world):
    running = [forked.start(compared, variables) for variables in forked.ranks(world)]
    assert [forked.ended(process) for process in running] == [0] * world
