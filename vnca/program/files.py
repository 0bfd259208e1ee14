"""Writing files so that a fault of the storage or a kill costs nothing that was there before."""

import contextlib
import errno
import json
import os
import tempfile
from pathlib import Path

from vnca.program import VncaError
from vnca.program.hosts import is_first


def write(path, save):
    """Calls save(file) and puts the result at `path` whole: temporary file, sync, rename.

    Whatever happens, `path` is what it was or is complete. Raises VncaError where the storage
    fails, and removes the temporary file.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            os.chmod(temporary, 0o666 & ~_umask())
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the new name may be lost with the power
        finally:
            os.close(folder)
    except BaseException as fault:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(fault, OSError):
            raise cannot_write(path, fault) from fault
        raise


def cannot_write(path, fault):
    """The VncaError of an OSError in writing to `path`, with a remedy."""
    said = f"cannot write {path}: {fault.strerror or fault}"
    if fault.errno in (errno.ENOENT, errno.ENOTDIR):
        return VncaError(f"{said}; its folder was moved or removed: give --workdir its new place")
    remedy = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there",
        errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
        errno.EACCES: "get the right to write there",
        errno.EPERM: "get the right to write there",
        errno.EROFS: "make it writable",
    }.get(fault.errno, "mend the storage")
    return VncaError(
        f"{said}; {remedy}, or choose another --workdir; "
        "the same command goes on from the last checkpoint"
    )


def write_json(path, value, indent=2):
    """Writes a value of JSON's types, on process 0."""
    if is_first():
        text = json.dumps(value, indent=indent).encode() + b"\n"
        write(path, lambda file: file.write(text))


def make_folder(path):
    """Makes a workdir, or a folder in it, if need be. Raises VncaError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        why, found = fault.strerror, fault.filename
        if os.path.islink(found) and not os.path.exists(found):
            why = f"{found} is a link to {os.readlink(found)}, which is not there"
        elif isinstance(fault, FileExistsError):
            why = f"{found} is not a folder"
        raise VncaError(f"--workdir={path}: {why}; choose another") from fault


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def clean(workdir):
    """Removes what writes that were killed have left behind, but for an evaluation's or a
    study's, which may be running."""
    for path in Path(workdir).glob(".*.tmp"):
        if path.name.startswith((".evaluation", ".study")):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
