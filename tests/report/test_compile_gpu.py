"""The published programs compiled for GPUs that are not there: what they hold, start and move.

Run where the extra `gpu-compiler` is installed (`.ci/run` does so), else skipped.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vnca.program import VncaError
from vnca.program.arithmetic import update_flops
from vnca.program.machine import gpu_rate
from vnca.report import gpu

ROOT = Path(__file__).resolve().parents[2]


def is_installed():
    try:
        gpu.check_installed()
    except VncaError:
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="the extra gpu-compiler is not installed"),
]

# By JAX 0.10.2: bytes of temporaries, kernels, bytes moved, seconds of the floor; of an update (the
# non-doubling model's with all of its 63 steps), and of evaluation, one sample of 16 images.
COUNTED = {
    ("h100", "doubling", "update"): (3.73e9, 1675, 34.23e9, 16.81e-3),
    ("h100", "doubling", "evaluation"): (0.072e9, 619, 6.22e9, 11.44e-3),
    ("h100", "nondoubling", "update"): (8.77e9, 748, 88.78e9, 45.80e-3),
    ("h100", "baseline", "update"): (0.115e9, 170, 1.072e9, 0.675e-3),
    ("t4", "doubling", "update"): (3.79e9, 1806, 37.84e9, 557.1e-3),
}
FLOP = {"doubling": 2.489e12, "nondoubling": 8.16e12, "baseline": 0.0415e12}  # counted by hand


@pytest.mark.parametrize(
    "topology, name",
    [("h100", "nondoubling"), ("h100", "baseline"), *((card, "doubling") for card in gpu.CARDS)],
)
def test_the_published_programs_hold_start_and_move_no_more_than_they_did(topology, name, tmp_path):
    command = (
        "main.py", "--mode=compile", f"--topology={topology}", f"--config=configs/{name}.py",
        f"--workdir={tmp_path}", "--config.eval.chunk=16",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", *command], cwd=ROOT, capture_output=True, text=True,
        timeout=400, env=os.environ | {"JAX_PLATFORMS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "cuda" not in done.stderr
    found = json.loads((tmp_path / "compile.json").read_text())
    for program in "update", "evaluation":
        text = (tmp_path / f"{program}.hlo.txt").read_text()
        # Loops of unknown length: over updates or samples, no other.
        assert text.count(" while(") - text.count('"known_trip_count"') == 1
        assert not found[f"{program}_collectives"]
        if (topology, name, program) in COUNTED:
            memory, *counted = COUNTED[topology, name, program]
            assert found[f"{program}_memory"]["temporaries"] <= 1.05 * memory
            for figure, value in zip(("kernels", "bytes", "floor_seconds"), counted, strict=True):
                assert found[f"{program}_{figure}"] <= 1.05 * value, figure
    if name == "doubling":
        config = importlib.import_module("configs.doubling").get_config()
        rate = update_flops(config) / found["update_floor_seconds"]
        assert gpu_rate(gpu.CARDS[topology].name) == pytest.approx(rate, rel=0.01)
    assert found["update_flops"] >= 0.995 * FLOP[name]
    assert found["update_memory_bytes"] < 0.75 * found["memory_bytes_of_a_card"]


def test_the_gradient_of_eight_cards_is_one_all_reduce(tmp_path):
    command = (
        "main.py", "--mode=compile", "--topology=h100:8", "--config=configs/baseline.py",
        f"--workdir={tmp_path}",
    )  # fmt: skip
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, timeout=400)
    found = json.loads((tmp_path / "compile.json").read_text())
    assert found["devices"] == 8
    assert found["update_collectives"] == {"all-reduce": 1}
    assert found["update_collective_bytes"]["all-reduce"] == 4 * (10_282_497 + 3)
