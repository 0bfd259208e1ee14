"""Progress and partial results of long computations that run in parts."""

import json
import time

import numpy as np

from vnca.program import files
from vnca.program.hosts import any_process, is_first


def duration(seconds):
    """Formats seconds for people: 45 s, 12 min, 3 h 20 min, 14 d 2 h."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def read_partial(path, settings):
    """The arrays that a stopped evaluation or study saved at `path`, as {name: array}.

    Returns {} if there are none, or if they were saved with other settings, of JSON's types.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays if json.loads(str(arrays.pop("settings"))) == settings else {}
    except Exception:  # missing or damaged: compute everything again
        return {}


def write_partial(path, settings, arrays):
    """Writes arrays that `read_partial` reads, on process 0."""
    if is_first():
        text = np.array(json.dumps(settings))
        files.write(path, lambda file: np.savez(file, settings=text, **arrays))


def collect(parts, arrays, name, count, stop_asked, save, log, describe):
    """Appends `parts` to the array `name` of {name: NumPy [images, …]} until it has `count` images.
    Returns the new arrays.

    parts: an iterator over NumPy [n, …]. Every few seconds and at the end, it calls save(arrays)
    and logs the images done, describe(arrays[name]), images/s and ETA. It stops early when
    stop_asked() is true on any process. Raises VncaError if saving fails.
    """
    start = shown = time.monotonic()
    done = before = len(arrays.get(name, ()))
    while done < count and not any_process(stop_asked()):
        part = next(parts)
        arrays = arrays | {name: np.concatenate([arrays[name], part]) if done else part}
        done += len(part)
        if time.monotonic() - shown > 5 or done == count:
            shown = time.monotonic()
            rate = (done - before) / (shown - start)
            line = f"{done:,}/{count:,} images  {describe(arrays[name])}  {rate:.3g} images/s"
            log(f"{line}  ETA {duration((count - done) / rate)}")
            save(arrays)
    if done < count:
        save(arrays)
        log("stopped; run the same command again to resume")
    return arrays
