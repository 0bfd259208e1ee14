"""This machine: its cores and devices, JAX's settings, the compilation cache, and the config's
fields that are fitted to the machine."""

import contextlib
import glob
import math
import os
import platform
import re
import warnings
import zlib
from collections import Counter
from pathlib import Path

import jax
import jaxlib.version

from vnca.fast import cpu
from vnca.program import VncaError
from vnca.program.arithmetic import cell_channels, hidden_channels, update_flops
from vnca.program.data import cache_folder
from vnca.program.hosts import agree
from vnca.program.order import fresh_images

# A container's processor time in each period, and the period, both in microseconds.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
CPU_DEVICES = "--xla_force_host_platform_device_count"


def cores():
    """The number of processor cores that this process may use: those that it may run on, or fewer
    if a container limits its processor time (cgroups, version 2)."""
    known = hasattr(os, "sched_getaffinity")  # not on a Mac
    count = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file; "max", which is no number
        quota, period = map(int, QUOTA.read_text().split())
        count = min(count, max(1, -(-quota // period)))
    return count


# ---- The config on this machine ------------------------------------------------------------------


def check_batch(config, devices):
    """Raises VncaError unless the devices divide the global batch.

    With a pool, 4 × devices must divide the batch, the devices must divide the pool, and the pool
    must hold a batch. pool_fresh must be a multiple of the devices, a divisor of the batch, and at
    most half of it.
    """
    train = config.train
    pool_size = train.get("pool_size")
    # With a pool, damage takes a quarter of the batch.
    _check_divides(
        "train.batch_size", train.batch_size, 4 * devices if pool_size else devices, devices
    )
    if not pool_size:
        return
    _check_divides("train.pool_size", pool_size, devices, devices)
    if train.batch_size > pool_size:
        raise VncaError(
            f"config.train.pool_size={pool_size}: it must be at least the batch, {train.batch_size}"
        )
    fresh, half = fresh_images(config), train.batch_size // 2
    allowed = [n for n in range(devices, half + 1, devices) if train.batch_size % n == 0]
    if fresh not in allowed:
        raise VncaError(
            f"config.train.pool_fresh={fresh}: it must divide the batch, {train.batch_size}, be at "
            f"most half of it, {half}, and be a multiple of the devices, {devices}: "
            f"{' or '.join(map(str, allowed))} would do, or another number of devices"
        )


def check_images(config, count):
    """Raises VncaError if the batch or the pool has more images than the training set, `count`."""
    for name in ("batch_size", "pool_size"):
        value = config.train.get(name, 0)
        if value > count:
            raise VncaError(
                f"config.train.{name}={value}: the training set has only {count:,} images; set it "
                "to at most that"
            )


def _check_divides(field, value, divisor, devices):
    if value % divisor:
        below, above = value // divisor * divisor, -(-value // divisor) * divisor
        nearest = f"{below} or {above}" if below else above
        raise VncaError(
            f"config.{field}={value}: it must be a multiple of {divisor} on {devices} "
            f"device{'s' * (devices > 1)}: {nearest} would do, or another number of devices"
        )


def fit_to_machine(config, platform=None, devices=None, device_kind=None):
    """A copy of the config whose unset fields have values that fit the machine.

    platform ("cpu", "tpu", …), the number of devices and their kind, as JAX names it, are this
    machine's unless given. The values follow from the arithmetic of an update, the platform, the
    kind of a GPU and the number of cores, and never from a timing, so that one machine always runs
    one program.
    """
    config = config.copy_and_resolve_references()
    train, evaluation = config.train, config.eval
    platform = platform or jax.default_backend()
    on_cpu, on_gpu = platform == "cpu", platform == "gpu"
    devices = devices or jax.device_count()
    # FLOP/s of all devices together. CPUs reach it, and TPUs exceed it.
    # Hosts may have different numbers of cores, and must make the same calls.
    rate = 60e9 * agree(cores) if on_cpu else 10e12 * devices
    if on_gpu:
        rate = gpu_rate(device_kind or jax.devices()[0].device_kind) * devices
    seconds = update_flops(config) / rate

    def updates_in(duration, at_most=100_000):
        return min(max(round(duration / seconds), 1), at_most)

    def set_if_unset(section, name, value):
        if section[name] is None:
            section[name] = value

    # On a CPU 4 images of 32×32×256 fill the cache (4 MB). The baseline's arrays are smaller, and
    # each micro-batch reads kernels of 41 MB and adds to their gradients: 16 images took 0.135 s,
    # two micro-batches of 8 took 0.174 s. An accelerator takes the whole batch.
    # With few channels 2 are faster: 0.88 to 0.92 of the time with 32 channels, to 0.97 with 48.
    few = cell_channels(config.model) <= cpu.MOST_CHANNELS
    cached = 16 if config.model.name == "baseline" else 2 if few else 4
    set_if_unset(train, "micro_batch", cached if on_cpu else train.batch_size)
    # On a CPU a call takes seconds, so that a line and Ctrl-C come soon. 125 is the reproduction's.
    set_if_unset(train, "updates_per_call", updates_in(3, at_most=125) if on_cpu else 125)
    # An accelerator exceeds the rate above, so it also saves about twenty times in a long run.
    at_most = 100_000 if on_cpu else max(train.updates // 20, 1)
    set_if_unset(train, "checkpoint_every", min(updates_in(600), at_most))
    minute = max(updates_in(60), math.ceil(3200 / train.batch_size))
    set_if_unset(evaluation, "every", min(minute, at_most))
    set_if_unset(evaluation, "chunk", _chunk(config, on_cpu, on_gpu, rate / devices))
    return config


# FLOP/s of the published doubling model's update in float32: what `update_flops` counts, over the
# update's floor (`--mode=compile`, JAX 0.10.2). The names are words of JAX's name of the card. A
# PCIe or laptop version of a card is slower, but gets the same rate.
GPU_RATES = {
    "T4": 4.46e12,
    "L4": 14.4e12,
    "RTX 3090": 18.7e12,
    "RTX 4090": 36.3e12,
    "A100-SXM4-80GB": 68.7e12,  # before "A100", which is a word of this name
    "A100": 60.6e12,
    "H100": 148e12,
    "H200": 180e12,
}
OTHER_GPU_RATE = 20e12  # FLOP/s, an assumption, only for cards that are not in the table


def gpu_rate(device_kind):
    """The FLOP/s of a GPU by JAX's name of it. Whole words count: an L40 is no L4."""
    rates = (rate for name, rate in GPU_RATES.items() if re.search(rf"\b{name}\b", device_kind))
    return next(rates, OTHER_GPU_RATE)


def _chunk(config, on_cpu, on_gpu, rate):
    """The images in one evaluation call of a device with this FLOP/s: about five seconds' worth."""
    model, evaluation = config.model, config.eval
    # FLOP of an image, forward, with the mean number of steps in training.
    image = evaluation.samples * update_flops(config) / config.train.batch_size / 3
    # Of a narrow model, 4 images took 1.01 to 1.06 times as long as twice 2, and 11 took 1.14.
    if on_cpu and cpu.is_narrow_doubling(model):
        return 2
    # Fewer than 4 images leave a core idle, and more than 16 do not fit its cache. 1, 4, 16 and 32
    # images reached 65, 72, 73 and 69% of a matrix product's rate (doubling); 8, 16, 64 and 256
    # images reached 43, 47, 32 and 27% (baseline).
    if on_cpu:
        return min(max(round(5 * rate / image), 4), 16)
    # We assume 80 TFLOP/s in bfloat16 for TPUs. A product in float32 takes six in bfloat16; for
    # GPUs, whose rate is mostly that of TF32, we assume the same.
    rate = rate if on_gpu else 80e12
    slower = 6 if evaluation.precision == "highest" else 1
    images = round(5 * rate / slower / image)
    # The widest array of all images should stay on the chip (32 MiB), in whole tiles of 8.
    if model.name == "baseline":
        channels = model.encoder_width
    else:
        channels = max(cell_channels(model), hidden_channels(model))
    cells = 4**model.doublings if model.name == "doubling" else 32 * 32
    on_chip = (32 << 20) // (4 * cells * channels)
    # On a GPU fewer than 16 images leave it waiting for the start of kernels.
    return max(min(images, on_chip) // 8 * 8, 16 if on_gpu else 8)


# ---- JAX on this machine -------------------------------------------------------------------------


PINNED = {  # settings that change results and that environment variables can set
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_default_matmul_precision": None,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}


def prepare(config, mode, one_process):
    """Sets up JAX for a mode of the program, before it looks for its devices.

    one_process: whether the CPU may be split into devices. Of several processes, each must have as
    many devices as the others.
    """
    pin_settings()
    mend_cache()
    if mode in ("benchmark", "compile"):  # how long compiling takes is a result
        jax.config.update("jax_enable_compilation_cache", False)
    else:
        keep_compiled()
    wait_longer()
    join_all_reduces()
    if one_process:
        split_cpu(config)


def pin_settings():
    """Sets those of JAX's settings that change results, whatever its environment variables say.

    Call it before anything is traced. The program does; if you import vnca as a library, you may
    want to.
    """
    for name, value in PINNED.items():
        jax.config.update(name, value)


def find_devices():
    """Has JAX look for its devices. Raises VncaError if those asked for are not there, if a driver
    fails, or if processes have different numbers of them."""
    try:
        counts = Counter(device.process_index for device in jax.devices())
    except Exception as fault:  # a missing plugin raises an AssertionError without a message
        wanted, reason = jax.config.jax_platforms or "", str(fault).split(" (")[0] or "no plugin"
        try:
            jax.config.update("jax_platforms", "cpu")
            found = f"{jax.local_device_count()} × cpu"
        except Exception:
            raise VncaError(
                f"{reason}: let XLA_FLAGS and JAX_NUM_CPU_DEVICES ask for one device or more, or "
                "unset them"
            ) from fault
        if not wanted:
            raise VncaError(
                f"{reason}, but {found} is available: repair the driver or JAX's plugin, or set "
                "JAX_PLATFORMS=cpu"
            ) from fault
        extra = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}.get(wanted.split(",")[0])
        remedy = (
            f"python -m pip install -e '.[{extra}]' installs JAX's support for it"
            if extra
            else "it may be cpu, cuda or tpu"
        )
        raise VncaError(
            f"JAX_PLATFORMS={wanted} is not available ({reason}), but {found} is: {remedy}; "
            "if JAX_PLATFORMS is not set, JAX uses what it finds"
        ) from fault
    if len(set(counts.values())) > 1:
        found = ", ".join(f"process {n} has {count}" for n, count in sorted(counts.items()))
        raise VncaError(f"all processes must have the same number of devices, but {found}")


def wait_longer():
    """Lets a CPU device wait an hour for another before XLA aborts, unless XLA_FLAGS says how long.

    XLA's own limit is 40 seconds, which large models on a busy machine can exceed. Call it before
    JAX looks for its devices.
    """
    # jaxlib before 0.8 does not know the flag, and an unknown flag ends the process.
    if jaxlib.version.__version_info__ >= (0, 8):
        _add_flag("--xla_cpu_collective_call_terminate_timeout_seconds", 3600)


def join_all_reduces():
    """Has XLA make one all-reduce of an update's gradient on GPUs, unless the environment says
    otherwise: by default it joins arrays up to 30 MB, and the baseline's gradient has 41. Must come
    before JAX has looked for its devices."""
    _add_flag("--xla_gpu_all_reduce_combine_threshold_bytes", 1 << 30)


def split_cpu(config):
    """Lets JAX see a CPU of several cores as several devices, unless the environment says how many.

    There are as many devices as cores, up to 8, as far as they divide the batch and each has 4
    images or more: each device holds the parameters and a micro-batch. Devices wait for each other
    once in an update, threads in every operation. Call it before JAX looks for its devices. Where
    JAX finds an accelerator, this changes nothing.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    for count in range(min(cores(), config.train.batch_size // 4, 8), 1, -1):
        with contextlib.suppress(VncaError):
            check_batch(config, count)
            return _add_flag(CPU_DEVICES, count)


def _add_flag(name, value):
    """Adds to XLA_FLAGS, unless the flag is there or XLA_FLAGS names a file of flags."""
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags and (not flags or flags.lstrip().startswith("--")):
        os.environ["XLA_FLAGS"] = f"{flags} {name}={value}"


# ---- The compilation cache -----------------------------------------------------------------------


def keep_compiled():
    """Has XLA keep compiled programs in the user's cache folder, where the next start finds them.

    Each kind of processor has a folder of its own, since machines may share a home. If
    JAX_COMPILATION_CACHE_DIR is set or the folder cannot be written to, this changes nothing.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = "model name", "flags", "Features", "CPU implementer", "CPU part"  # of x86 and ARM
        kind = "\n".join(sorted({n for n in lines if n.startswith(names)}))
    except OSError:
        kind = platform.processor()
    with contextlib.suppress(VncaError, OSError):
        folder = cache_folder() / f"compiled-{zlib.crc32(kind.encode()):08x}"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def mend_cache():
    """Has an entry of the compilation cache removed as soon as JAX cannot read or write it.

    A full disk can cut an entry short, and JAX never overwrites one. JAX then warns and compiles.
    The removal replaces the warning, and the new program replaces the entry.
    """
    show, said = warnings.showwarning, "Error (?:read|writ)ing persistent compilation cache entry"

    def remove_or_show(message, *where, **more):
        module = re.match(rf"{said} for '(.*?)'", str(message))
        if not module:
            return show(message, *where, **more)
        for path in Path(jax.config.jax_compilation_cache_dir).glob(f"{glob.escape(module[1])}-*"):
            with contextlib.suppress(OSError):
                path.unlink()

    warnings.showwarning = remove_or_show
    warnings.filterwarnings("always", said)  # even if warnings are errors
