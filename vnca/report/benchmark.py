"""The speed of training and evaluation on this machine, compared to its matrix product."""

import resource
import sys
import time
from itertools import pairwise
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from vnca.program import machine, store
from vnca.program.arithmetic import evaluation_flops, mean_steps, update_flops
from vnca.program.check import trusted
from vnca.program.data import noise
from vnca.program.evaluate import image_bounds
from vnca.program.order import deal, fixed_shuffle
from vnca.program.stop import say
from vnca.training import init_state, make_update_call

REPETITIONS = 5
CALL = 3  # seconds of updates that are timed together
SAMPLES = 16  # in the evaluation that is timed


def benchmark(run):
    """Times updates and an evaluation on images of noise, and writes benchmark.json.

    The speeds are also given as fractions of a matrix product's, in the same dtype and precision.
    They count the FLOP of the plain method: a fast form that needs fewer may be above 100%. The
    product is timed before and after each repetition, so that both see the same load on the
    machine.
    """
    config, devices = run.config, jax.device_count()
    stored = noise(run.learner.model.likelihood, max(config.train.batch_size, 10_000))
    learner = trusted(run.learner, config)
    steps = mean_steps(learner.model) if config.train.pool_size else 0
    if steps:
        # Every update takes the mean number of steps. The learner was made before this change, so
        # its loop is as long as in training, and skips the rest.
        model = learner.model._replace(train_steps=(steps, steps))
        learner = learner._replace(model=model)

    state = init_state(learner, config, stored)
    params = machine.replicate(jax.device_get(state.params))  # the update call uses up the state
    state, images = machine.on_devices(state), machine.replicate(stored)
    order = deal(config, 1, len(stored), devices)[machine.local_rows()]
    update_call = make_update_call(learner, config)

    def train(updates):
        nonlocal state
        state, metrics = update_call(state, images, order, np.int32(updates))
        np.asarray(metrics)  # waits for the result

    # One batch of importance samples: each image is encoded once and decoded for every sample.
    indices = fixed_shuffle(config.eval.chunk * devices, len(stored))

    def evaluate(samples=SAMPLES):
        list(
            image_bounds(
                learner.model, params, stored, indices, samples, config.eval.chunk, config.seed,
                config.eval.precision,
            )
        )  # fmt: skip

    compile_seconds = seconds_of(lambda: train(0))
    train(1)
    updates = int(CALL / seconds_of(lambda: train(1)))
    updates = machine.largest(min(max(updates, 1), order.shape[1]))  # the same on every process
    evaluate(1)
    memory = peak_memory()  # before the product, whose operands are larger than a small model
    times, peak = timed(lambda: train(updates), peak_meter(config.train.dtype))
    update = times / updates
    evaluation, evaluation_peak = timed(evaluate, peak_meter("float32", config.eval.precision))

    batch = config.train.batch_size
    result = {
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "jax": jax.__version__,
        "model": config.model.name,
        "dtype": config.train.dtype,
        "batch_size": batch,
        "steps": steps,
        "peak_flops_per_second": median(peak),
        "compile_seconds": compile_seconds,
        "update_seconds": median(update),
        "update_seconds_spread": np.quantile(update, [0, 1]).tolist(),
        "update_fraction_of_peak": median(update_flops(config) / update / peak),
        "images_per_second": batch / median(update),
        "evaluation_images_samples_per_second": len(indices) * SAMPLES / median(evaluation),
        "evaluation_fraction_of_peak": median(
            evaluation_flops(config, len(indices), SAMPLES) / evaluation / evaluation_peak
        ),
        "peak_memory_bytes": memory,
    }
    for name, value in result.items():
        say(f"{name:38}{value:.4g}" if isinstance(value, float) else f"{name:38}{value}")
    if machine.is_first():
        store.write_json(run.workdir / "benchmark.json", result)


def timed(work, measure_peak, repetitions=REPETITIONS):
    """Calls work() several times. Returns two NumPy arrays [repetitions]: the seconds of each call,
    and the mean of measure_peak() just before and just after it."""
    rates, times = [measure_peak()], []
    for _ in range(repetitions):
        times.append(seconds_of(work))
        rates.append(measure_peak())
    return np.array(times), np.array([(a + b) / 2 for a, b in pairwise(rates)])


def seconds_of(work):
    """The seconds that one call of work() takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_meter(dtype, precision="default", n=None):
    """Returns a function that measures the machine's FLOP/s: the median of a few n×n products.

    The product runs on all devices at once. On a CPU it also runs on one device, which then uses
    all threads, and the faster of the two counts: on two cores, one product on both cores reached
    204 GFLOP/s and one product on each core 172.
    """
    on_cpu = jax.default_backend() == "cpu"
    n = n or (2048 if on_cpu else 8192)

    def product(a):
        return jnp.matmul(a, a, precision=precision)

    ones = jax.pmap(lambda _: jnp.ones((n, n), dtype))  # made where it is used, to copy nothing
    ways = [(jax.pmap(product), ones(np.zeros(jax.local_device_count())), jax.device_count())]
    if on_cpu:
        ways.append((jax.jit(product), jnp.ones((n, n), dtype), jax.process_count()))

    def rate(multiply, a, count):
        times = [seconds_of(lambda: jax.block_until_ready(multiply(a))) for _ in range(REPETITIONS)]
        return 2 * n**3 * count / median(times)

    def measure_peak():
        return max(rate(*way) for way in ways)

    measure_peak()  # compiles
    return measure_peak


def peak_memory():
    """The peak memory in bytes: of the first device, or of the whole process if the device uses the
    host's memory."""
    device_peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return device_peak or process_peak * unit
