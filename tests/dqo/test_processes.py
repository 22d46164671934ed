import torch

from dqo.processes import Processes, add_over_processes, gather_objects


def test_one_process_needs_no_group():
    alone = Processes()
    sums = {"loss": torch.tensor([3.0, 2.0]), "value/min": torch.tensor(-1.0)}
    assert add_over_processes(sums, alone) is sums
    assert gather_objects([1, 2], alone) == [1, 2]
    assert alone.main and alone.largest(3) == 3 and alone.from_main(lambda: 4) == 4
    alone.barrier()
