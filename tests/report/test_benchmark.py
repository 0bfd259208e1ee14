"""The benchmark: what it reports belongs together; how fast it is here is nobody's test."""

import json
import time

import jax
import pytest
import tiny

from vnca.program import VncaError
from vnca.program.arithmetic import update_flops
from vnca.program.runs import open_run
from vnca.report import benchmark

PEAK = 1e9  # FLOP/s


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["doubling", "nondoubling", "baseline"])
def test_times_rates_and_fractions_belong_together(kind, tmp_path, monkeypatch, capsys):
    # A machine of constant speed, so that the median of quotients is the quotient of medians.
    monkeypatch.setattr(benchmark, "peak_meter", lambda *_: lambda: PEAK)
    config = tiny.config(kind, eval__chunk=4)
    with tiny.fast_compilation():
        benchmark.benchmark(open_run(config, tmp_path, "benchmark"))
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert f"{found['update_seconds']:.4g}" in capsys.readouterr().out
    seconds, batch = found["update_seconds"], config.train.batch_size
    assert found["images_per_second"] == pytest.approx(batch / seconds)
    # Its arithmetic is that of the steps that were timed, of 2 and 3 the mean, rounded up.
    assert found["steps"] == (3 if kind == "nondoubling" else 0)
    fraction = update_flops(config) / seconds / PEAK
    assert found["update_fraction_of_peak"] == pytest.approx(fraction)
    assert found["evaluation_fraction_of_peak"] > 0
    assert found["peak_memory_bytes"] > 1e8  # of Python and JAX alone


@pytest.mark.parametrize("slow", ["pmap", "jit"])
def test_the_peak_is_the_speed_of_the_faster_matrix_product(slow, monkeypatch):
    fast = getattr(jax, slow)

    def slowed(f, **options):
        def call(*args):
            time.sleep(0.1)
            return fast(f, **options)(*args)

        return call

    monkeypatch.setattr(jax, slow, slowed)
    assert benchmark.peak_meter("float32", n=64)() > 8 * 2 * 64**3 / 0.1


def test_the_timed_product_copies_nothing_from_device_to_device():
    measure_peak = benchmark.peak_meter("float32", n=64)
    with jax.transfer_guard_device_to_device("disallow"):
        assert measure_peak() > 0


def test_a_peak_is_the_mean_of_those_before_and_after_each_repetition():
    peaks = iter([1.0, 3.0, 7.0])
    times, found = benchmark.timed(lambda: None, lambda: next(peaks), repetitions=2)
    assert len(times) == 2 and found.tolist() == [2, 5]


def test_the_form_is_checked_before_it_is_timed(tmp_path, monkeypatch):
    def refuse(method, config):
        raise VncaError("not to be trusted")

    monkeypatch.setattr(benchmark, "trusted", refuse)
    run = open_run(tiny.config(), tmp_path, "benchmark")
    with pytest.raises(VncaError, match="not to be trusted"):
        benchmark.benchmark(run)
    assert not [*tmp_path.iterdir()]
