"""The look-back protocol of the one-pass kernel: no deadlock, no lost state, no bit that depends on who came first.

csrc/cuda/look_back.cuh runs under the emulation, where threads go on in random order, workers start in any order, and what a
thread has stored without releasing it comes into sight late and out of order. Each defect below is planted into a copy of it and
must be found, so that passing means something. (What a GPU's memory does beyond that model only a GPU can show.)
"""

import subprocess

import pytest

from tests.kernels.cuda_emulated import EMULATION, FLAGS, ROOT, compiler, missing

SOURCE = ROOT / "csrc" / "cuda" / "look_back.cuh"
BATCHES = "300"
DEFECTS = {  # what is replaced by what, and what the harness says then
    "the flag before what it announces": (
        {
            "    store_relaxed(&slot.value[2], c);\n    store_release(&slot.flag, kFull);": (
                "    store_release(&slot.flag, kFull);\n    store_relaxed(&slot.value[2], c);"
            )
        },
        "a wrong state",
    ),
    "a flag that does not release": (
        {"    store_release(&slot.flag, kFull);": "    slot.flag = kFull;"},
        "a wrong state",
    ),
    "nobody waits for a map": (
        {"    if (wait_for(slot) == kPasses) return {};": "    if (slot.flag == kPasses) return {};"},
        "a wrong state",
    ),
    "nobody waits for a state": ({"    wait_for(slot);\n    return {": "    return {"}, "a wrong state"),
    "tickets forward in time": (
        {
            "return rows - 1 - take_ticket(w.tickets);": (
                "const std::int64_t t = take_ticket(w.tickets); return t < rows ? t : -1;"
            )
        },
        "deadlock",
    ),
    "the last row of a tile keeps its state": (
        {"if (place == kScanTile - 1 && lane": "if (false && lane"},
        "deadlock",
    ),
    "a tile too early": ({"position < kScanTile ?": "position <= kScanTile ?"}, "a wrong state"),
    "rows of the tile in the wrong order": ({"w.maps[first - lane]": "w.maps[row + 1 + lane]"}, "a wrong state"),
    "a row that does not count is forgotten": (
        {"        if (own.keeps != 0)\n": "        if (false)\n"},
        "a wrong state",
    ),
    "slots keep what an earlier call left": (
        {"    w.maps[row].flag = w.states[row].flag = kEmpty;\n": ""},
        "a wrong state",
    ),
    "the first ticket is not 0": ({"    if (row == 0) *w.tickets = 0;\n": ""}, "a wrong state"),
    "any state that is there already is taken": (
        {
            "    return from_lane(before_lane(scanned), place)(state);": (
                "    const bool early = place > 0 && from_lane(lane == 0 && load_acquire(&w.states[row + 1].flag) == kFull, 0);\n"
                "    const ScanState usual = from_lane(before_lane(scanned), place)(state);\n"
                "    const ScanState got = early ? published_state(w.states[row + 1]) : usual;\n"
                "    const ScanState after = own(got);\n"
                "    if (lane == 0 && place != kScanTile - 1) publish(w.states[row], after.y, after.v, after.x);\n"
                "    return got;"
            ),
        },
        "the order shows in the bits",
    ),
}


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """What no defect changes, compiled once."""
    target = tmp_path_factory.mktemp("emulation") / "cuda_emulation.o"
    subprocess.run([compiler(), *FLAGS, "-c", EMULATION / "cuda_emulation.cpp", "-o", target], check=True, timeout=600)
    return target


def run(folder, source: str, emulation) -> subprocess.CompletedProcess:
    (folder / "cuda").mkdir()
    (folder / "cuda" / "look_back.cuh").write_text(source)
    units = [EMULATION / "look_back_harness.cpp", emulation]
    command = [compiler(), f"-I{folder}", *FLAGS, *map(str, units), "-o", str(folder / "harness")]
    subprocess.run(command, check=True, timeout=600)
    return subprocess.run([folder / "harness", "1", BATCHES], capture_output=True, text=True, timeout=600)


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def test_every_row_receives_its_state(tmp_path, emulation):
    done = run(tmp_path, SOURCE.read_text(), emulation)
    assert done.returncode == 0, done.stdout
    assert f"{BATCHES} batches passed" in done.stdout


@pytest.mark.parametrize("defect", list(DEFECTS))
def test_a_planted_defect_is_found(tmp_path, emulation, defect):
    replacements, said = DEFECTS[defect]
    source = SOURCE.read_text()
    for old, new in replacements.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    done = run(tmp_path, source, emulation)
    assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr
