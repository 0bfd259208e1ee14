"""The benchmark: what it reports belongs together; how fast it is here is nobody's test."""

import json
from functools import partial

import pytest
import tiny

from vnca.program import VncaError
from vnca.program.arithmetic import update_flops
from vnca.report import benchmark

KEYS = {
    "peak_flops_per_second", "compile_seconds", "update_seconds", "update_fraction_of_peak",
    "images_per_second", "evaluation_fraction_of_peak", "peak_memory_bytes",
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["nondoubling", *(pytest.param(k, marks=pytest.mark.slow) for k in ("doubling", "baseline"))],
)
def test_times_rates_and_fractions_belong_together(kind, tmp_path, monkeypatch):
    small = partial(benchmark.peak_meter, n=256)
    monkeypatch.setattr(benchmark, "peak_meter", small)
    config, lines = tiny.config(kind, eval__chunk=4), []
    with tiny.fast_compilation():
        benchmark.benchmark(config, tmp_path / "new", lines.append)
    result = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    assert result.keys() >= KEYS and all(result[key] > 0 for key in KEYS)
    assert all(any(line.startswith(f"{key} ") for line in lines) for key in result)
    assert result["model"] == kind
    least, most = result["update_seconds_spread"]
    assert least <= result["update_seconds"] <= most
    batch = config.train.batch_size
    assert result["images_per_second"] == pytest.approx(batch / result["update_seconds"])
    if kind == "nondoubling":  # its arithmetic is that of the steps that were timed
        assert result["steps"] == 3 and "T = 3" in lines[0]
    # A quotient of medians here, a median of quotients there: on a noisy machine not the same.
    rate = update_flops(config) / result["update_seconds"] / result["peak_flops_per_second"]
    assert result["update_fraction_of_peak"] == pytest.approx(rate, rel=0.9)


def test_a_workdir_that_cannot_be_is_refused_before_anything_is_timed(tmp_path):
    (tmp_path / "file").touch()
    lines = []
    with pytest.raises(VncaError, match="Not a directory; choose another"):
        benchmark.benchmark(tiny.config(), tmp_path / "file" / "x", lines.append)
    assert not lines
