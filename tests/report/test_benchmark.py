"""The benchmark: what it reports belongs together; how fast it is here is nobody's test."""

import json

import jax
import pytest
import tiny

from vnca.program import VncaError
from vnca.program.arithmetic import update_flops
from vnca.report import benchmark

KEYS = {
    "peak_flops_per_second", "compile_seconds", "update_seconds", "update_fraction_of_peak",
    "images_per_second", "evaluation_fraction_of_peak", "peak_memory_bytes",
}  # fmt: skip
PEAK = 1e9  # FLOP/s


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["doubling", "nondoubling", "baseline"])
def test_times_rates_and_fractions_belong_together(kind, tmp_path, monkeypatch):
    # A machine of constant speed, so that the median of quotients is the quotient of medians.
    monkeypatch.setattr(benchmark, "peak_meter", lambda *_: lambda: PEAK)
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
    assert result["peak_flops_per_second"] == PEAK
    fraction = update_flops(config) / result["update_seconds"] / PEAK
    assert result["update_fraction_of_peak"] == pytest.approx(fraction)


def test_the_peak_is_the_speed_of_the_faster_matrix_product(monkeypatch):
    seconds = iter([1.0, 8.0, 4.0, 4.0, 9.0, 2.0, 0.1, 2.0, 3.0, 1.0])  # medians: 4 and 2

    def time_once(work):
        assert work().shape[-2:] == (64, 64)
        return next(seconds)

    monkeypatch.setattr(benchmark, "time_once", time_once)
    measure_peak = benchmark.peak_meter("float32", n=64)
    # One product on each of eight devices in 4 seconds, or one on all cores in 2.
    assert measure_peak() == 2 * 64**3 * 8 / 4
    assert next(seconds, None) is None


def test_the_timed_product_copies_nothing_from_device_to_device():
    measure_peak = benchmark.peak_meter("float32", n=64)
    with jax.transfer_guard_device_to_device("disallow"):
        assert measure_peak() > 0


def test_a_peak_is_the_mean_of_those_before_and_after_each_repetition():
    peaks = iter([1.0, 3.0, 7.0])
    times, found = benchmark.time_repeatedly(lambda: None, lambda: next(peaks), repetitions=2)
    assert len(times) == 2 and found.tolist() == [2, 5]


def test_the_form_is_checked_before_it_is_timed(tmp_path, monkeypatch):
    def refuse(method, config, log):
        assert config.train.updates_per_call  # fitted to the machine
        raise VncaError("not to be trusted")

    monkeypatch.setattr(benchmark, "trusted", refuse)
    monkeypatch.setattr(benchmark, "make_update_call", None)
    with pytest.raises(VncaError, match="not to be trusted"):
        benchmark.benchmark(tiny.config(), tmp_path, print)


def test_a_workdir_that_cannot_be_is_refused_before_anything_is_timed(tmp_path):
    (tmp_path / "file").touch()
    lines = []
    with pytest.raises(VncaError, match="Not a directory; choose another"):
        benchmark.benchmark(tiny.config(), tmp_path / "file" / "x", lines.append)
    assert not lines
