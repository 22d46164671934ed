"""Every size of a tile that is tried makes launches of that size, and leaves the results what they are."""

import pytest
import torch

from benchmarks.gpu import tile_sizes
from dqo_kernels import token_stats_triton as kernels

META = torch.device("meta")


@pytest.mark.parametrize("size", tile_sizes.SIZES, ids=str)
def test_a_size_reaches_the_launch(size, monkeypatch):
    x = tile_sizes.Inputs.made(4, tile_sizes.VOCAB, torch.float32, META)
    saved = kernels.forward_launches(x.logits, x.actions, x.ref_logits, None, None, 1.0, 0.0)[0].saved()
    for tile, two in tile_sizes.KINDS.values():
        monkeypatch.setitem(kernels.TILES, tile, size)
        _, _, arguments, options = tile_sizes.launches(tile, two, x, saved)[0]
        assert (arguments["BLOCK"], options["num_warps"]) == size
        assert (arguments["ref_ptr"] is not None) == two


@pytest.mark.parametrize("size", [(1024, 2), (16384, 16)], ids=str)
def test_a_size_changes_no_result(size, monkeypatch):
    x = tile_sizes.Inputs.made(3, 5000, torch.float32, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    plain = (None, None, 1.0, 0.0)

    def results():
        stats = kernels.fwd(x.logits, x.actions, x.ref_logits, *plain)
        upstream = (x.upstream, None, None, x.upstream)
        return stats, kernels.bwd(x.logits, x.actions, x.ref_logits, *plain, *stats.saved(), *upstream)

    want, want_gradient = results()
    for tile in kernels.TILES:
        monkeypatch.setitem(kernels.TILES, tile, size)
    got, gradient = results()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-6)
