"""GPUs by name, the compiler that may be missing, and the floor of a kernel."""

import importlib
import importlib.metadata
import json
import os
import sys
from collections import Counter
from types import SimpleNamespace

import jaxlib.version
import pytest
import tiny

from vnca.program import VncaError
from vnca.program.arithmetic import update_flops
from vnca.program.machine import OTHER_GPU_RATE, fit_to_machine, gpu_rate
from vnca.program.quiet import quiet
from vnca.report import compile, gpu, kernels


def test_a_topology_is_a_card_and_how_many():
    assert gpu.is_card("h100") and gpu.is_card("H100:8") and not gpu.is_card("v5e:2x4")
    assert gpu.parse_topology("t4") == (gpu.CARDS["t4"], 1)
    assert gpu.parse_topology("h100:") == (gpu.CARDS["h100"], 1)
    assert gpu.parse_topology("h100:8") == (gpu.CARDS["h100"], 8)


@pytest.mark.parametrize("topology", ["h100:0", "h100:2x4", "h100:17"])
def test_a_number_of_cards_that_makes_no_sense_is_one_line(topology):
    with pytest.raises(VncaError, match=f"--topology={topology}: 1 to 16 cards"):
        gpu.parse_topology(topology)


def test_a_topology_that_is_neither_gpus_nor_tpus_is_one_line_that_lists_both(tmp_path):
    with pytest.raises(VncaError, match="--topology=h300: GPUs are t4, .* v5e:2x4"):
        gpu.compile_for("h300", None, tmp_path, print)


def installed(monkeypatch, versions):
    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)


ALL = {
    "jax-cuda12-plugin": jaxlib.version.__version__,
    "jax-cuda12-pjrt": jaxlib.version.__version__,
    "nvidia-cuda-nvcc-cu12": "12.9.86",
}


@pytest.mark.parametrize(
    "missing, found, words",
    [
        ("jax-cuda12-plugin", None, "it is not installed"),
        ("jax-cuda12-pjrt", "0.0.1", "0.0.1 is installed"),
        ("nvidia-cuda-nvcc-cu12", None, "it is not installed"),
    ],
)
def test_what_is_missing_or_of_another_version_is_one_line_with_the_command(
    missing, found, words, monkeypatch
):
    installed(monkeypatch, {k: v for k, v in (ALL | {missing: found}).items() if v})
    with pytest.raises(VncaError) as fault:
        gpu.check_installed()
    [line] = str(fault.value).splitlines()
    version = jaxlib.version.__version__
    assert f"needs {missing}" in line and words in line
    assert line.endswith(
        f"{sys.executable} -m pip install --no-deps jax-cuda12-plugin=={version} "
        f"jax-cuda12-pjrt=={version} nvidia-cuda-nvcc-cu12=={gpu.NVCC}"
    )


def test_all_that_is_needed_is_enough(monkeypatch):
    installed(monkeypatch, ALL)
    gpu.check_installed()


def kernel(size, flops, exact=False):
    return kernels.Kernel(None, 1, size, flops, exact, "")


def test_the_floor_is_the_longest_of_bytes_flop_and_start():
    seconds = gpu.seconds_on(gpu.CARDS["h100"])
    assert seconds(kernel(1000, 1000)) == 2.5e-6
    assert seconds(kernel(3352e9, 0)) == pytest.approx(1 / 0.85)
    assert seconds(kernel(0, 495e12)) == pytest.approx(1 / 0.6)
    assert seconds(kernel(0, 67e12, exact=True)) == pytest.approx(1 / 0.6)


def test_a_card_without_tensor_cores_for_a_dtype_says_so():
    assert not list(gpu.caveats(gpu.CARDS["a100"], "bfloat16"))
    assert len(list(gpu.caveats(gpu.CARDS["t4"], "float32"))) == 1
    assert "emulated" in list(gpu.caveats(gpu.CARDS["t4"], "bfloat16"))[1]


def test_the_peak_is_that_of_the_products_that_a_program_makes():
    card, config = gpu.CARDS["a100"], tiny.config()
    assert gpu.peak(card, config, "update") == card.tf32
    assert gpu.peak(card, config, "evaluation") == card.float32
    config.train.dtype, config.eval.precision = "bfloat16", "default"
    assert gpu.peak(card, config, "update") == card.bfloat16
    assert gpu.peak(card, config, "evaluation") == card.tf32
    assert gpu.peak(gpu.CARDS["t4"], config, "update") == gpu.CARDS["t4"].float32


def test_a_floor_is_reported_as_a_share_of_the_peak():
    lines, nothing = [], Counter()
    counted = kernels.Counted(7, 10**9, 2 * 10**12, 0.5, nothing, nothing, nothing)
    gpu.report("update", counted, 8e12, lines.append)
    assert "7 kernels, 1.00 GB, 2.000 TFLOP, floor 500.00 ms, 50% of peak" in lines[0]


@pytest.mark.parametrize("share, fits", [(0.74, "it fits in"), (0.9, "it does not fit in")])
def test_a_program_fits_if_it_needs_no_more_than_jax_takes(share, fits, monkeypatch):
    card, lines = gpu.CARDS["a100"], []
    monkeypatch.setattr(gpu.compile, "memory_held", lambda _: {"all": share * card.memory})
    gpu.report_memory("update", None, card, lines.append)
    assert fits in lines[0] and "75%" in lines[0]


def test_cards_are_told_as_their_makers_do():
    for card in gpu.CARDS.values():
        assert card.float32 <= card.tf32 <= (card.bfloat16 or card.tf32)
        # Two FLOP a clock and unit: within 20% of the data sheet, as boost clocks differ.
        assert card.float32 == pytest.approx(2e9 * card.cores * card.lanes * card.clock, rel=0.2)


def test_every_card_has_a_rate_of_its_own_that_its_bytes_and_flop_allow():
    flops = update_flops(importlib.import_module("configs.doubling").get_config())
    rates = {card.name: gpu_rate(card.name) for card in gpu.CARDS.values()}
    assert len(set(rates.values()) - {OTHER_GPU_RATE}) == len(gpu.CARDS)
    for card in gpu.CARDS.values():
        # One update moves 34 to 38 GB in 1,600 to 1,900 kernels. Each is limited by one of these.
        moving, multiplying = 1 / (0.85 * card.rate), flops / (0.6 * card.tf32)
        least = max(34e9 * moving, multiplying)
        most = 38e9 * moving + multiplying + 1900 * 2.5e-6
        assert least < flops / rates[card.name] < most, card.name


def test_quiet_drops_what_is_written_below_python(capfd):
    with quiet():
        os.write(2, b"dropped")
    os.write(2, b"said")
    assert capfd.readouterr().err == "said"


class Program:
    """A compiled program whose text is written in a way that is not known."""

    def compile(self):
        return self

    def as_text(self):
        return "HloModule of another kind"

    def memory_analysis(self):
        sizes = "argument", "temp", "generated_code", "output", "alias"
        return SimpleNamespace(**{f"{name}_size_in_bytes": 1 << 30 for name in sizes})


def config():
    return importlib.import_module("configs.baseline").get_config()


def test_memory_is_reported_where_a_gpus_program_cannot_be_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "devices_of", lambda _: ([None], gpu.CARDS["t4"]))
    for name in "lower_update", "lower_evaluation":
        monkeypatch.setattr(compile, name, lambda *_: Program())
    lines = []
    gpu.compile_for("t4", config(), tmp_path, lines.append, lambda *_, **__: None)
    assert any("memory 3.22 GB of 15.6" in line and "it fits" in line for line in lines)
    assert any("update: not counted" in line for line in lines)
    assert json.loads((tmp_path / "compile.json").read_text())["update_memory_bytes"] == 3 << 30


def test_memory_is_reported_where_a_tpus_program_cannot_be_counted(tmp_path, monkeypatch):
    device = SimpleNamespace(device_kind="TPU v5 lite")
    fitted = fit_to_machine(config(), "tpu", 8)
    monkeypatch.setattr(compile, "fit_to", lambda *_: (fitted, [device] * 8))
    monkeypatch.setattr(compile, "compiled", lambda *_: (Program(), 1.0))
    lines = []
    gpu.compile_for("v5e:2x4", config(), tmp_path, lines.append)
    assert any("update: compiled in 1 s" in line and "all 3,221 MB" in line for line in lines)
    assert any("update: no cycles" in line for line in lines)
    assert json.loads((tmp_path / "compile.json").read_text())["update_memory_bytes"] == 3 << 30
