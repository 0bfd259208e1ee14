"""The devices of this process: how many a CPU is, and what lies on each."""

import contextlib
import os
import platform
import zlib
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vnca.images import batches
from vnca.program import VncaError
from vnca.program.config import check_batch, cores
from vnca.program.data import cache_folder
from vnca.program.hosts import gather


def split_cpu(config):
    """Lets JAX see a CPU of several cores as several devices, unless the environment says how many.

    As many as there are cores, up to 8, if they divide the batch and leave each 4 images or more:
    each holds the parameters, and a micro-batch. On two cores two devices trained the small
    non-doubling model 1.8 times as fast as one. Must come before JAX has looked for its devices;
    where it finds an accelerator, this changes nothing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if flags and not flags.lstrip().startswith("--"):  # the name of a file of flags
        return
    # A device that waits for another longer than this makes XLA abort, after 40 seconds by
    # itself, which large models on a busy machine may take.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds"
    if patience not in flags:
        flags += f" {patience}=3600"
    if "device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        for count in range(min(cores(), config.train.batch_size // 4, 8), 1, -1):
            with contextlib.suppress(VncaError):
                check_batch(config, count)
                flags += f" --xla_force_host_platform_device_count={count}"
                break
    os.environ["XLA_FLAGS"] = flags


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


def local_rows():
    """This process's rows of an array that is split over all devices: pmap's order of them."""
    count = jax.local_device_count()
    return slice(jax.process_index() * count, (jax.process_index() + 1) * count)


def first_copy(tree):
    """The copy of replicated arrays on this process's first device."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def replicated(tree):
    """Host arrays whole on each of this process's devices."""
    return jax.device_put(tree, _sharding())


def on_devices(state, images):
    """State and images on this process's devices: whole on each, except a pool, split over all."""

    def share(x):
        return np.asarray(x).reshape(jax.device_count(), -1, *x.shape[1:])[local_rows()]

    rest, pool = split_pool(state)
    pool = jax.device_put(jax.tree.map(share, pool), _sharding("devices"))
    return replicated(rest) | pool, replicated(images)


def _sharding(*axes):
    # The mesh just as pmap makes it, or the first call compiles twice.
    return NamedSharding(Mesh(jax.local_devices(), "devices"), PartitionSpec(*axes))


def split_pool(state):
    """What is whole on every device, and {"pool": …} or {}, which is split over them."""
    pool = {name: state[name] for name in state if name == "pool"}
    return {name: state[name] for name in state if name != "pool"}, pool


def on_host(state):
    """The state as host arrays, the pool of all devices whole; every process must ask for it."""
    rest, pool = split_pool(state)
    pool = jax.tree.map(lambda x: gather(x).reshape(-1, *x.shape[2:]), pool)
    return jax.device_get(first_copy(rest)) | pool


def fresh_images(config):
    """Images of the training set that an update takes: with a pool, half of its batch."""
    return config.train.batch_size // (2 if "pool_size" in config.train else 1)


def deal(config, first, count, images):
    """Which of so many `images` are fresh in `count` updates from number `first` on: int32
    [local devices, updates_per_call, fresh/devices], zeros after the last update."""
    order = batches(config.seed, first, count, fresh_images(config), images)
    order = np.pad(order, ((0, config.train.updates_per_call - count), (0, 0)))
    return order.reshape(len(order), jax.device_count(), -1).swapaxes(0, 1)[local_rows()]
