"""Exchanges of shards on CPUs give what gloo's own do, and keep nothing."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dqo.train.in_turn import AllGather, ReduceScatter, TableGradient
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


def looked_up(variables):
    os.environ.update(variables)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for rows, padding, at_once, kind in [
        (7, None, 1, torch.float32),
        (64, 3, 64, torch.float32),
        (2, 0, 9, torch.bfloat16),
    ]:
        torch.manual_seed(rows)
        plain = nn.Embedding(rows, 5, padding)
        table = nn.Embedding(rows, 5, padding, _weight=plain.weight.detach().clone())
        outer = nn.Sequential(table)
        precision = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(table, mesh=mesh, mp_policy=precision).set_unshard_in_backward(False)
        TableGradient(table, at_once)
        fully_shard(outer, mesh=mesh, mp_policy=precision)
        for _ in range(2):  # gradients are added
            ids = torch.randint(rows, (world, 3, 4))
            factors = torch.randn(world, 3, 4, 5).to(kind)
            found = outer(ids[rank])
            assert torch.equal(found, plain.weight.to(kind)[ids[rank]])
            (found * factors[rank]).sum().backward()
            (plain(ids) * factors).float().sum().div(world).backward()
            assert table.weight.grad.dtype == torch.float32
            assert torch.allclose(table.weight.grad.full_tensor(), plain.weight.grad, atol=1e-6)
        with torch.no_grad():
            assert not outer(ids[rank]).requires_grad
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_table_gets_the_gradient_that_one_process_computes(world):
    """Also of fewer rows than processes, rows that divide by no process, a row for padding, and pieces of one row."""
    running = [forked.start(looked_up, variables) for variables in forked.ranks(world)]
    assert [forked.ended(process) for process in running] == [0] * world
