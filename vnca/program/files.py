"""Writing files: if the storage fails or the process is killed, earlier files stay as they were."""

import contextlib
import errno
import json
import math
import os
import re
import tempfile
from pathlib import Path

from vnca.program import VncaError
from vnca.program.hosts import is_first

# The errors of storage that cannot sync folders.
CANNOT_SYNC = errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES

# The remedy if a workdir cannot be written.
ANOTHER = "choose another --workdir (evaluate, figures, study: also --checkpoint, to read this one)"


def write(path, save):
    """Calls save(file) on a temporary binary file, syncs it to the disk and renames it to `path`.

    Whatever happens, `path` either stays as it was or is complete. A link stays, and the file that
    it leads to is written. If the storage fails, the temporary file is removed and a VncaError
    raised.
    """
    path, temporary = Path(os.path.realpath(path)), None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            with contextlib.suppress(OSError):  # some network drives have no such modes
                os.chmod(temporary, 0o666 & ~_umask())
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)  # a loss of power could undo the rename
    except BaseException as fault:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(fault, OSError):
            raise cannot_write(path, fault) from fault
        raise


def write_bytes(path, content):
    """Writes bytes, as `write` does."""
    write(path, lambda file: file.write(content))


def _sync_folder(path):
    """Writes a folder's entries to the disk, on storage that can do this."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as fault:
        if fault.errno not in CANNOT_SYNC:
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
    return VncaError(f"{problem}; {remedy} and run the same command again, or {ANOTHER}")


def cannot_read(path, fault):
    """The VncaError for an OSError while `path` was read, with a remedy. The file may be whole."""
    remedy = {
        errno.EACCES: "get permission to read it",
        errno.EPERM: "get permission to read it",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
        errno.ENOENT: "give another path",
        errno.ENOTDIR: "give another path",
        errno.EISDIR: "move it away",
    }.get(fault.errno, "repair the storage, and run the same command again")
    return VncaError(f"cannot read {path}: {fault.strerror or fault}; {remedy}")


def write_json(path, value, indent=2):
    """Writes a value as JSON, on process 0 only. A NaN or an infinity becomes null."""
    if is_first():
        write_bytes(path, as_json(value, indent))


def as_json(value, indent):
    """What `write_json` writes, as bytes."""
    return json.dumps(_with_null(value), indent=indent, allow_nan=False).encode() + b"\n"


def _with_null(value):
    """The value with None in place of each NaN and infinity, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: _with_null(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_null(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        raise VncaError(f"cannot make {path}: {reason}; {ANOTHER}") from fault


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def clean(workdir):
    """Removes the temporary files of killed writes, except those of an evaluation or a study, which
    may be running."""
    for path in Path(workdir).glob(".*.tmp"):
        ours = re.fullmatch(r"\..+\.[a-z0-9_]{8}\.tmp", path.name)  # as `write` names them
        if not ours or path.name.startswith((".evaluation", ".study")):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
