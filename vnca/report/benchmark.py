"""How fast a config trains and evaluates here, against this machine's own matrix product."""

import resource
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vnca.program import files
from vnca.program.arithmetic import operations, training_steps, update_flops
from vnca.program.data import load
from vnca.program.devices import on_devices, replicate
from vnca.program.evaluate import image_bounds
from vnca.program.hosts import agree
from vnca.program.machine import check_batch, fit_to_machine
from vnca.program.method import make_method
from vnca.program.order import deal, fixed_shuffle
from vnca.training import init_state, make_update_call

REPETITIONS = 5


def benchmark(config, workdir, log, make_method=make_method):
    """Times the update, the evaluation and sampling on the bundled digits; writes benchmark.json
    in `workdir`. Fractions are of a matrix product in the same dtype and precision, timed before
    and after each repetition, so that a noisy machine is compared with itself."""
    check_batch(config, jax.device_count())
    agree(lambda: files.make_folder(workdir))
    config = config.copy_and_resolve_references()
    data, devices = load("bundled"), jax.device_count()
    model = make_method(config).model
    if model.develop:  # its loop stays as long as that of training, most of whose steps are taken
        steps = training_steps(config.model)
        config.model.train_steps = (steps, steps)
        log(f"the non-doubling model is timed at T = {steps}, the mean in training")
    config = fit_to_machine(config)
    method = make_method(config)
    on_cpu, batch = jax.default_backend() == "cpu", config.train.batch_size

    state = init_state(method, config, data.train)
    params = replicate(jax.device_get(state.params))  # the update call gives up its own
    state, images = on_devices(state, data.train)
    per_call = config.train.updates_per_call
    order = deal(config, 1, per_call, len(data.train))
    update_call = make_update_call(method, config)

    def train(count):
        nonlocal state
        state, metrics = update_call(state, images, order, np.int32(count))
        np.asarray(metrics)  # waits for it

    compile_seconds = seconds(lambda: train(0))
    train(1)
    count = min(per_call, 10 if on_cpu else 125)
    update, peak = timed(lambda: train(count), matrix_product(config.train.dtype))
    update = update / count

    # One batch of importance samples: each image encoded once, then decoded for every sample.
    samples, chunk, precision = 16, config.eval.chunk, config.eval.precision
    numbers = fixed_shuffle(chunk * devices)

    def evaluation(samples=samples):
        for part in image_bounds(
            model, params, data.test, numbers, samples, chunk, config.seed, precision
        ):
            np.asarray(part)

    evaluation(1)
    evaluated, evaluation_peak = timed(evaluation, matrix_product("float32", precision))

    decode = jax.pmap(lambda params, z: jax.nn.sigmoid(model.decode(params, z)), in_axes=(None, 0))
    z = jax.random.normal(jax.random.key(0), (jax.local_device_count(), chunk, model.latent_size))
    jax.block_until_ready(decode(params, z))
    sampled, _ = timed(lambda: np.asarray(decode(params, z)))

    counts = operations(config.model)
    decoder = sum(n for name, n in counts.items() if name.startswith("decoder"))
    encoder = sum(counts.values()) - decoder
    evaluation_flops = 2 * chunk * devices * (encoder + samples * decoder)
    result = {
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "jax": jax.__version__,
        "model": config.model.name,
        "dtype": config.train.dtype,
        "batch_size": batch,
        "peak_flops_per_second": statistics.median(peak),
        "compile_seconds": compile_seconds,
        "update_seconds": statistics.median(update),
        "update_seconds_spread": [float(min(update)), float(max(update))],
        "update_fraction_of_peak": statistics.median(update_flops(config) / update / peak),
        "images_per_second": batch / statistics.median(update),
        "evaluation_seconds": statistics.median(evaluated),
        "evaluation_images_samples_per_second": (
            chunk * devices * samples / statistics.median(evaluated)
        ),
        "evaluation_fraction_of_peak": statistics.median(
            evaluation_flops / evaluated / evaluation_peak
        ),
        "samples_per_second": chunk * devices / statistics.median(sampled),
        "peak_memory_bytes": peak_memory(),
    }
    if model.develop:
        result["steps"] = steps
    if not on_cpu:
        for dtype in ("float32", "bfloat16"):
            rates = [matrix_product(dtype)() for _ in range(5)]
            result[f"peak_flops_per_second_{dtype}"] = statistics.median(rates)
    for name, value in result.items():
        log(f"{name:38}{value:.4g}" if isinstance(value, float) else f"{name:38}{value}")
    files.write_json(Path(workdir) / "benchmark.json", result)


def timed(work, rate=lambda: 0.0, repetitions=REPETITIONS):
    """Seconds of each repetition of work(), and the mean of rate() just before and after it."""
    rates, times = [rate()], []
    for _ in range(repetitions):
        times.append(seconds(work))
        rates.append(rate())
    return np.array(times), np.array([(a + b) / 2 for a, b in pairwise(rates)])


def seconds(work):
    """How long work() takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def matrix_product(dtype, precision="default", n=2048):
    """A function that gives FLOP/s of this machine: the median of a few n×n products, on all
    devices at once or, of a CPU, on one that has all threads, whichever is faster.

    On two cores one product by both made 204 GFLOP/s, one by each 172.
    """
    on_cpu = jax.default_backend() == "cpu"
    n = n if on_cpu else 4 * n
    together = jax.pmap(lambda a: jnp.matmul(a, a, precision=precision))
    alone = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
    ways = [(together, jnp.ones((jax.local_device_count(), n, n), dtype), jax.device_count())]
    if on_cpu and jax.device_count() > 1:
        ways.append((alone, jnp.ones((n, n), dtype), jax.process_count()))
    for product, a, _ in ways:
        jax.block_until_ready(product(a))

    def rate():
        rates = []
        for product, a, count in ways:
            times = [seconds(lambda: jax.block_until_ready(product(a))) for _ in range(5)]  # noqa: B023
            rates.append(2 * n**3 * count / statistics.median(times))
        return max(rates)

    return rate


def peak_memory():
    """Bytes: of the first device's memory, or, where it is the host's, of the whole process."""
    of_device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB but on macOS
    return of_device or of_process * (1 if sys.platform == "darwin" else 1024)
