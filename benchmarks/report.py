"""Writes benchmarks/RESULTS.md from the results files beside it.

python -m benchmarks.report             (--output - prints it)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.gpu import cuda_resources, section
from benchmarks.harness.units import COPY, UNITS, Unit

HERE = Path(__file__).parent
COMMANDS = {
    "cpu": "pytest benchmarks/ --benchmark-only --benchmark-json=benchmarks/results/cpu.json",
    "cuda": "python -m benchmarks.gpu",
}
TITLES = {"cpu": "CPU", "cuda": "GPU"}
IDENTITY = ("shape", "dtype", "variant", "mode")
READING = """\
Written by `python -m benchmarks.report`; nothing here is written by hand, and every case that was measured is shown.

- **ms** is the median; the implementations of a case run in turn, one round each.
- **GB/s** is the bytes that the operation must move (formulas below each table; N rows, V columns, E bytes an element) over that
  time, **of copy** its share of the bandwidth of a plain copy, bytes read plus bytes written, timed in the same rounds into a
  buffer already written to. Above 100 % the data stayed in cache.
- **TFLOP/s** is the multiplications and additions of the matrix products that the operation needs over that time, **of GEMMs**
  its share of the rate of those products alone, in the inputs' dtype and the same rounds, into buffers that are kept. Above
  100 % the library was faster on pieces of them.
- **tokens/s** counts every token of a training step, prompts included.
- **peak extra MB** (10^6 bytes) is memory beyond the inputs, results and gradients included;
  on the CPU, what torch's allocator gave.
- **time / ours** is a row's time over that of the backend that a user gets without asking (**bold**): above 1 ours is faster.
- **forward** runs without autograd; **backward** is the gradient alone; **both** a recording forward and its gradient;
  **graph** the replay of a captured CUDA graph.
"""


def three_digits(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def unit_of(entries: list[dict]) -> Unit:
    """What these rows of one operation count."""
    return next(unit for unit in UNITS if unit.rate in entries[0]["extra_info"])


def columns(unit: Unit) -> list[str]:
    return [*IDENTITY, "implementation", "ms", *unit.columns, "peak extra MB", "time / ours"]


def rows_of(entries: list[dict]) -> list[list[str]]:
    """Table cells, in the order of the file: case by case, mode by mode."""
    unit = unit_of(entries)
    ours = {_key(e): e["stats"]["median"] for e in entries if e["extra_info"]["default"]}
    ordered = {}
    for e in entries:
        ordered.setdefault(_key(e), []).append(e)
    cells = []
    for key, group in ordered.items():
        for e in group:
            info, median = e["extra_info"], e["stats"]["median"]
            name = f"**{info['implementation']}**" if info["default"] else info["implementation"]
            memory = info["peak_extra_bytes"]
            row = [*(str(info[c]) for c in IDENTITY), name, three_digits(1e3 * median)]
            row += [three_digits(info[unit.rate]), f"{100 * info[unit.share]:.3g} %" if unit.share in info else ""]
            row += [three_digits(None if memory is None else memory / 1e6)]
            row.append(three_digits(median / ours[key]) if key in ours and info["implementation"] != COPY else "")
            cells.append(row)
    return cells


def _key(e: dict) -> tuple:
    return tuple(e["extra_info"][name] for name in ("operation", "shape", "dtype", "variant", "mode"))


def table(cells: list[list[str]], titles: list[str]) -> list[str]:
    used = [i for i, _ in enumerate(titles) if any(row[i] for row in cells)]
    lines = [[titles[i] for i in used], ["---:" if i > 4 else "---" for i in used]]
    lines += [[row[i] for i in used] for row in cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def operation_section(name: str, entries: list[dict], left_out: dict) -> list[str]:
    unit, computes, formulas, notes = unit_of(entries), {}, {}, set()
    for e in entries:
        info = e["extra_info"]
        if info["note"]:
            notes.add(f"{info['implementation']}: {info['note']}")
        if info["implementation"] != COPY:
            computes[info["implementation"]] = info["computes"]
            mode = info["mode"].split(",")[0]
            formulas[f"{mode} {info['variant']}".strip()] = info[f"{unit.count}_formula"]
    for part, reasons in left_out.items():
        notes |= {f"{part.removeprefix(name).strip()} {who}: {why}" for who, why in reasons.items()}
    lines = [f"### {name}", "", *table(rows_of(entries), columns(unit))]
    for title, items in (
        ("What each computes", [f"{who}: {what}" for who, what in computes.items()]),
        (unit.title, [f"{mode}: {formula}" for mode, formula in formulas.items()]),
        ("Not measured", sorted(notes)),
    ):
        if items:
            lines += ["", f"{title}:", "", *(f"- {item}" for item in items)]
    return [*lines, ""]


def device_section(results: dict) -> list[str]:
    head = {name: results[name] for name in ("date", "commit", "cores", "threads", "python")} | results["versions"]
    head |= {"sizes": results["size"]}
    environment = "" if results["size"] == "default" else f"DQO_BENCH={results['size']} "
    lines = [f"## {TITLES[results['device_type']]}: {results['device']}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in head.items()) + ". Commands:", "", "```"]
    lines += [environment + results["command"], "python -m benchmarks.report", "```", ""]
    if "checks" in results:
        lines += section.head(results)
    for name in dict.fromkeys(e["extra_info"]["operation"] for e in results["benchmarks"]):
        entries = [e for e in results["benchmarks"] if e["extra_info"]["operation"] == name]
        left_out = {part: left for part, left in results["left_out"].items() if part.split()[0] == name}
        lines += operation_section(name, entries, left_out)
    return lines


def render(files: list[dict], resources: dict | None = None) -> str:
    lines = ["# Results", "", READING]
    for device_type, title in TITLES.items():
        found = [results for results in files if results["device_type"] == device_type]
        for results in found:
            lines += device_section(results)
        if not found:
            lines += [f"## {title}", "", "Not measured. The command:", "", "```", COMMANDS[device_type], "```", ""]
            lines += section.targets([]) if device_type == "cuda" else []
    lines += cuda_resources.section(resources) if resources else []
    return "\n".join(lines).rstrip() + "\n"


def load(directory: Path) -> list[dict]:
    files = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return [results for results in files if "benchmarks" in results]  # the other files are other reports'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", default=str(HERE / "RESULTS.md"))
    arguments = parser.parse_args()
    resources = arguments.results / cuda_resources.RESULTS.name
    text = render(load(arguments.results), json.loads(resources.read_text()) if resources.exists() else None)
    if arguments.output == "-":
        print(text, end="")
    else:
        Path(arguments.output).write_text(text)


if __name__ == "__main__":
    main()
