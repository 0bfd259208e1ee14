"""Long computations: their progress, their partial results, and durations as words."""

import json
import time

import numpy as np

from vnca.program import files
from vnca.program.hosts import any_process, is_first


def duration(seconds):
    """A number of seconds as a person says it: 45 s, 12 min, 3 h 20 min, 14 d 2 h."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def read_partial(path, settings):
    """The arrays, by name, that a stopped evaluation or study with equal settings left at `path`.

    settings: a value that JSON can hold. Without such a file, the result is {}.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays if json.loads(str(arrays.pop("settings"))) == settings else {}
    except Exception:  # if the file is missing or damaged, everything is computed again
        return {}


def write_partial(path, settings, arrays):
    """Writes the file that `read_partial` reads, on process 0."""
    if is_first():
        text = np.array(json.dumps(settings))
        files.write(path, lambda file: np.savez(file, settings=text, **arrays))


def collect(parts, arrays, name, count, stop_asked, save, log, words):
    """Appends `parts` to the array `name` until it has `count` images; returns all arrays.

    arrays: {name: NumPy [images, …]}; parts: an iterator of NumPy [n, …]. It ends early if
    stop_asked() is true on any process. Every few seconds and at the end it calls save(arrays) and
    logs the images done, words(arrays[name]), images/s and the ETA. Raises VncaError if saving
    fails.
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
