import torch

from benchmarks.harness.tensors import Tensors


def test_storages_are_counted_once_while_they_live():
    before = torch.ones(50)
    with Tensors() as tensors:
        tensors.note(before)
        kept = torch.zeros(1000)
        view = kept[:10].view(2, 5)
        assert tensors.alive() == 4200
        gone = kept + 1
        del gone
        assert tensors.alive() == 4200 and tensors.take() == 8200
        assert tensors.take() == 4200  # what is left
        del kept
        assert tensors.alive() == 4200  # the view holds it
        del view
        assert tensors.alive() == 200


def test_what_a_backward_makes_is_seen_and_what_is_resized_has_its_size_of_now():
    weight = torch.ones(1000, requires_grad=True)
    with Tensors() as tensors:
        (weight * 2).sum().backward()
        assert tensors.alive() >= 4000  # the gradient
        weight.grad.untyped_storage().resize_(0)
        assert tensors.alive() < 4000


def test_parts_tell_where_the_most_was_made():
    def objective_sums():
        return torch.zeros(1000)

    with Tensors(parts=True) as tensors:
        kept = objective_sums()
    assert tensors.parts == {"activations": kept.nbytes}
