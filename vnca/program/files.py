"""Writing files: if the storage fails or the process is killed, earlier files stay as they were."""

import contextlib
import errno
import json
import os
import tempfile
from pathlib import Path

from vnca.program import VncaError
from vnca.program.hosts import is_first


def write(path, save):
    """Calls save(file) on a temporary file, syncs it to the disk and renames it to `path`.

    Whatever happens, `path` either stays as it was or is complete. If the storage fails, the
    temporary file is removed and a VncaError raised.
    """
    path, temporary = Path(path), None
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
            os.fsync(folder)  # a loss of power could undo the rename
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
    """The VncaError for an OSError while `path` was written, with a remedy."""
    problem = f"cannot write {path}: {fault.strerror or fault}"
    if fault.errno in (errno.ENOENT, errno.ENOTDIR):
        return VncaError(f"{problem}; its folder was moved or removed: give --workdir the new path")
    remedy = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there",
        errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
        errno.EACCES: "get permission to write there",
        errno.EPERM: "get permission to write there",
        errno.EROFS: "make it writable",
    }.get(fault.errno, "repair the storage")
    return VncaError(
        f"{problem}; {remedy}, or choose another --workdir; "
        "the same command resumes from the last checkpoint"
    )


def write_json(path, value, indent=2):
    """Writes a value as JSON, on process 0 only."""
    if is_first():
        text = json.dumps(value, indent=indent).encode() + b"\n"
        write(path, lambda file: file.write(text))


def make_folder(path):
    """Makes a workdir or a folder in it, unless it exists. Raises VncaError if that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        reason, found = fault.strerror, fault.filename
        if os.path.islink(found) and not os.path.exists(found):
            reason = f"{found} is a link to {os.readlink(found)}, which does not exist"
        elif isinstance(fault, FileExistsError):
            reason = f"{found} is not a folder"
        raise VncaError(f"--workdir={path}: {reason}; choose another") from fault


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def clean(workdir):
    """Removes the temporary files of killed writes, except those of an evaluation or a study, which
    may be running."""
    for path in Path(workdir).glob(".*.tmp"):
        if path.name.startswith((".evaluation", ".study")):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
