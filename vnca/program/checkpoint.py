"""Checkpoints: one .npz file each, which `numpy.load(path, allow_pickle=False)` reads.

Each array has its path in the state as its name ("params/decoder/perceive/kernel",
"moments/mean/…", "update"). Three more entries are `config` (the resolved config as JSON), `format`
and `sha256`, a checksum of all the others. Nothing in the file depends on the clock or the folder,
so equal runs write equal bytes.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path

import jax
import numpy as np

from vnca.program import VncaError, files, first_line
from vnca.program.config import complete

FORMAT = 2  # format 1 had no checksum
# Parts of arrays' names, and what version 0.1.0 called them.
RENAMED = {"decoder/residual/": "decoder/update/", "pool/indices": "pool/numbers"}


class Unreadable(VncaError):
    """A checkpoint that is not damaged, but cannot be used: another version wrote it, the user may
    not read it, the storage fails, or memory is too small. No older one may take its place."""


def paths(workdir):
    """The checkpoints in `workdir`, newest first. A workdir that does not exist has none.

    Raises VncaError if the workdir cannot be listed.
    """
    try:
        names = os.listdir(workdir)
    except OSError as fault:
        if fault.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return []
        raise files.cannot_read(workdir, fault) from fault
    found = [Path(workdir, n) for n in names if re.fullmatch(r"checkpoint_\d{8,}\.npz", n)]
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)


def save(workdir, state, config, keep):
    """Writes the state, a pytree with an integer `update`, and keeps the `keep` newest checkpoints.

    config: a nested dict that JSON can hold. Returns the path.
    """
    path = Path(workdir) / f"checkpoint_{int(state.update):08d}.npz"
    write_state(path, state, config)
    prune(path, keep)
    return path


def write_state(path, state, config):
    """Writes a pytree of arrays and its config in the form that `load` reads."""
    arrays = {array_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}
    arrays |= {"config": np.array(json.dumps(config, sort_keys=True)), "format": np.array(FORMAT)}
    arrays["sha256"] = np.array(_sha256(arrays))
    files.write(path, lambda file: np.savez(file, **arrays))


def _sha256(arrays):
    """The checksum of the arrays' names, dtypes, shapes and contents.

    A zip file's own CRC-32s are not enough. One flipped bit in an array's header can make NumPy
    read only a part of the array, and then its CRC-32 is never compared. A flipped bit in the table
    at the file's end can hide an array.
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def prune(path, keep):
    """Keeps this checkpoint and the `keep` − 1 before it, and removes older ones.

    Newer ones stay and do not count. They are damaged, and counting them could cost the last good
    ones.
    """
    found = paths(Path(path).parent)
    for old in found[found.index(Path(path)) + keep :]:
        with contextlib.suppress(OSError):
            old.unlink()


def load(path):
    """The config of a checkpoint, a nested dict, and a function `restore`.

    restore takes a pytree of shapes and dtypes and returns the same pytree of arrays; it raises
    VncaError if one is missing or differs. It works once, and then no longer holds the arrays.
    `load` raises VncaError for a damaged file, and Unreadable for one that cannot be used.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe may never end
            raise Unreadable(f"{path} is not a file: move it away")
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":  # NumPy would take it for a pickle
                raise ValueError("it does not begin like an .npz file")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        version, config = int(arrays["format"]), json.loads(str(arrays["config"]))
        if version == FORMAT and str(arrays.pop("sha256")) != _sha256(arrays):
            raise ValueError("its content does not match its SHA-256")
        config = complete(config) if version == FORMAT else config
    except Unreadable:
        raise
    except VncaError as fault:
        raise Unreadable(f"{path}: {fault}") from fault
    except MemoryError as fault:
        raise Unreadable(f"cannot read {path}: not enough memory") from fault
    except Exception as fault:  # zipfile, zlib, NumPy and json raise all kinds
        if failed := _storage_fault(fault):  # the file itself may be whole
            raise Unreadable(str(files.cannot_read(path, failed))) from fault
        raise VncaError(f"{path} is damaged, or not a checkpoint ({first_line(fault)})") from fault
    if version != FORMAT:
        raise Unreadable(f"{path} has format {version}, not {FORMAT}: use the version that made it")

    def find(path_in_state, like):
        name = array_name(path_in_state)
        array = arrays.get(name)
        if array is None:  # a file of an earlier version may have it under an earlier name
            for new, old in RENAMED.items():
                array = arrays.get(name.replace(new, old), array)
        if array is None or array.shape != like.shape or array.dtype != like.dtype:
            found = "missing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise VncaError(
                f"{path}: {name} is {found}, not {like.dtype} {list(like.shape)}: "
                "it is not a checkpoint of this model"
            )
        return array

    def restore(like):
        state = jax.tree.map_with_path(find, like)
        arrays.clear()  # a caller may hold this function for as long as it trains
        return state

    return config, restore


def _storage_fault(fault):
    """The OSError of the storage behind an exception, or None. zipfile hides some, and raises
    others for damaged files: those have no number, or EINVAL."""
    while fault:
        if isinstance(fault, OSError) and fault.errno not in (None, errno.EINVAL):
            return fault
        fault = fault.__cause__ or fault.__context__
    return None


def newest(workdir, log=print):
    """The newest readable checkpoint as (path, config, restore), or None if there are none.

    Damaged ones are reported through `log` and left where they are. Raises VncaError if every
    checkpoint is damaged, or if the newest cannot be used (`Unreadable`).
    """
    found = paths(workdir)
    for path in found:
        try:
            return path, *load(path)
        except Unreadable:
            if os.path.lexists(path):
                raise
            return newest(workdir, log)  # a training has just removed it, and has newer ones
        except VncaError as fault:
            log(f"warning: {fault}; the one before it is tried")
    if found:
        raise VncaError(f"no checkpoint in {workdir} can be read: to start anew, move them away")
    return None


def named(workdir, which):
    """A chosen checkpoint as (path, config, restore). which: its path, or the number of an update
    in `workdir`. Raises VncaError if it is not there, is damaged, or cannot be used."""
    path = Path(os.path.expanduser(which))
    if which.isdecimal() and len(which) < 20:
        path = Path(workdir, f"checkpoint_{int(which):08d}.npz")
    if os.path.isdir(path) or not os.path.lexists(path):
        updates = ", ".join(str(int(p.stem.split("_")[1])) for p in paths(workdir))
        there = f"; {workdir} has those of updates {updates}" if updates else ""
        raise VncaError(f"--checkpoint={which}: there is no file {path}{there}")
    try:
        return path, *load(path)
    except Unreadable:
        raise
    except VncaError as fault:
        raise VncaError(f"{fault}: choose another --checkpoint") from fault


def array_name(path):
    """The name of the array at a path of a pytree: "params/decoder/perceive/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def params_sha256(params):
    """A checksum of the parameters, which tells two runs in one workdir apart."""
    digest = hashlib.sha256()
    for x in jax.tree.leaves(params):
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()
