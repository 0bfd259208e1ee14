"""The devices of this process: how many a CPU is, and what lies on each."""

import contextlib
import glob
import os
import platform
import re
import warnings
import zlib
from functools import lru_cache
from pathlib import Path

import jax
import jaxlib.version
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vnca.program import VncaError
from vnca.program.arithmetic import fresh_images
from vnca.program.config import check_batch, cores
from vnca.program.data import cache_folder
from vnca.program.hosts import gather

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

    pool = jax.device_put(jax.tree.map(share, state.pool), _sharding("devices"))
    return replicated(state._replace(pool=()))._replace(pool=pool), replicated(images)


def _sharding(*axes):
    # The mesh just as pmap makes it, or the first call compiles twice.
    return NamedSharding(Mesh(jax.local_devices(), "devices"), PartitionSpec(*axes))


def on_host(state):
    """The state as host arrays, the pool of all devices whole; every process must ask for it."""
    pool = jax.tree.map(lambda x: gather(x).reshape(-1, *x.shape[2:]), state.pool)
    return jax.device_get(first_copy(state._replace(pool=())))._replace(pool=pool)


@lru_cache(maxsize=2)
def _epoch(seed, epoch, images):
    return np.random.RandomState([seed, epoch]).permutation(images).astype(np.int32)


def batches(seed, first, count, batch, images):
    """Image numbers of updates first, first + 1, … (from 1): int32 [count, batch].

    Each epoch is a shuffle without replacement, its incomplete last batch dropped, and a function
    of seed and update number alone, so a resumed run repeats and skips nothing.
    """
    places = [divmod(t - 1, images // batch) for t in range(first, first + count)]
    return np.stack([_epoch(seed, e, images)[i * batch : (i + 1) * batch] for e, i in places])


def deal(config, first, count, images):
    """Which of so many `images` are fresh in `count` updates from number `first` on: int32
    [local devices, updates_per_call, fresh/devices], zeros after the last update."""
    order = batches(config.seed, first, count, fresh_images(config), images)
    order = np.pad(order, ((0, config.train.updates_per_call - count), (0, 0)))
    return order.reshape(len(order), jax.device_count(), -1).swapaxes(0, 1)[local_rows()]
