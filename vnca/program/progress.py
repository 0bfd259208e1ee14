"""Partial results of an evaluation or a study, and the result that they become.

Each result, such as evaluation.json, has a progress file for each setting that it depends on.
"""

import hashlib
import json
import time

import jax
import numpy as np

from vnca.program import machine, stop, store
from vnca.program.clock import PRINT
from vnca.program.metrics import pace, set_aside
from vnca.program.stop import say


def sha256(params):
    """A checksum of parameters, which tells two runs in one workdir apart."""
    leaves = map(np.ascontiguousarray, jax.tree.leaves(params))
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def _file(path, settings):
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return path.with_name(f"{path.stem}.partial.{digest[:16]}.npz")


def load(path, settings):
    """The arrays that stopped work with these settings has saved for the result `path`: {name:
    NumPy [images, …]}. settings: of JSON's types. A damaged file is as good as none."""
    try:
        return store.load(_file(path, settings))[1]
    except (FileNotFoundError, store.Damaged):
        return {}


def collect(path, settings, arrays, name, parts, count, words):
    """Appends `parts`, an iterator over NumPy [n, …], to the array `name` of {name: NumPy [images,
    …]}, which then has `count` images. Returns the new arrays.

    Every few seconds and at the end it saves them for the result `path`, as `load` reads them, and
    says words(array) with images/s and ETA. To be called in `stop.saving`. Raises Stopped, once
    they are saved.
    """
    start = shown = time.monotonic()
    done = before = len(arrays.get(name, ()))

    def save():
        if machine.is_first():
            store.save(_file(path, settings), settings, arrays)

    save()  # storage that fails is found before the work and not after it
    for part in parts:
        arrays = arrays | {name: np.concatenate([arrays[name], part]) if done else part}
        done += len(part)
        status = machine.largest(stop.asked())  # the same on every process
        stop.ask(status)
        if status or done == count or time.monotonic() - shown > PRINT:
            shown = time.monotonic()
            speed = pace(shown - start, done - before, count - done)
            say(f"{done:,}/{count:,} images  {words(arrays[name])}  {speed}")
            save()
        if status:
            say("stopped; run the same command again to resume")
            stop.end()
    return arrays


def write(path, result, indent=2):
    """Writes a result as JSON, after setting another one aside."""
    text = store.as_json(result, indent)
    if machine.is_first():
        if path.exists() and path.read_bytes() != text:
            set_aside(path)
        store.write(path, lambda file: file.write(text))
