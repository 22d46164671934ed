import torch
from torch import distributed as dist

from dqo.processes import Processes, add_over_processes, gather_objects


def test_one_process_needs_no_group():
    alone = Processes()
    sums = {"loss": torch.tensor([3.0, 2.0]), "value/min": torch.tensor(-1.0)}
    assert add_over_processes(sums, alone) is sums
    assert gather_objects([1, 2], alone) == [1, 2]
    assert alone.main and alone.largest(3) == 3 and alone.from_main(lambda: 4) == 4
    alone.barrier()


def test_a_launcher_of_one_process_has_a_group_that_is_left(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    Processes().leave()
    assert not dist.is_initialized()
    Processes().leave()  # nothing to leave
