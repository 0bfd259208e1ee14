"""The speed of training and evaluation on this machine, compared to its matrix product."""

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
from vnca.program.arithmetic import evaluation_flops, training_steps, update_flops
from vnca.program.check import trusted
from vnca.program.data import load
from vnca.program.devices import on_devices, replicate
from vnca.program.evaluate import image_bounds
from vnca.program.hosts import agree
from vnca.program.machine import check_batch, check_images, fit_to_machine
from vnca.program.method import make_method
from vnca.program.order import deal, fixed_shuffle
from vnca.training import init_state, make_update_call

REPETITIONS = 5


def benchmark(config, workdir, log, make_method=make_method):
    """Times the update, the evaluation and sampling on the bundled digits, and writes
    benchmark.json in `workdir`.

    The speeds of updates and evaluation are also given as fractions of a matrix product's, in the
    same dtype and precision. They count the FLOP of the plain method: a fast form that needs fewer
    may be above 100%. The product is timed before and after each repetition, so that both see the
    same load on the machine. Raises VncaError if the batch does not fit the devices or the data,
    or the workdir cannot be made.
    """
    check_batch(config, jax.device_count())
    agree(lambda: files.make_folder(workdir))
    config = config.copy_and_resolve_references()
    data, devices = load("bundled"), jax.device_count()
    check_images(config, len(data.train))
    method = trusted(make_method(config), fit_to_machine(config), log)
    model = method.model
    if model.develop:
        # Every update takes the mean number of steps. The method was made before this change, so
        # its loop is as long as in training, and skips the rest.
        steps = training_steps(config.model)
        config.model.train_steps = (steps, steps)
        log(f"timing the non-doubling model at T = {steps} steps, the mean in training")
    config = fit_to_machine(config)
    on_cpu = jax.default_backend() == "cpu"
    batch = config.train.batch_size

    state = init_state(method, config, data.train)
    params = replicate(jax.device_get(state.params))  # the update call uses up the state
    state, images = on_devices(state, data.train)
    per_call = config.train.updates_per_call
    order = deal(config, 1, per_call, len(data.train))
    update_call = make_update_call(method, config)

    def train(count):
        nonlocal state
        state, metrics = update_call(state, images, order, np.int32(count))
        np.asarray(metrics)  # waits for the result

    compile_seconds = time_once(lambda: train(0))
    train(1)

    # One batch of importance samples: each image is encoded once and decoded for every sample.
    samples = 16
    chunk, precision = config.eval.chunk, config.eval.precision
    indices = fixed_shuffle(chunk * devices, len(data.test))

    def evaluate(samples=samples):
        bounds = image_bounds(
            model, params, data.test, indices, samples, chunk, config.seed, precision
        )
        return list(bounds)

    evaluate(1)
    memory = peak_memory()  # before the product, whose operands are larger than a small model
    count = min(per_call, 10 if on_cpu else 125)
    update_seconds, peak = time_repeatedly(lambda: train(count), peak_meter(config.train.dtype))
    update_seconds = update_seconds / count
    evaluation_seconds, evaluation_peak = time_repeatedly(
        evaluate, peak_meter("float32", precision)
    )

    decode = jax.pmap(lambda params, z: jax.nn.sigmoid(model.decode(params, z)), in_axes=(None, 0))
    z = jax.random.normal(jax.random.key(0), (jax.local_device_count(), chunk, model.latent_size))
    jax.block_until_ready(decode(params, z))
    sampling_seconds, _ = time_repeatedly(lambda: np.asarray(decode(params, z)))

    flops = evaluation_flops(config.model, chunk * devices, samples)
    result = {
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "jax": jax.__version__,
        "model": config.model.name,
        "dtype": config.train.dtype,
        "batch_size": batch,
        "peak_flops_per_second": statistics.median(peak),
        "compile_seconds": compile_seconds,
        "update_seconds": statistics.median(update_seconds),
        "update_seconds_spread": [float(min(update_seconds)), float(max(update_seconds))],
        "update_fraction_of_peak": statistics.median(update_flops(config) / update_seconds / peak),
        "images_per_second": batch / statistics.median(update_seconds),
        "evaluation_seconds": statistics.median(evaluation_seconds),
        "evaluation_images_samples_per_second": (
            chunk * devices * samples / statistics.median(evaluation_seconds)
        ),
        "evaluation_fraction_of_peak": statistics.median(
            flops / evaluation_seconds / evaluation_peak
        ),
        "samples_per_second": chunk * devices / statistics.median(sampling_seconds),
        "peak_memory_bytes": memory,
    }
    if model.develop:
        result["steps"] = steps
    if not on_cpu:
        for dtype in ("float32", "bfloat16"):
            rates = [peak_meter(dtype)() for _ in range(5)]
            result[f"peak_flops_per_second_{dtype}"] = statistics.median(rates)
    for name, value in result.items():
        log(f"{name:38}{value:.4g}" if isinstance(value, float) else f"{name:38}{value}")
    files.write_json(Path(workdir) / "benchmark.json", result)


def time_repeatedly(work, measure_peak=lambda: 0.0, repetitions=REPETITIONS):
    """Calls work() several times. Returns two NumPy arrays [repetitions]: the seconds of each call,
    and the mean of measure_peak() just before and just after it."""
    rates, times = [measure_peak()], []
    for _ in range(repetitions):
        times.append(time_once(work))
        rates.append(measure_peak())
    return np.array(times), np.array([(a + b) / 2 for a, b in pairwise(rates)])


def time_once(work):
    """The seconds that one call of work() takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_meter(dtype, precision="default", n=2048):
    """Returns a function that measures the machine's FLOP/s: the median of a few n×n products.

    The product runs on all devices at once. On a CPU it also runs on one device, which then uses
    all threads, and the faster of the two counts: on two cores, one product on both cores reached
    204 GFLOP/s and one product on each core 172.
    """
    on_cpu = jax.default_backend() == "cpu"
    n = n if on_cpu else 4 * n
    on_all = jax.pmap(lambda a: jnp.matmul(a, a, precision=precision))
    on_one = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
    ones = jax.pmap(lambda _: jnp.ones((n, n), dtype))  # made where it is used, to copy nothing
    ways = [(on_all, ones(np.zeros(jax.local_device_count())), jax.device_count())]
    if on_cpu and jax.device_count() > 1:
        ways.append((on_one, jnp.ones((n, n), dtype), jax.process_count()))
    for product, a, _ in ways:
        jax.block_until_ready(product(a))

    def measure_peak():
        rates = []
        for product, a, count in ways:
            run = lambda: jax.block_until_ready(product(a))  # noqa: B023, E731
            seconds = statistics.median(time_once(run) for _ in range(5))
            rates.append(2 * n**3 * count / seconds)
        return max(rates)

    return measure_peak


def peak_memory():
    """The peak memory in bytes: of the first device, or of the whole process if the device uses the
    host's memory."""
    device_peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return device_peak or process_peak * unit
