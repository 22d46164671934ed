"""Rows of logits cut over the processes of a group: each holds consecutive columns of V, in the order of its rank.

A process computes the statistics of its own columns as if they were a whole distribution; five numbers a row are gathered, nine
with a reference, and every process merges them to the same result. With P_k the mass of slice k (ln P_k from peak and ln sum, so
that no large lse is subtracted), H_k, KL_k the statistics within it:
    logprob = logprob_k + ln P_k of the slice that holds the action
    entropy = sum_k P_k*(H_k - ln P_k),   KL = sum_k P_k*(KL_k + ln P_k - ln P_ref,k)
The backward is local: the row kernel runs on its own columns with the merged statistics (token_stats.py has the equation).

Every process computes the same loss from the merged rows. What they share (the hidden states) gets the sum of their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dqo_kernels.core import checks, library
from dqo_kernels.core.row_stats import Coefficients, RowStats, SavedStats, mapped

NO_DISTRIBUTION = -torch.inf  # the peak of a slice of nothing but -inf


@dataclass(frozen=True)
class VocabSlices:
    """This process's columns [first, last) of `vocab`, and the widest slice that any process holds."""

    group: dist.ProcessGroup
    first: int
    last: int
    vocab: int
    widest: int

    @classmethod
    def of(cls, group, columns: int, rows: int, like: Tensor) -> VocabSlices | None:
        """From what every process holds, which is gathered and read on the host; None without a group.

        Raises:
            ValueError: not a group, or processes that do not have the same rows.
        """
        if group is None:
            return None
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            checks.fail("group", "a torch.distributed process group or None", type(group).__name__)
        own = torch.tensor([columns, rows], device=like.device)
        held = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(held, own, group=group)
        widths, counts = zip(*(x.tolist() for x in held))
        if len(set(counts)) > 1:
            checks.fail("group", "the same rows in every process, and a slice of V", f"{list(counts)} rows")
        first = sum(widths[: dist.get_rank(group)])
        return cls(group, first, first + columns, sum(widths), max(widths))

    def local(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(which actions are here, their columns here). Other processes' actions get column 0, ids outside V keep -1."""
        here = (actions >= self.first) & (actions < self.last)
        elsewhere = torch.where((actions >= 0) & (actions < self.vocab), 0, -1)
        return here, torch.where(here, actions - self.first, elsewhere)

    def peak(self, x: Tensor) -> Tensor:
        """The largest of all processes; no gradient."""
        x = x.detach().clone()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes; each differentiates its own part."""
        return _Total.apply(x, self.group)

    def shared(self, x: Tensor) -> Tensor:
        """x itself, which all processes hold; its gradient is the sum of theirs."""
        return _Shared.apply(x, self.group)

    def merged(self, stats: RowStats, here: Tensor, temperature: float | Tensor) -> RowStats:
        """The statistics of whole rows, from those of this process's columns."""
        if not len(stats.logprobs):
            return stats
        has_ref = len(stats.ref_peak) > 0
        sent = [here.to(stats.peak.dtype), stats.peak, stats.log_total, stats.entropy, stats.logprobs]
        sent += [stats.ref_peak, stats.ref_log_total, stats.kl, stats.ref_logprobs] if has_ref else []
        own = torch.stack(sent)
        received = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(received, own, group=self.group)
        everyone = torch.stack(received, 1).double()  # (sent, process, row)
        held, peak, log_total, entropy, logprobs = everyone[:5]
        holders, slices = held != 0, _Masses.of(peak, log_total, temperature)
        merged = stats._replace(
            logprobs=slices.taken(logprobs, holders),
            lse=slices.lse(temperature),
            entropy=slices.expectation(entropy - slices.log_mass),
            peak=slices.peak,
            log_total=slices.log_total,
        )
        if has_ref:
            ref_peak, ref_log_total, kl, ref_logprobs = everyone[5:]
            ref = _Masses.of(ref_peak, ref_log_total, temperature)
            within = torch.where(ref_peak == NO_DISTRIBUTION, torch.inf, kl)
            merged = merged._replace(
                ref_logprobs=ref.taken(ref_logprobs, holders),
                ref_lse=ref.lse(temperature),
                kl=slices.expectation(within + (slices.log_mass - ref.log_mass)),
                ref_peak=ref.peak,
                ref_log_total=ref.log_total,
            )
        return mapped(lambda x: x.to(own.dtype), merged)

    @staticmethod
    def coefficients(here: Tensor, local_actions: Tensor, arriving: Coefficients) -> Coefficients:
        """For this process's columns. A row whose action another process holds has no gradient of its logit here: that of its
        log-probability is the one of -lse. An id outside V keeps its coefficient, for the row kernel to answer with NaN."""
        if arriving.logprobs is None:
            return arriving
        own = torch.where(here | (local_actions < 0), arriving.logprobs, 0)
        apart = own - arriving.logprobs
        return arriving._replace(logprobs=own, lse=apart if arriving.lse is None else arriving.lse + apart)


@dataclass
class _Masses:
    """One model's slices, (process, row) and merged (row,), in float64."""

    empty: Tensor
    log_mass: Tensor
    peak: Tensor
    log_total: Tensor

    @classmethod
    def of(cls, peaks: Tensor, log_totals: Tensor, temperature: float | Tensor) -> _Masses:
        empty, peak = peaks == NO_DISTRIBUTION, peaks.amax(0)
        logs = torch.where(empty, -torch.inf, (peaks - peak) / temperature + log_totals)
        log_total = torch.where(peak == NO_DISTRIBUTION, torch.nan, logs.logsumexp(0))
        return cls(empty, (logs - log_total).clamp(max=0), peak, log_total)

    def lse(self, temperature: float | Tensor) -> Tensor:
        return self.peak / temperature + self.log_total

    def taken(self, logprobs: Tensor, here: Tensor) -> Tensor:
        found = torch.where(self.empty, 0, logprobs) + self.log_mass
        return torch.where(here.any(0), torch.where(here, found, 0).sum(0), torch.nan)

    def expectation(self, x: Tensor) -> Tensor:
        mass = self.log_mass.exp()
        return torch.where(mass == 0, 0, mass * x).sum(0)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Rows(torch.autograd.Function):
    """The native token_stats of this process's columns, merged."""

    @staticmethod
    def forward(ctx, logits, ref_logits, mask, temperatures, actions, here, temperature, softcap, backend, slices):
        inputs = (logits, actions, ref_logits, mask, temperatures, temperature, softcap)
        stats = library.run("token_stats", "fwd", backend, *inputs)
        stats = slices.merged(stats, here, temperature if temperatures is None else temperatures)
        if mask is not None:
            stats = mapped(lambda x: torch.where(mask, x, 0) if len(x) else x, stats)
        ctx.save_for_backward(logits, ref_logits, mask, temperatures, actions, here, *stats.saved())
        ctx.options = temperature, softcap, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats.ref_logprobs, stats.ref_lse)
        return stats.shown()

    @staticmethod
    @library.once_differentiable("token_stats")
    def backward(ctx, c_logprobs, c_lse, c_entropy, _ref_logprobs, _ref_lse, c_kl):
        logits, ref_logits, mask, temperatures, actions, here, *saved = ctx.saved_tensors
        temperature, softcap, backend = ctx.options
        if ref_logits is None or c_kl is None:
            ref_logits = c_kl = None
        arriving = VocabSlices.coefficients(here, actions, Coefficients(c_logprobs, c_lse, c_entropy, c_kl))
        gradient = None
        if not arriving.are_absent():
            inputs = (logits, actions, ref_logits, mask, temperatures, temperature, softcap)
            coefficients = mapped(Tensor.contiguous, arriving)
            gradient = library.run("token_stats", "bwd", backend, *inputs, *SavedStats(*saved), *coefficients)
        return gradient, *[None] * 9


def sliced_rows(logits, actions, ref_logits, mask, temperatures, temperature, softcap, backend, slices):
    """(logprobs, lse, entropy, ref_logprobs, ref_lse, kl) of whole rows; arguments as those of the native token_stats."""
    here, local = slices.local(actions)
    return _Rows.apply(
        logits, ref_logits, mask, temperatures, local, here, temperature, softcap, backend, slices
    )  # fmt: skip
