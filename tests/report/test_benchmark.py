"""The benchmark: what it reports belongs together; how fast it is here is nobody's test."""

import json
import time
from functools import partial
from itertools import cycle

import jax
import numpy as np
import pytest
import tiny

from vnca.program.runs import open_run
from vnca.report import benchmark
from vnca.training import State

# FLOP/s of the matrix product, by its dtype and precision.
PEAKS = {("float32", "default"): 2e12, ("bfloat16", "default"): 4e12, ("float32", "highest"): 1e12}
# The multiply-adds of an image of the published models, by hand: the encoder's kernels of 5×5 on
# 32×32 … 2×2 cells, without its linear map; the decoder's kernels of 3×3 and 1×1 on all cells that
# a doubling model computes, and on those of one step of a non-doubling model.
CONVOLUTIONS = 25 * (32**2 * 1 * 32 + 16**2 * 32 * 64 * 4)
DOUBLING = 8 * (4 + 16 + 64 + 256 + 1024) * (9 + 1 + 8) * 256**2
STEP = 32**2 * (9 + 1) * 128**2


@pytest.mark.parametrize(
    ("name", "dtype", "steps", "encoder", "in_training", "in_evaluation"),
    [
        ("doubling", "bfloat16", 0, CONVOLUTIONS + 2048 * 512, DOUBLING, DOUBLING),
        ("nondoubling", "float32", 48, CONVOLUTIONS + 2048 * 256, 48 * STEP, 36 * STEP),
    ],
    ids=["doubling", "nondoubling"],
)
def test_times_rates_and_fractions_are_those_of_the_work_that_is_done(
    name, dtype, steps, encoder, in_training, in_evaluation, tmp_path, monkeypatch
):
    now, config = [0.0], tiny.committed(name)
    config.train.dtype = dtype

    def make_update_call(learner, config):
        """An update takes 10 ms for each step that it has on average, and compiling 7 s."""
        seconds, compiling = 0.01 * np.mean(learner.model.train_steps or 48), [7]

        def update_call(state, images, order, count):
            now[0] += seconds * count + (compiling.pop() if compiling else 0)
            return state, np.zeros((1, 4))

        return update_call

    def image_bounds(model, params, images, indices, samples, *_):
        """A sample of an image takes 1 ms."""
        now[0] += 0.001 * len(indices) * samples
        yield np.zeros((len(indices), 3))

    state = State({}, {}, np.int32(0), np.int32(0), ())
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark, "init_state", lambda *_: state)
    monkeypatch.setattr(benchmark, "make_update_call", make_update_call)
    monkeypatch.setattr(benchmark, "image_bounds", image_bounds)
    monkeypatch.setattr(
        benchmark, "peak_meter", lambda dtype, how="default": lambda: PEAKS[dtype, how]
    )
    benchmark.benchmark(open_run(config, tmp_path, "benchmark"))
    found = json.loads((tmp_path / "benchmark.json").read_text())
    batch, update, peak = config.train.batch_size, 0.48, PEAKS[dtype, "default"]
    flops = 3 * 2 * batch * (encoder + in_training)  # the backward pass costs two forward passes
    flops_of_a_sample = 2 * (encoder / 16 + in_evaluation)  # an image is encoded for 16 of them
    wanted = {
        "compile_seconds": 7,
        "update_seconds": update,
        "images_per_second": batch / update,
        "update_fraction_of_peak": flops / update / peak,
        "evaluation_images_samples_per_second": 1000,
        "evaluation_fraction_of_peak": flops_of_a_sample * 1000 / 1e12,
        "steps": steps,
        "peak_flops_per_second": peak,
    }
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert found["update_seconds_spread"] == pytest.approx([update, update])
    assert found["peak_memory_bytes"] > 1e8  # of Python and JAX alone


@pytest.mark.slow  # compiles two programs
@pytest.mark.parametrize("name", ["doubling", "nondoubling", "baseline"])
def test_a_benchmark_times_what_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "peak_meter", partial(benchmark.peak_meter, n=64))
    began = time.perf_counter()
    with tiny.fast_compilation():
        benchmark.benchmark(open_run(tiny.config(name), tmp_path, "benchmark"))
    elapsed = time.perf_counter() - began
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert min(value for value in found.values() if isinstance(value, float)) > 0
    # It compiles first, and times five calls of three updates.
    fastest, slowest = found["update_seconds_spread"]
    assert found["compile_seconds"] + 5 * 3 * fastest < elapsed
    assert fastest <= found["update_seconds"] <= slowest


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
