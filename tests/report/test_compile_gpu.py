"""The published programs compiled for GPUs that are not there: what they hold, start and move.

Run where the extra `gpu-compiler` is installed (`.ci/run` does so), else skipped.
"""

import importlib.util
import json
import re

import pytest
import tiny

from vnca.report import compile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("jax_cuda12_plugin"),
        reason="the extra gpu-compiler is not installed",
    ),
]

# By JAX 0.10.2: bytes of temporaries, kernels, bytes moved, estimated seconds; of an update (the
# non-doubling model's with all of its 63 steps), and of one sample of 16 images.
COUNTED = {
    ("h100", "doubling", "update"): (3.73e9, 1672, 34.23e9, 16.80e-3),
    ("h100", "doubling", "evaluation"): (0.072e9, 594, 6.15e9, 11.34e-3),
    ("h100", "nondoubling", "update"): (8.77e9, 745, 88.78e9, 45.79e-3),
    ("h100", "baseline", "update"): (0.115e9, 167, 1.072e9, 0.668e-3),
    ("t4", "doubling", "update"): (3.79e9, 1806, 37.84e9, 557.1e-3),
}
FLOP = {"doubling": 2.489e12, "nondoubling": 8.16e12, "baseline": 0.0415e12}  # counted by hand
FIGURES = "temporaries_bytes", "kernels", "bytes", "seconds"


def compiled(topology, name, workdir):
    """compile.json of a published config."""
    flags = f"--mode=compile --topology={topology} --workdir={workdir} --config.eval.chunk=16"
    command = "main.py", f"--config=configs/{name}.py", *flags.split()
    with tiny.Process(*command, JAX_PLATFORMS="") as run:
        assert (run.end(timeout=400), run.complained()) == (0, "")  # of a missing driver, nothing
    return json.loads((workdir / "compile.json").read_text())


@pytest.mark.parametrize(
    ("topology", "name"),
    [
        ("h100", "nondoubling"),
        ("h100", "baseline"),
        *((card, "doubling") for card in compile.CARDS),
    ],
)
def test_the_published_programs_hold_start_and_move_no_more_than_they_did(topology, name, tmp_path):
    found = compiled(topology, name, tmp_path)
    for program in "update", "evaluation":
        text = (tmp_path / f"{program}.hlo.txt").read_text()
        # Loops of unknown length: over updates or samples, no other.
        assert text.count(" while(") - text.count('"known_trip_count"') == 1
        assert "all-reduce" not in text
        for figure, most in zip(FIGURES, COUNTED.get((topology, name, program), ()), strict=False):
            assert 0.9 * most < found[f"{program}_{figure}"] <= 1.05 * most, figure
    assert found["update_flops"] >= 0.995 * FLOP[name]
    assert found["update_fits"] and found["evaluation_fits"]


def test_the_gradient_of_eight_cards_is_one_all_reduce(tmp_path):
    assert compiled("h100:8", "baseline", tmp_path)["devices"] == 8
    text = (tmp_path / "update.hlo.txt").read_text()
    [result] = re.findall(r" = (.*) all-reduce(?:-start)?\(", text)
    assert compile.size(result) == 4 * (10_282_497 + 3)
