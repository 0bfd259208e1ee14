"""One's own images: MNIST's four IDX files with other content, or one .npz file.

Each grey level becomes a bit once, by a draw with a fixed seed, so that equal files give equal bits
at every start. Files are read, binarized and packed 1,000 images at a time. Memory therefore holds
the packed bits and one chunk.
"""

import contextlib
import errno
import gzip
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from vnca.program import VncaError
from vnca.program.download import why

SIDE = 28  # of an image, in pixels
PIXELS = SIDE * SIDE
PACKED = PIXELS // 8  # bytes of one image
SEED = 0  # of the draws
CHUNK = 1000  # images that are read at once
MOST = 1_000_000  # images in a split, 98 MB packed on every device
IDX_TYPES = {8: np.dtype(np.uint8), 12: np.dtype(">i4")}  # by the third byte of an IDX file
IDX_FILES = {  # key: the ends of the names under which such sets are published
    "train": r"train-images[-.]idx3-ubyte",
    "test": r"(t10k|test)-images[-.]idx3-ubyte",
    "train_labels": r"train-labels[-.](idx1-ubyte|idx2-int)",
    "test_labels": r"(t10k|test)-labels[-.](idx1-ubyte|idx2-int)",
}
IDX_USUAL = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
PROVIDE = "give --config.data.dir a folder with IDX files, or an .npz with train and test"


class Stored(NamedTuple):
    """An array in a file, of which the header has been read."""

    name: str  # of the file, and of the array in it, for messages
    dtype: np.dtype
    shape: tuple[int, ...]
    file: IO[bytes]  # at the array's first byte


def read_own(
    path: str | os.PathLike, log: Callable[[str], None] = print
) -> dict[str, np.ndarray | None]:
    """The images at `path`: a folder with IDX files or with one .npz file, or the .npz file itself.

    The IDX files may be gzipped. The .npz holds `train` and `test`, [N, H, W] of bool, uint8 0…255
    or floats 0…1. Images are at most 28×28, and are centred in 28×28. Labels are optional: in the
    .npz they are `train_labels` and `test_labels`. A warning names other arrays.

    Returns train and test (packed bits, uint8 [N, 98]), and train_labels and test_labels (uint8
    [N], or None). Raises VncaError for a file that is missing, damaged or of another kind.
    """
    path = Path(path)
    if os.path.isfile(path):
        if path.suffix.lower() != ".npz":
            raise VncaError(f"data.dir={path} is not an .npz file; {PROVIDE}")
        return _read_npz(path, log)
    try:
        names = sorted(name for name in os.listdir(path) if not os.path.isdir(path / name))
        names = [name for name in names if not name.startswith(".")]  # macOS adds ._NAME
    except OSError as fault:
        raise VncaError(f"data.dir={path}: {why(fault)}; {PROVIDE}") from fault
    found = {key: _find(path, names, pattern) for key, pattern in IDX_FILES.items()}
    archives = [name for name in names if name.lower().endswith(".npz")]
    if found["train"] or found["test"]:
        if archives:
            raise VncaError(f"data.dir={path} has IDX files and {archives[0]}: move one away")
        return _read_idx_files(path, found)
    if len(archives) != 1:
        count = f"{len(archives)} .npz files, such as {archives[0]}" if archives else "no .npz file"
        raise VncaError(f"data.dir={path} has no IDX files of images and {count}; {PROVIDE}")
    return _read_npz(path / archives[0], log)


# ---- The two forms -------------------------------------------------------------------------------


def _find(folder, names, pattern):
    """The file whose name ends like this, or None. A gzipped copy comes before a plain one."""
    found = [name for name in names if re.fullmatch(rf"(.*-)?{pattern}(\.gz)?", name)]
    if len({name.removesuffix(".gz") for name in found}) > 1:
        raise VncaError(
            f"data.dir={folder} has both {found[0]} and {found[-1]}: "
            "give each set a folder of its own"
        )
    return folder / found[-1] if found else None


def _read_idx_files(folder, files):
    for key, usual in IDX_USUAL.items():
        if not files[key]:
            raise VncaError(f"data.dir={folder} has no {usual}, gzipped or not: add that file")

    def open_array(key):
        return _open_idx(files[key]) if files[key] else contextlib.nullcontext()

    return _read_arrays(open_array, label_shapes=[(), (8,)])  # QMNIST's labels have 8 columns


def _read_npz(path, log):
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for key in IDX_USUAL:
            if f"{key}.npy" not in names:
                raise VncaError(f"{path} has no array {key}: save train and test with np.savez")
        unknown = sorted({name.removesuffix(".npy") for name in names} - IDX_FILES.keys())
        if unknown:
            log(f"warning: {path}: these arrays are not used: {', '.join(unknown)}. Labels are the "
                "arrays train_labels and test_labels")  # fmt: skip

        def open_array(key):
            known = f"{key}.npy" in names
            return _open_npy(path, archive, key) if known else contextlib.nullcontext()

        return _read_arrays(open_array, label_shapes=[()])


def _read_arrays(open_array, label_shapes):
    """All four arrays. open_array: key -> a context of a Stored array, or of None; label_shapes:
    the shapes allowed for a label, whose first number is the class."""
    draw, arrays = np.random.RandomState(SEED).random_sample, {}  # a stream that is frozen for good
    for key in ("train", "test"):
        with open_array(key) as stored:
            arrays[key] = binarize(stored, draw)
    for key in ("train", "test"):
        with open_array(f"{key}_labels") as stored:
            labels = stored and _read_labels(stored, len(arrays[key]), label_shapes)
            arrays[f"{key}_labels"] = labels
    return arrays


@contextlib.contextmanager
def _reading(path):
    """Turns any fault of reading this file into a VncaError of one line that names it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device may never end
            raise VncaError(f"{path} is not a file; {PROVIDE}")
        yield
    except (VncaError, MemoryError):
        raise
    except Exception as fault:  # gzip, zipfile, zlib and NumPy raise all kinds
        is_system = isinstance(fault, OSError) and fault.errno not in (None, errno.ENOENT)
        remedy = "make it readable" if is_system else "copy or download it again"
        raise VncaError(f"{path}: {why(fault)}; {remedy}") from fault


@contextlib.contextmanager
def _open_idx(path):
    """The array of an IDX file, as a Stored. Gzip is recognized by its content."""
    with _reading(path), open(path, "rb") as raw, contextlib.ExitStack() as stack:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = stack.enter_context(gzip.open(raw)) if zipped else raw
        magic = file.read(4)
        dtype, dimensions = IDX_TYPES.get(int.from_bytes(magic[:3])), int.from_bytes(magic[3:])
        sizes = file.read(4 * dimensions)
        if not dtype or not 1 <= dimensions <= 3 or len(sizes) != 4 * dimensions:
            raise VncaError(f"{path} does not begin like an IDX file of unsigned bytes: replace it")
        shape = tuple(np.frombuffer(sizes, ">u4").tolist())
        yield Stored(str(path), dtype, shape, file)


@contextlib.contextmanager
def _open_npy(path, archive, key):
    """An array of an .npz file, as a Stored. No pickle is ever loaded."""
    with archive.open(f"{key}.npy") as file:
        name = f"{path}: {key}"
        if np.lib.format.read_magic(file) != (1, 0):  # later versions have headers of any size
            raise VncaError(f"{name} is not .npy version 1.0: save a plain array with np.savez")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran:
            raise VncaError(f"{name} is in Fortran order: save np.ascontiguousarray({key})")
        yield Stored(name, dtype, shape, file)


def chunks(stored: Stored) -> Iterator[np.ndarray]:
    """Yields the rows of an array in order, [≤ 1000, …] at a time.

    Raises VncaError if the file has fewer or more bytes than the header promises.
    """
    size = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    for start in range(0, stored.shape[0], CHUNK):
        count = min(CHUNK, stored.shape[0] - start)
        content = stored.file.read(count * size)
        if len(content) != count * size:
            done = start + len(content) // size
            raise VncaError(
                f"{stored.name} ends after {done:,} of {stored.shape[0]:,} rows: copy or download "
                "it again"
            )
        yield np.frombuffer(content, stored.dtype).reshape(count, *stored.shape[1:])
    if stored.file.read(1):  # this also has zipfile compare the checksum
        raise VncaError(f"{stored.name} has more bytes than its header promises: replace it")


# ---- From grey levels to bits --------------------------------------------------------------------


def binarize(stored: Stored, draw) -> np.ndarray:
    """The images of an array [N, H, W] as packed bits, uint8 [N, 98], centred in 28×28.

    Each pixel is one Bernoulli draw with its grey level, as a fraction of white, as the
    probability. draw: shape -> uniform numbers in [0, 1). Raises VncaError unless the array has
    images of at most 28×28, of bool, uint8 0…255 or floats 0…1.
    """
    _check_images(stored)
    count, height, width = stored.shape
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    packed, start, brightest = np.empty((count, PACKED), np.uint8), 0, 0
    for part in chunks(stored):
        if stored.dtype.kind == "f":
            _check_range(stored, start, part)
        white = 255 if stored.dtype == np.uint8 else 1
        images = np.zeros((len(part), SIDE, SIDE), bool)
        images[:, top : top + height, left : left + width] = draw(part.shape) < part / white
        packed[start : start + len(part)] = np.packbits(images.reshape(-1, PIXELS), axis=1)
        start, brightest = start + len(part), max(brightest, part.max())
    if stored.dtype == np.uint8 and brightest < 128:  # most likely, white is another number there
        raise VncaError(
            f"{stored.name} has no grey level above {brightest}, and white is 255: scale the grey "
            "levels to 0…255, or save black and white images as bool in an .npz"
        )
    return packed


def _check_images(stored):
    name, shape = stored.name, list(stored.shape)
    if not (stored.dtype in (np.uint8, np.bool_) or stored.dtype.kind == "f"):
        raise VncaError(f"{name} is {stored.dtype}: it must be bool, uint8 0…255 or floats 0…1")
    if len(shape) != 3:
        raise VncaError(f"{name} has the shape {shape}: it must be [images, height, width]")
    if not all(shape):
        raise VncaError(f"{name} is empty, {shape}: give it one image or more")
    if max(shape[1:]) > SIDE:
        raise VncaError(
            f"{name} has images of {shape[1]}×{shape[2]}: make them at most {SIDE}×{SIDE}"
        )
    if shape[0] > MOST:
        raise VncaError(f"{name} has {shape[0]:,} images: choose at most {MOST:,} of them")


def _check_range(stored, start, part):
    wrong = ~((part >= 0) & (part <= 1))  # True for NaN
    if wrong.any():
        image, row, column = np.argwhere(wrong)[0]
        raise VncaError(
            f"{stored.name} has the value {part[image, row, column]} in image {start + image:,}: "
            "floats must be from 0 to 1"
        )


def _read_labels(stored, count, label_shapes):
    """The classes of `count` images, numbers 0…255: uint8 [count]."""
    wanted = [(count, *shape) for shape in label_shapes]
    if stored.shape not in wanted or stored.dtype.kind not in "iu":
        raise VncaError(
            f"{stored.name} is {stored.dtype} {list(stored.shape)}: it must be whole numbers "
            f"[{count}], one for each image"
        )
    classes = np.concatenate([part.reshape(len(part), -1)[:, 0] for part in chunks(stored)])
    wrong = classes[(classes < 0) | (classes > 255)]
    if len(wrong):
        raise VncaError(f"{stored.name} has the label {wrong[0]}: labels must be from 0 to 255")
    return classes.astype(np.uint8)
