"""Checkpoints: one .npz each, readable with `numpy.load(path, allow_pickle=False)`.

Arrays stand under their path in the state ("params/decoder/perceive/kernel", "moments/mean/…",
"update"), beside `config` (the resolved config as JSON), `format`, and `sha256` of all of these.
Nothing in the file depends on the clock or on its folder: equal runs make equal bytes.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np

from vnca.program import VncaError, files
from vnca.program.config import complete

FORMAT = 2  # 1 had no checksum of the whole
RENAMED = {"decoder/residual/": "decoder/update/", "pool/indices": "pool/numbers"}  # to: from


class Unreadable(VncaError):
    """A checkpoint of another version of this program, or one that may not be read or does not fit
    into memory: nothing is wrong with it, so no older one is to take its place."""


def paths(workdir):
    """The checkpoints in `workdir`, newest first; none where it is no folder."""
    if not os.path.isdir(workdir):  # of a name that is too long, glob raises an OSError
        return []
    found = Path(workdir).glob("checkpoint_*.npz")
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)


def save(workdir, state, config, keep):
    """Writes the state (a pytree with an integer `update`) and prunes to the `keep` newest.

    config: nested dict of JSON's types. Returns the path.
    """
    path = Path(workdir) / f"checkpoint_{int(state.update):08d}.npz"
    write_state(path, state, config)
    prune(path, keep)
    return path


def write_state(path, state, config):
    """Writes a pytree of arrays and its config, as `load` reads them."""
    arrays = {_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}
    arrays |= {"config": np.array(json.dumps(config, sort_keys=True)), "format": np.array(FORMAT)}
    arrays["sha256"] = np.array(_sha256(arrays))
    files.write(path, lambda file: np.savez(file, **arrays))


def _sha256(arrays):
    """Of names, types, shapes and contents. The CRC-32s of a zip file are not enough: one flipped
    bit in an array's header can have NumPy read less than all of it, and so not see its checksum;
    one in the table at the file's end can hide an array."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def prune(path, keep):
    """Removes what is older than the `keep` newest from this checkpoint on.

    Newer ones stay and do not count: they are damaged, and could cost the only ones that are not.
    """
    found = paths(Path(path).parent)
    for old in found[found.index(Path(path)) + keep :]:
        with contextlib.suppress(OSError):
            old.unlink()


def load(path):
    """The config (nested dict) and a function that fills a state's structure with the arrays.

    Raises VncaError for a file that is damaged, or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        version, config = int(arrays["format"]), json.loads(str(arrays["config"]))
        if version == FORMAT and str(arrays.pop("sha256")) != _sha256(arrays):
            raise ValueError("its content is not that of its SHA-256")
    except (PermissionError, MemoryError) as fault:  # nothing is wrong with the file
        raise Unreadable(f"cannot read {path}: {fault or 'not enough memory'}") from fault
    except Exception as fault:  # a damaged file can fail anywhere in zipfile, zlib, numpy or json
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise VncaError(f"{path} is damaged ({reason}): delete it to use an older one") from fault
    if version != FORMAT:
        raise Unreadable(f"{path} has format {version}, not {FORMAT}: use the version that made it")

    def restore(path_in_state, like):
        name = _name(path_in_state)
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

    try:
        config = complete(config)
    except VncaError as fault:
        raise Unreadable(f"{path}: {fault}") from fault
    return config, lambda like: jax.tree.map_with_path(restore, like)


def newest(workdir, log=print):
    """The newest checkpoint that can be read: path, config and restore, or None where there is
    none. Damaged ones are reported through `log` and left where they are.

    Raises VncaError where there are checkpoints and none of them can be read, or the newest is of
    another version of this program.
    """
    found = paths(workdir)
    for path in found:
        try:
            return path, *load(path)
        except Unreadable:
            raise
        except VncaError as fault:
            log(f"warning: {fault}")
    if found:
        raise VncaError(f"no checkpoint in {workdir} can be read: move them away to start anew")
    return None


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def params_sha256(params):
    """The content of the parameters, by which two runs in one workdir are told apart."""
    digest = hashlib.sha256()
    for x in jax.tree.leaves(params):
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()
