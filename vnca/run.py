"""What modes share: the run that a workdir holds, stop signals, and words for durations."""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import signal
import socket
import threading
import time
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vnca import VncaError, checkpoint, packaged
from vnca.config import adopt, differences, fit_to_machine, flatten
from vnca.data import Dataset, cache_folder, load
from vnca.devices import agree, any_process, from_first, is_first
from vnca.models import Model, make_model
from vnca.summary import update_flops
from vnca.update import init_state


def settle(config, workdir, log):
    """What the run is: its config with nothing left open, its data, the path of its newest
    checkpoint, and a function from the shapes of a state to the state in it. Both are None for
    a new run.

    The same on every process. Raises VncaError where the workdir belongs to another config.
    """

    read = []  # on process 0: what it has read, so that it reads it once

    def find():
        found = checkpoint.newest(workdir, log)
        if not found:
            return None
        path, saved, restore = found
        read.append(restore)
        return {"path": str(path), "config": saved}

    def settle_data():
        read.append(load(config.data.name, config.data.dir, log=log))
        return read[-1].name

    found = agree(find)
    config = adopt(found and found["config"], config)
    # Process 0 settles `auto`, by a download perhaps, and the others follow.
    config.data.name = agree(settle_data)
    data = read[-1] if read else load(config.data.name, config.data.dir, log=log)
    config = fit_to_machine(config, update_flops(config))
    if not found:
        return config, data, None, None
    if lines := differences(found["config"], config):
        raise VncaError(
            f"--workdir={workdir} belongs to a run with another config: {'; '.join(lines)}. "
            "Choose another --workdir, or set these fields back"
        )
    path = found["path"]
    # The others give zeros of the right shapes, and get what process 0 has read.
    zeros = partial(jax.tree.map, lambda x: np.zeros(x.shape, x.dtype))
    restore = read[0] if is_first() else zeros
    return config, data, path, lambda shapes: from_first(restore(shapes))


def trained(config, workdir, log):
    """`settle` where there must be trained parameters: config, data, their file, and they.

    They are those of the newest checkpoint, or, where there is none and config.model is that of the
    packaged model, of that one, which `log` is told. Raises VncaError where there are neither, or
    the checkpoint is of another config.
    """
    if agree(lambda: bool(checkpoint.paths(workdir))):  # before a data set is downloaded
        config, data, path, restore = settle(config, workdir, log)
        model = make_model(config.model)
        state = restore(jax.eval_shape(lambda: init_state(model, config.seed)))
        return config, data, path, state["params"]
    kind = config.model.name
    ready = packaged.load(kind)
    if flatten(ready.config.model) != flatten(config.model):
        raise VncaError(
            f"--workdir={workdir} has no checkpoint: train first, with --mode=train "
            f"(the packaged model is that of configs/small_{kind}.py)"
        )
    log(f"{workdir} has no checkpoint: this is the packaged {kind} model")
    agree(lambda: checkpoint.make_folder(workdir))
    config, data, _, _ = settle(config, workdir, log)
    config.train = ready.config.train  # it is what made the parameters
    return config, data, packaged.path(kind), ready.params


class Subject(NamedTuple):
    """A trained model and the digits to show it on."""

    config: ConfigDict
    model: Model
    params: dict
    data: Dataset
    curve: np.ndarray  # as of a packaged model
    origin: str  # the file of its parameters


def subjects(config, workdir, log):
    """A Subject of each kind, by its name: the run in `workdir` with its own test set, where there
    is a checkpoint and of its kind; else the packaged model, with the bundled digits.

    Raises VncaError where the checkpoint is of another config.
    """
    found, bundled = {}, load("bundled")
    own = config.model.name if agree(lambda: bool(checkpoint.paths(workdir))) else None
    for kind in packaged.KINDS:
        if kind == own:
            settled, data, path, params = trained(config, workdir, log)
            curve = packaged.curve(Path(workdir, "metrics.jsonl"))
            model = make_model(settled.model)
            found[kind] = Subject(settled, model, params, data, curve, str(path))
        else:
            made, model, params, curve = packaged.load(kind)
            made.eval.chunk = config.eval.chunk  # not that of the machine that trained it
            made = fit_to_machine(made, update_flops(made))
            found[kind] = Subject(made, model, params, bundled, curve, packaged.path(kind).name)
        log(f"{kind}: {found[kind].origin}{'' if kind == own else ' (comes with the package)'}")
    return found


def identity(shown):
    """What tells Subjects, by kind, from others: {kind: [SHA-256 of parameters, name of data]}."""
    return {kind: [params_sha256(s.params), s.data.name] for kind, s in shown.items()}


def params_sha256(params):
    """The content of the parameters, by which two runs in one workdir are told apart."""
    digest = hashlib.sha256()
    for x in jax.tree.leaves(params):
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()


def known(path, settings):
    """The arrays that a stopped evaluation or study has kept at `path`, by name, if it had these
    settings (JSON's types); else {}."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays if json.loads(str(arrays.pop("settings"))) == settings else {}
    except Exception:  # none, or damaged: all is computed again
        return {}


def keep(path, settings, arrays):
    """Writes what `known` reads, on process 0."""
    if is_first():
        text = np.array(json.dumps(settings))
        checkpoint.write(path, lambda file: np.savez(file, settings=text, **arrays))


def collect(parts, arrays, name, count, stop_asked, save, log, words):
    """The arrays, {name: NumPy [images, …]}, with that of `name` made longer, or begun, by `parts`,
    NumPy [n, …] each of its dtype, up to `count` images, or fewer where stop_asked() is true on
    any process.

    Every few seconds and at the end it calls save(arrays), and `log` with a line of the images
    done, words(arrays[name]), images/s and ETA. Raises VncaError where saving fails.
    """
    began = shown = time.monotonic()
    done = before = len(arrays.get(name, ()))
    while done < count and not any_process(stop_asked()):
        part = next(parts)
        arrays = arrays | {name: np.concatenate([arrays[name], part]) if done else part}
        done += len(part)
        if time.monotonic() - shown > 5 or done == count:
            shown = time.monotonic()
            rate = (done - before) / (shown - began)
            line = f"{done:,}/{count:,} images  {words(arrays[name])}  {rate:.3g} images/s"
            log(f"{line}  ETA {duration((count - done) / rate)}")
            save(arrays)
    if done < count:
        save(arrays)
        log("stopped; the same command goes on from there")
    return arrays


@contextlib.contextmanager
def held(workdir, log):
    """Makes the workdir and holds it against a second training, until the `with` ends or this
    process dies, however it dies. Raises VncaError, on every process, where another has it."""
    file = None

    def take():
        nonlocal file
        try:
            checkpoint.make_folder(workdir)
            file = open(Path(workdir, ".lock"), "a+")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            file.seek(0)
            raise VncaError(
                f"--workdir={workdir} is in use by {file.read().strip() or 'another run'}: wait "
                "for its end, stop it, or choose another --workdir"
            ) from fault
        except OSError as fault:
            if not file:
                raise VncaError(f"--workdir={workdir}: {fault.strerror}; choose another") from fault
            log(f"warning: {workdir} cannot be locked ({fault.strerror}): train there once only")
        with contextlib.suppress(OSError):  # a full disk: it is held all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()

    try:
        agree(take)
        yield
    finally:
        if file:
            file.close()


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


def duration(seconds):
    """Seconds as a person says them: 45 s, 12 min, 3 h 20 min, 14 d 2 h."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


@contextlib.contextmanager
def stop_signals(log):
    """Gives a function that says whether SIGINT (Ctrl-C) or SIGTERM has come: loops ask it between
    device calls. One more, a second or more later, ends the process at once, with status 128 + its
    number."""
    came = []
    read, write = socket.socketpair()
    write.setblocking(False)

    def listen():
        # Python runs a signal's handler in the main thread, which a device call can hold for
        # minutes; the number arrives here at once.
        first = None
        while number := read.recv(1):
            if first is None:
                first = time.monotonic()
                came.append(number)
                name = signal.Signals(number[0]).name
                with contextlib.suppress(VncaError):  # of an output that is closed
                    log(f"{name}: stopping after this call; once more to stop at once")
            elif time.monotonic() - first > 1:  # not the same one, passed on by a wrapper
                os._exit(128 + number[0])

    listener = threading.Thread(target=listen, daemon=True)
    kept_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    kept = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    listener.start()
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(kept_fd)
        write.close()
        listener.join()
        read.close()
