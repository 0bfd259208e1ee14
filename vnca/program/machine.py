"""What this machine is, and what fits it: its cores and devices, JAX's settings, its cache of
compiled programs, and the fields of a config that are left to it."""

import contextlib
import glob
import math
import os
import platform
import re
import warnings
import zlib
from pathlib import Path

import jax
import jaxlib.version

from vnca.program import VncaError
from vnca.program.arithmetic import cell_channels, hidden_channels, update_flops
from vnca.program.data import cache_folder
from vnca.program.order import fresh_images


def cores():
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def check_batch(config, devices):
    """Raises VncaError unless the devices divide the global batch, and a pool if there is one."""
    train = config.train
    pool = train.get("pool_size")
    # Half of a pool's batch is fresh, half of the rest is damaged.
    part = 4 * devices if pool else devices
    _check_divides("train.batch_size", train.batch_size, part, devices)
    if pool:
        _check_divides("train.pool_size", pool, devices, devices)
        if train.batch_size > pool:
            raise VncaError(
                f"config.train.pool_size={pool}: it must be at least the batch, {train.batch_size}"
            )
        fresh, most = fresh_images(config), train.batch_size // 2
        _check_divides("train.pool_fresh", fresh, devices, devices)
        if train.batch_size % fresh or fresh > most:
            raise VncaError(
                f"config.train.pool_fresh={fresh}: it must divide the batch, {train.batch_size}, "
                f"and be at most half of it, {most}"
            )


def _check_divides(field, value, part, devices):
    if value % part:
        fits = sorted({max(value // part, 1) * part, -(-value // part) * part})
        raise VncaError(
            f"config.{field}={value}: it must be a multiple of {part} on {devices} "
            f"device{'s' * (devices > 1)}: {' or '.join(map(str, fits))} would do"
        )


def fit_to_machine(config, platform=None, devices=None):
    """Fills the fields that depend on the machine and are unset; returns a new config.

    From the arithmetic of an update, the kind of device and the number of cores, never from
    a timing, so that the same machine always gets the same program. platform ("cpu", "tpu", …) and
    the number of devices: None: as they are here.
    """
    config = config.copy_and_resolve_references()
    train, evaluation = config.train, config.eval
    on_cpu = (platform or jax.default_backend()) == "cpu"
    devices = devices or jax.device_count()
    # Rates that our programs reached or, for accelerators, exceed; FLOP/s of all devices together.
    rate = 60e9 * cores() if on_cpu else 10e12 * devices
    seconds = update_flops(config) / rate

    def updates_in(duration, at_least=1, at_most=100_000):
        return min(max(round(duration / seconds), at_least), at_most)

    def unset(section, name, value):
        if section[name] is None:
            section[name] = value

    # On a CPU 4 images of 32×32×256 fill the cache (4 MB). The baseline's arrays are smaller, and
    # each piece reads kernels of 41 MB and adds to their gradients: 16 images took 0.135 s, twice 8
    # 0.174. An accelerator wants them all.
    cached = 16 if config.model.name == "baseline" else 4
    unset(train, "micro_batch", cached if on_cpu else train.batch_size)
    # Seconds on a CPU, for a sign of life and a quick Ctrl-C; elsewhere 125, as the reproduction.
    unset(train, "updates_per_call", updates_in(3, at_most=125) if on_cpu else 125)
    # An accelerator exceeds the rate: there twenty times in a run at least.
    often = 100_000 if on_cpu else max(train.updates // 20, 1)
    unset(train, "checkpoint_every", min(updates_in(600), often))
    minute = max(updates_in(60), math.ceil(3200 / train.batch_size))
    unset(evaluation, "every", min(minute, often))
    # Five seconds of a device; but fewer than 4 images leave a CPU's core idle, and more than 16
    # leave its cache. An accelerator is taken to make 80 TFLOP/s in bfloat16, of which a product in
    # float32 takes six; there the widest array of all images should stay on the chip (32 MiB), in
    # whole tiles of 8.
    image = evaluation.samples * update_flops(config) / train.batch_size / 3  # FLOP, forward only
    products = 6 if evaluation.precision == "highest" else 1
    images = round(5 * (rate / devices if on_cpu else 80e12 / products) / image)
    channels = (
        config.model.encoder_width
        if config.model.name == "baseline"
        else max(cell_channels(config.model), hidden_channels(config.model))
    )
    cells = 4**config.model.doublings if config.model.name == "doubling" else 32 * 32
    on_chip = (32 << 20) // (4 * cells * channels)
    fitting = min(max(images, 4), 16) if on_cpu else max(min(images, on_chip) // 8 * 8, 8)
    unset(evaluation, "chunk", fitting)
    return config


PINNED = {  # what the environment could set otherwise, and so change results
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_default_matmul_precision": None,
    "jax_numpy_dtype_promotion": "standard",
}


def pin_settings():
    """Sets what JAX lets its environment variables change to what all results here are made with.

    Before anything is traced; the program does so, and who imports vnca without it may want to.
    """
    for name, value in PINNED.items():
        jax.config.update(name, value)


def find():
    """Has JAX look for its devices. Raises VncaError where there are none of those asked for."""
    try:
        jax.devices()
    except Exception as fault:  # an AssertionError without words, of a plugin that is missing
        wanted, reason = jax.config.jax_platforms or "", str(fault).split(" (")[0] or "no plugin"
        try:
            jax.config.update("jax_platforms", "cpu")
            there = f"{jax.local_device_count()} × cpu"
        except Exception:
            raise VncaError(
                f"{reason}: XLA_FLAGS and JAX_NUM_CPU_DEVICES must ask for one device or more, or "
                "be left out"
            ) from fault
        extra = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}.get(wanted.split(",")[0])
        raise VncaError(
            f"JAX_PLATFORMS={wanted} is not here ({reason}), but {there}: "
            + (
                f"python -m pip install -e '.[{extra}]' brings what JAX needs for one"
                if extra
                else "it may be cpu, cuda or tpu"
            )
            + "; without JAX_PLATFORMS it takes what there is"
        ) from fault


def wait_longer():
    """Lets a CPU device wait an hour for another before XLA aborts, unless the environment says
    how long: it does so after 40 seconds by itself, which large models on a busy machine may take.
    Must come before JAX has looked for its devices."""
    # Before jaxlib 0.8 the flag is not known, and one that is not ends the process.
    if jaxlib.version.__version_info__ >= (0, 8):
        _add_flag("--xla_cpu_collective_call_terminate_timeout_seconds", 3600)


def split_cpu(config):
    """Lets JAX see a CPU of several cores as several devices, unless the environment says how many.

    As many as there are cores, up to 8, if they divide the batch and leave each 4 images or more:
    each holds the parameters, and a micro-batch. Devices meet once an update, threads in every
    operation. Must come before JAX has looked for its devices; where it finds an accelerator, this
    changes nothing.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    for count in range(min(cores(), config.train.batch_size // 4, 8), 1, -1):
        with contextlib.suppress(VncaError):
            check_batch(config, count)
            return _add_flag("--xla_force_host_platform_device_count", count)


def _add_flag(name, value):
    """Adds to XLA_FLAGS, unless this flag is there, or it is the name of a file of flags."""
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags and (not flags or flags.lstrip().startswith("--")):
        os.environ["XLA_FLAGS"] = f"{flags} {name}={value}"


def keep_compiled():
    """Has XLA keep what it compiles in the user's cache folder, where the next start finds it.

    A folder for each kind of processor, since homes are shared between machines. Where
    JAX_COMPILATION_CACHE_DIR is set, or nothing can be written, JAX is left as it is.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind = "\n".join(sorted({n for n in lines if n.startswith(("model name", "flags"))}))
    except OSError:
        kind = platform.processor()
    with contextlib.suppress(VncaError, OSError):
        folder = cache_folder() / f"compiled-{zlib.crc32(kind.encode()):08x}"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def mend_cache():
    """Has an entry of the compilation cache that JAX could not read or write removed at once.

    One that a full disk has cut would stay: JAX writes none that is there. It warns of it, and
    compiles, and that is all one has to notice: the new entry takes its place.
    """
    show, said = warnings.showwarning, "Error (?:read|writ)ing persistent compilation cache entry"

    def shown(message, *where, **more):
        module = re.match(rf"{said} for '(.*?)'", str(message))
        if not module:
            return show(message, *where, **more)
        for path in Path(jax.config.jax_compilation_cache_dir).glob(f"{glob.escape(module[1])}-*"):
            with contextlib.suppress(OSError):
                path.unlink()

    warnings.showwarning = shown
    warnings.filterwarnings("always", said)  # also where warnings are errors
