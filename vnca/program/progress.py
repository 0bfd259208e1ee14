"""Progress and partial results of long computations that run in parts."""

import errno
import hashlib
import json
import os
import time

import numpy as np

from vnca.program import Stopped, files
from vnca.program.hosts import agree, ask_all, is_first


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


def pace(seconds, left, **done):
    """The speed of work and the time that the rest takes, as words, such as "7.02 updates/s  112
    images/s  ETA 11 min".

    done: what was done in so many seconds, by its unit; left: how much of the first unit is left.
    """
    rates = {unit: count / max(seconds, 1e-9) for unit, count in done.items()}
    speeds = "  ".join(
        f"{rate:{'.3g' if rate < 999.5 else ',.0f'}} {unit}/s" for unit, rate in rates.items()
    )
    return f"{speeds}  ETA {duration(left / next(iter(rates.values())))}"


def partial_path(path, settings):
    """The file of partial results for the result `path` and these settings (JSON values)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return path.with_name(f"{path.stem}.partial.{digest[:16]}.npz")


def read_partial(path, settings, like):
    """The arrays that a stopped evaluation or study with these settings saved for the result
    `path`, as {name: array}.

    like: name -> shape and dtype, or None. The first axis counts images, with any length.
    Arrays that are missing, damaged, or of another shape or dtype are left out. Raises VncaError if
    the storage fails, since the file may be whole.
    """
    file = partial_path(path, settings)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except Exception as fault:
        if isinstance(fault, OSError) and fault.errno not in (None, errno.ENOENT):
            raise files.cannot_read(file, fault) from fault
        return {}  # missing or damaged: compute everything again

    def fits(array, like):
        same_rank = like is not None and array.ndim == len(like.shape)
        return same_rank and (array.shape[1:], array.dtype) == (like.shape[1:], like.dtype)

    return {name: array for name, array in arrays.items() if fits(array, like(name))}


def write_partial(path, settings, arrays):
    """Writes arrays that `read_partial` reads, on process 0."""
    if is_first():
        files.write(partial_path(path, settings), lambda file: np.savez(file, **arrays))


def set_aside(path, log):
    """Renames the result of earlier work, so that nobody takes it for the result of the work that
    begins. Raises VncaError if the storage fails."""
    previous = path.with_name(f"{path.stem}.previous{path.suffix}")

    def rename():
        try:
            os.replace(path, previous)
        except FileNotFoundError:
            return False
        except OSError as fault:
            raise files.cannot_write(previous, fault) from fault
        return True

    if agree(rename):
        log(f"the earlier {path.name} is now {previous.name}")


def write_result(path, result, log, indent=2):
    """Writes a result as JSON, with an indent as in json.dumps. Another result in that file is set
    aside first. Raises VncaError if the storage fails."""

    def differs():
        try:
            return path.read_bytes() != files.as_json(result, indent)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    if agree(differs):
        set_aside(path, log)
    files.write_json(path, result, indent)


def collect(parts, arrays, name, count, stop_asked, save, log, describe):
    """Appends `parts` to the array `name` of {name: NumPy [images, …]} until it has `count` images.
    Returns the new arrays.

    parts: an iterator over NumPy [n, …]. Every few seconds and at the end, it calls save(arrays)
    and logs the images done, describe(arrays[name]), images/s and ETA. If stop_asked() is not 0 on
    any process, it saves the arrays and raises Stopped. Raises VncaError if saving fails.
    """
    start = shown = time.monotonic()
    done = before = len(arrays.get(name, ()))
    if done < count:
        save(arrays)  # storage that fails is found before the work and not after it
    while done < count:
        if status := ask_all(stop_asked)():
            save(arrays)
            log("stopped; run the same command again to resume")
            raise Stopped(status)
        part = next(parts)
        arrays = arrays | {name: np.concatenate([arrays[name], part]) if done else part}
        done += len(part)
        if time.monotonic() - shown > 5 or done == count:
            shown = time.monotonic()
            speed = pace(shown - start, count - done, images=done - before)
            log(f"{done:,}/{count:,} images  {describe(arrays[name])}  {speed}")
            save(arrays)
    return arrays
