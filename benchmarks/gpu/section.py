"""What RESULTS.md says of a GPU beside its tables: the checks, the targets, what was left out, and ncu's findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

NOT_MEASURED = "not measured"
NOT_NATIVE = (None, "reference")  # of backends: no target is about peers and definitions


class Target(NamedTuple):
    text: str
    where: tuple[str, str, str, str, str]  # operation, shape, dtype, variant, mode
    reads: Callable[[dict], tuple[str, bool]]  # of a row of the results: what to show, and whether that is enough


def _share(field: str, ceiling: str, least: float):
    def reads(row: dict) -> tuple[str, bool]:
        share = row["extra_info"][field]
        return f"{100 * share:.3g} % of {ceiling}", share >= least

    return reads


def _over_floor(most: float):
    def reads(row: dict) -> tuple[str, bool]:
        factor = 1 / row["extra_info"]["share_of_copy"]  # the formula of these cases is the floor
        return f"{factor:.3g} of the floor", factor <= most

    return reads


def _microseconds(most: float):
    def reads(row: dict) -> tuple[str, bool]:
        found = 1e6 * row["stats"]["median"]
        return f"{found:.3g} us", found <= most

    return reads


STATS = ("token_stats", "8192x151936", "bfloat16", "kl")
LOSS = ("soft_bellman_loss", "32x256x151936", "bfloat16")
LINEAR = ("linear_soft_bellman_loss", "8192x4096x151936", "bfloat16", "policy")
TARGETS = (
    Target(
        "statistics of two models, 8192 x 151936 in bfloat16: at least 90 % of the bandwidth of a copy",
        (*STATS, "forward"),
        _share("share_of_copy", "copy", 0.90),
    ),
    Target(
        "their backward with the exact KL: at least 85 %",
        (*STATS, "backward"),
        _share("share_of_copy", "copy", 0.85),
    ),
    Target(
        "loss and gradient in one pass, 8192 x 151936 in bfloat16, the reference's log-probabilities given: "
        "at most 1.3 times the floor of 4 bytes an element (read z, write dz)",
        (*LOSS, "given, suffix", "both"),
        _over_floor(1.3),
    ),
    Target(
        "the same with the exact KL: at most 1.3 times the floor of 6 bytes (read z, z_ref, write dz)",
        (*LOSS, "kl, suffix", "both"),
        _over_floor(1.3),
    ),
    Target(
        "loss and gradient from hidden states, N 8192, D 4096, V 151936 in bfloat16: "
        "at least 90 % of the rate of the three bare matrix products",
        (*LINEAR, "both"),
        _share("share_of_gemms", "the GEMMs", 0.90),
    ),
    Target(
        "scan, weights and losses of 32 x 1024 tokens: at most 15 us of device time in a captured graph",
        ("soft_bellman", "32x1024", "float32", "", "forward, graph"),
        _microseconds(15.0),
    ),
)


def _where(row: dict) -> tuple:
    return tuple(row["extra_info"][name] for name in ("operation", "shape", "dtype", "variant", "mode"))


def _cells(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def targets(rows: list[dict]) -> list[str]:
    """A table: of each target what the fastest of our backends reached."""
    cells = [["target", "measured", "backend", "met"], ["---"] * 4]
    for target in TARGETS:
        ours = [r for r in rows if _where(r) == target.where and r["extra_info"]["backend"] not in NOT_NATIVE]
        if not ours:
            cells.append([target.text, NOT_MEASURED, "", ""])
            continue
        best = min(ours, key=lambda r: r["stats"]["median"])
        found, met = target.reads(best)
        cells.append([target.text, found, best["extra_info"]["backend"], "yes" if met else "no"])
    return ["### Targets", "", *_cells(cells), ""]


def _verdict(name: str, record: dict) -> str:
    """A line for a check."""
    if "passed" in record:  # the tests
        found = f"{record['passed']} passed, {record['skipped']} skipped, {record['failed']} failed"
        skips = "; ".join(f"{reason} ({count})" for reason, count in record["reasons"].items())
        return f"{name}: {found}" + (f". Skipped: {skips}" if skips else "")
    word = "" if record["outcome"] == "passed" else f"{record['outcome']}: "
    kernels = ", ".join(record.get("kernels", ()))
    return f"{name}: {word}{record['detail']}" + (f", in {kernels}" if kernels else "")


def checks(results: dict) -> list[str]:
    """What passed before anything was measured, what could not be tried, and what is not over yet."""
    lines = [_verdict(name, record) for name, record in results["checks"].items()]
    for record in results["checks"].values():
        lines += [f"failed: {name}" for name in record.get("failures", ())]
    lines += [f"not finished: {name}: {reason}" for name, reason in results["not_finished"].items()]
    return ["### Checks", "", *(f"- {line}" for line in lines), ""] if lines else []


def left_out(results: dict) -> list[str]:
    """Who was not measured and why, over all cases."""
    reasons = Counter(f"{who}: {why}" for left in results["left_out"].values() for who, why in left.items())
    lines = [f"- {reason} ({count} {'case' if count == 1 else 'cases'})" for reason, count in sorted(reasons.items())]
    return ["### Left out", "", *lines, ""] if lines else []


def profile(results: dict) -> list[str]:
    """What ncu counted in one forward and backward of each operation."""
    titles = ["operation", "kernel", "launches", "us", "dram", "registers", "occupancy"]
    cells, reasons = [titles, ["---", "---", *["---:"] * 5]], []
    for name, record in results["profile"].items():
        if record["outcome"] != "passed":
            reasons.append(f"- {name}: {record['outcome']}: {record['detail']}")
        for kernel in record.get("kernels", ()):
            shown = [
                kernel[key] for key in ("launches", "microseconds", "dram_percent", "registers", "occupancy_percent")
            ]
            values = ["" if value is None else f"{value:.4g}" for value in shown]
            values[2], values[4] = (f"{value} %" if value else "" for value in (values[2], values[4]))
            cells.append([name, f"`{kernel['kernel'].replace('|', '/')}`", *values])
    if not results["profile"]:
        return []
    return ["### Kernels", "", *(_cells(cells) if len(cells) > 2 else ()), *reasons, ""]


def head(results: dict) -> list[str]:
    """The start of the section of a results file that `python -m benchmarks.gpu` wrote."""
    return [*checks(results), *targets(results["benchmarks"]), *profile(results), *left_out(results)]
