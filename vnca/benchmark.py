"""How fast a config trains and evaluates here, against this machine's own matrix product."""

import json
import resource
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vnca import checkpoint
from vnca.config import check_batch, fit_to_machine
from vnca.data import load
from vnca.devices import is_first
from vnca.evaluate import shuffled, test_iwelbo
from vnca.models import make_model
from vnca.summary import operations, update_flops
from vnca.train import on_devices
from vnca.update import batches, init_pool, init_state, make_update_call

BENCHMARK_STEPS = 48  # of the non-doubling model, about the mean of its steps in training
REPEATS = 5


def benchmark(config, workdir, log):
    """Times the update and the evaluation of the config on the bundled digits; writes
    benchmark.json in `workdir`. Fractions are of the float32 matrix product, timed before and after
    each of the two, so that a noisy machine is compared with itself."""
    check_batch(config, jax.device_count())
    config = config.copy_and_resolve_references()
    if config.model.name == "nondoubling":
        config.model.train_steps = (BENCHMARK_STEPS, BENCHMARK_STEPS)
        log(f"the non-doubling model is timed at T = {BENCHMARK_STEPS} steps")
    flops = update_flops(config)
    config = fit_to_machine(config, flops)
    model, data, devices = make_model(config.model), load("bundled"), jax.device_count()

    state = init_state(model, config.seed)
    if model.develop:
        state["pool"] = init_pool(model, config, state["params"], data.train)
    params = jax.device_get(state["params"])
    state, images = on_devices(state, data.train)
    batch, per_call = config.train.batch_size, config.train.updates_per_call
    fresh = batch // 2 if model.develop else batch
    order = batches(config.seed, 1, per_call, fresh, len(data.train))
    order = order.reshape(per_call, devices, -1).swapaxes(0, 1)
    update_call = make_update_call(model, config, devices)

    def updates(count):
        nonlocal state
        state, metrics = update_call(state, images, order, np.int32(count))
        np.asarray(metrics)  # waits for it

    compile_seconds = seconds(lambda: updates(0))
    updates(1)
    count = min(per_call, 10)
    peaks = [matrix_product_rate()]
    times = [seconds(lambda: updates(count)) / count for _ in range(REPEATS)]
    peaks.append(matrix_product_rate())
    update_seconds = statistics.median(times)

    # One batch of importance samples: each image encoded once, then decoded for every sample.
    samples, chunk = 16, config.eval.chunk
    numbers = shuffled(chunk * devices)

    def evaluation(samples):
        for part in test_iwelbo(model, params, data.test, numbers, samples, chunk, config.seed):
            np.asarray(part)

    evaluation(1)
    evaluation_times = [seconds(lambda: evaluation(samples)) for _ in range(3)]
    peaks.append(matrix_product_rate())
    evaluation_seconds = statistics.median(evaluation_times)
    counts = operations(config.model)
    decoder = sum(n for name, n in counts.items() if name.startswith("decoder"))
    encoder = sum(counts.values()) - decoder
    evaluation_flops = 2 * chunk * devices * (encoder + samples * decoder)

    peak = statistics.median(peaks)
    result = {
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "jax": jax.__version__,
        "batch_size": batch,
        "peak_flops_per_second": peak,
        "compile_seconds": compile_seconds,
        "update_seconds": update_seconds,
        "update_seconds_spread": [min(times), max(times)],
        "update_fraction_of_peak": flops / update_seconds / statistics.mean(peaks[:2]),
        "images_per_second": batch / update_seconds,
        "evaluation_seconds": evaluation_seconds,
        "evaluation_images_samples_per_second": chunk * devices * samples / evaluation_seconds,
        "evaluation_fraction_of_peak": (
            evaluation_flops / evaluation_seconds / statistics.mean(peaks[1:])
        ),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for name, value in result.items():
        log(f"{name:38}{value:.4g}" if isinstance(value, float) else f"{name:38}{value}")
    if is_first():
        Path(workdir).mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=2).encode() + b"\n"
        checkpoint.write(Path(workdir) / "benchmark.json", lambda file: file.write(text))


def seconds(work):
    """How long work() takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def matrix_product_rate(n=2048):
    """FLOP/s of all devices together: the median of several n×n float32 matrix products."""
    product = jax.pmap(lambda a: a @ a)
    a = jnp.ones((jax.local_device_count(), n, n))
    jax.block_until_ready(product(a))
    times = [seconds(lambda: jax.block_until_ready(product(a))) for _ in range(7)]
    return 2 * n**3 * jax.device_count() / statistics.median(times)
