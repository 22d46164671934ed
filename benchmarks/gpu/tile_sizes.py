"""Times of the Triton kernels of token_stats by the size of their tiles, for the table of token_stats_triton.TILES.

    python -m benchmarks.gpu.tile_sizes         (a minute; most of it compiles)

Columns and warps of a tile are tried that leave 16 elements a thread or more. A time is that of the launches alone.
The logits are 4,096 rows of 151,936. A gradient is of the log-probability, or of it and the KL.
It is written in bfloat16, as the linear forms want it. Registers and spills are those of the first launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.run import the_device
from dqo_kernels import token_stats_triton as kernels

SIZES = (
    (1024, 2), (2048, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 4), (8192, 8), (8192, 16), (16384, 8), (16384, 16),
)  # fmt: skip
ROWS, VOCAB = 4096, 151936
DTYPES = (torch.bfloat16, torch.float32)
KINDS = {  # what is shown: (the tile in TILES, whether the reference is read)
    "one row": ("one row", False),
    "two rows": ("two rows", True),
    "gradient, one row": ("backward", False),
    "gradient, two rows": ("backward", True),
}


class Inputs(NamedTuple):
    logits: Tensor  # (N, V)
    ref_logits: Tensor  # (N, V)
    actions: Tensor  # (N,)
    upstream: Tensor  # (N,)
    room: Tensor  # (N, V) bfloat16, of a gradient

    @classmethod
    def made(cls, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        logits = torch.randn(rows, vocab, device=device, dtype=dtype)
        actions = torch.randint(0, vocab, (rows,), device=device)
        room = torch.empty(rows, vocab, device=device, dtype=torch.bfloat16)
        upstream = torch.randn(rows, device=device)
        return cls(logits, logits + 0.1 * torch.randn_like(logits), actions, upstream, room)


def launches(tile: str, two: bool, x: Inputs, saved: tuple) -> list[tuple]:
    """The launches of one kind, with the sizes that TILES has now."""
    plain = (None, None, 1.0, 0.0)  # no mask, no temperatures; temperature, softcap
    if tile != "backward":
        return kernels.forward_launches(x.logits, x.actions, x.ref_logits if two else None, *plain)[1]
    upstream = (x.upstream, None, None, x.upstream if two else None)  # of logprobs, lse, entropy, kl
    return kernels.backward_launches(x.logits, x.actions, x.ref_logits, *plain, *saved, *upstream, out=x.room)[1]


def timed(launched: list[tuple]) -> dict[str, float]:
    """{"ms", "registers", "spills"}."""
    from triton.testing import do_bench

    kernel, programs, arguments, options = launched[0]
    compiled = kernel[(programs,)](**arguments, **options)

    def run():
        for kernel, programs, arguments, options in launched:
            kernel[(programs,)](**arguments, **options)

    milliseconds = do_bench(run, warmup=5, rep=25, return_mode="median")
    return {"ms": milliseconds, "registers": compiled.n_regs, "spills": compiled.n_spills}


def main() -> None:
    device, chosen, found = the_device(), dict(kernels.TILES), {}
    for dtype in DTYPES:
        x = Inputs.made(ROWS, VOCAB, dtype, device)
        saved = kernels.fwd(x.logits, x.actions, x.ref_logits, None, None, 1.0, 0.0).saved()
        for kind, (tile, two) in KINDS.items():
            for size in SIZES:
                kernels.TILES[tile] = size
                found[kind, size, dtype] = timed(launches(tile, two, x, saved))
            kernels.TILES[tile] = chosen[tile]
    print(f"{torch.cuda.get_device_name(device)}: ms in bfloat16 / float32, registers, spills")
    for kind, (tile, _) in KINDS.items():
        print(kind)
        for size in SIZES:
            each = [found[kind, size, dtype] for dtype in DTYPES]
            times, registers, spills = (
                " / ".join(format(x[name], form) for x in each)
                for name, form in (("ms", ".3f"), ("registers", "d"), ("spills", "d"))
            )
            print(f"  {size!s:12} {times}   {registers}   {spills}{'   in use' if chosen[tile] == size else ''}")


if __name__ == "__main__":
    main()
