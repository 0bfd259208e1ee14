"""The benchmark: what it reports belongs together; how fast it is here is nobody's test."""

import json
from itertools import cycle

import jax
import numpy as np
import pytest
import tiny

from vnca.program.arithmetic import evaluation_flops, update_flops
from vnca.program.runs import open_run
from vnca.report import benchmark

PEAK = 1e9  # FLOP/s


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["doubling", "nondoubling", "baseline"])
def test_times_rates_and_fractions_belong_together(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "peak_meter", lambda *_: lambda: PEAK)
    monkeypatch.setattr(benchmark, "seconds_of", lambda work: work() or 0.5)  # for any work
    config = tiny.config(kind, eval__chunk=4)
    with tiny.fast_compilation():
        benchmark.benchmark(open_run(config, tmp_path, "benchmark"))
    found = json.loads((tmp_path / "benchmark.json").read_text())
    update = 0.5 / config.train.updates_per_call
    # Its arithmetic is that of the steps that were timed, of 2 and 3 the mean, rounded up.
    assert found["steps"] == (3 if kind == "nondoubling" else 0)
    wanted = {
        "update_seconds": update,
        "images_per_second": config.train.batch_size / update,
        "update_fraction_of_peak": update_flops(config) / update / PEAK,
        "evaluation_images_samples_per_second": 8 * 4 * 16 / 0.5,
        "evaluation_fraction_of_peak": evaluation_flops(config.model, 8 * 4, 16) / 0.5 / PEAK,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert found["peak_memory_bytes"] > 1e8  # of Python and JAX alone


@pytest.mark.parametrize("seconds", [(1, 1), (1, 0.1)])  # on all devices, and on one
def test_the_peak_is_the_speed_of_the_faster_matrix_product(seconds, monkeypatch):
    times = cycle(np.repeat(seconds, benchmark.REPETITIONS))
    monkeypatch.setattr(benchmark, "seconds_of", lambda work: next(times))
    flops = 2 * 64**3 * np.array([8, 1])
    assert benchmark.peak_meter("float32", n=64)() == max(flops / seconds)


def test_the_timed_product_copies_nothing_from_device_to_device():
    measure_peak = benchmark.peak_meter("float32", n=64)
    with jax.transfer_guard_device_to_device("disallow"):
        assert measure_peak() > 0


def test_a_peak_is_the_mean_of_those_before_and_after_each_repetition():
    peaks = iter([1.0, 3.0, 7.0])
    _, found = benchmark.timed(lambda: None, lambda: next(peaks), repetitions=2)
    assert found.tolist() == [2, 5]


def test_the_form_is_checked_before_it_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "trusted", lambda *_: pytest.fail("not to be trusted"))
    with pytest.raises(pytest.fail.Exception):
        benchmark.benchmark(open_run(tiny.config(), tmp_path, "benchmark"))
