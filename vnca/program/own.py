"""One's own images: MNIST's four IDX files with other content, one .npz file, or a folder of
pictures.

For the Bernoulli likelihood each grey level becomes a bit once, by a draw with a fixed seed, so
that equal files give equal bits at every start.
"""

import contextlib
import gzip
import math
import re
import zipfile
from pathlib import Path

import numpy as np

from vnca.program import VncaError, folders
from vnca.program.stop import say

IMAGES = "train", "test"
FILES = {  # key: the ends of the names under which such sets are published
    "train": "train-images[-.]idx3-ubyte",
    "test": "(t10k|test)-images[-.]idx3-ubyte",
    "train_labels": "train-labels[-.](idx1-ubyte|idx2-int)",
    "test_labels": "(t10k|test)-labels[-.](idx1-ubyte|idx2-int)",
    "npz": r"[^.].*\.(npz|NPZ)",
}
ARRAYS = {*FILES, "names"} - {"npz"}  # of an .npz file
IDX_TYPES = {b"\0\0\x08": "u1", b"\0\0\x0c": ">i4"}  # by the first bytes of a file
PROVIDE = (
    "give --config.data.dir a folder with train-images-idx3-ubyte and t10k-images-idx3-ubyte, "
    "gzipped or not, an .npz with the arrays train and test, or a folder of pictures "
    f"({', '.join(folders.KINDS)})"
)


def read_own(path, likelihood, log=say):
    """The images at `path`: a folder with IDX files, with one .npz file or with pictures, or the
    .npz file itself.

    The IDX files may be gzipped. The .npz holds `train` and `test`, [N, H, W] or [N, H, W, colours]
    of bool, uint8 0…255 or floats 0…1. Images are at most size×size, and are centred in this.
    Labels are optional: in the .npz they are `train_labels` and `test_labels`, and `names` has the
    names of the classes. A warning names other arrays. Pictures are read as `folders.read_tree`
    describes.

    Returns train and test (uint8 [N, stored_bytes], as they are stored for a Likelihood),
    train_labels and test_labels (uint8 [N], or None), and class_names (a tuple, or None). Raises
    VncaError for a file that is missing, damaged or of another kind.
    """
    path = Path(path)
    arrays = (
        _read_folder(path, likelihood, log) if path.is_dir() else _read_npz(path, likelihood, log)
    )
    draw = np.random.RandomState(0).random_sample  # a stream that is frozen for good
    result = {}
    for key in IMAGES:
        result[key] = to_levels(f"{path}: {key}", arrays[key], likelihood, draw)
        name = f"{key}_labels"
        result[name] = _check_labels(f"{path}: {name}", arrays.get(name), len(result[key]))
    result["class_names"] = _check_names(f"{path}: names", arrays.get("names"), result)
    return result


# ---- Files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path, remedy, error=VncaError):
    """A context that turns whatever goes wrong in it into an error of class `error`: one line with
    the path, the fault and the remedy."""
    try:
        if Path(path).is_fifo():  # it may never end
            raise ValueError("it is not a file")
        yield
    except VncaError:
        raise
    except Exception as fault:  # urllib, gzip, zipfile, zlib and NumPy raise all kinds
        line = f"{path}: {getattr(fault, 'strerror', None) or fault}; {remedy}"
        raise error(" ".join(line.split())) from fault


def _check_header(archive, name, key, likelihood):
    """Raises VncaError if an array cannot be one of images, before its content is read: it may have
    gigabytes."""
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if not dtype.hasobject:  # such an array is refused where it is read
        check_shape(name, shape, dtype, likelihood)


def _read_npz(path, likelihood, log):
    """The arrays of an .npz file that are images or labels: {key: array}. A warning names its other
    arrays. No pickle is ever loaded."""
    with reading(path, PROVIDE), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        arrays = {}
        for key in [*IMAGES, *names.intersection(ARRAYS).difference(IMAGES)]:
            if key in IMAGES:
                _check_header(archive, f"{path}: {key}", key, likelihood)
            with archive.open(f"{key}.npy") as file:  # np.load seeks: no checksum is compared then
                arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
                if file.read(1):  # at the end, zipfile compares the checksum
                    raise ValueError(f"{key} has more bytes than its header promises")
    if unused := names - arrays.keys():
        log(f"warning: {path}: {', '.join(sorted(unused))}: such arrays are not used; labels are "
            "train_labels and test_labels")  # fmt: skip
    return arrays


def _read_folder(folder, likelihood, log):
    files = {
        key: [  # no names that begin with a dot: macOS adds files ._NAME
            path
            for path in sorted(folder.iterdir())
            if re.fullmatch(rf"([^.].*-)?{ends}(\.gz)?", path.name) and not path.is_dir()
        ]
        for key, ends in FILES.items()
    }
    if archives := files.pop("npz"):
        _refuse_second(*archives, *files["train"], *files["test"])
        return _read_npz(archives[0], likelihood, log)
    if not any(files.values()) and folders.pictures_in(folder):
        return folders.read_tree(folder, likelihood, log)
    first = {}  # {how a name begins: the first such file}
    for key, paths in files.items():
        for path in paths:
            first.setdefault(path.name[: re.search(FILES[key], path.name).start()], path)
    _refuse_second(*first.values())
    arrays = {}
    for key, paths in files.items():
        if not paths and key in IMAGES:
            raise VncaError(f"{folder} has no file of {key} images; {PROVIDE}")
        for path in paths:
            array = _read_idx(path)
            if not np.array_equal(array, arrays.setdefault(key, array)):
                _refuse_second(*paths)
    return arrays


def _refuse_second(first=None, *others):
    if others:
        raise VncaError(f"{first} and {others[0].name} are two sets: give each a folder of its own")


def _read_idx(path):
    """The array of an IDX file, gzipped or not, whatever its name. QMNIST's labels are [N, 8]: of
    these it is the first column, the class."""
    with reading(path, "copy or download it again"), open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if raw.peek().startswith(b"\x1f\x8b") else raw
        start = file.read(4)
        dtype = IDX_TYPES.get(start[:3])
        if not dtype:
            raise ValueError("it does not begin like an IDX file of unsigned bytes")
        shape = np.frombuffer(file.read(4 * start[3]), ">u4").tolist()
        content = file.read(4 * math.prod(shape) + 1)  # no more, which could fill the memory
        array = np.frombuffer(content, dtype).reshape(shape)
        return array[:, 0] if shape[1:] == [8] else array


# ---- As they are stored --------------------------------------------------------------------------


def to_levels(name, images, likelihood, draw):
    """The images of an array [N, H, W] or [N, H, W, colours], as they are stored for a Likelihood.

    Numbers are rounded to its levels. If it has one level above black, each number is a Bernoulli
    draw instead, with its share of white as the probability. draw: shape -> uniform numbers in
    [0, 1). Raises VncaError unless the array has images of at most the Likelihood's size, with its
    colours, of bool, uint8 0…255 or floats 0…1, the brightest at least one half.
    """
    check_shape(name, images.shape, images.dtype, likelihood)
    levels = likelihood.levels
    white = 1 if images.dtype.kind in "bf" else 255
    if images.ndim == 3:
        images = images[..., None]
    darkest, brightest = images.min(), images.max()
    # If the brightest pixel is dark, most likely the file has another number for white.
    if not (darkest >= 0 and white / 2 <= brightest <= white):  # `not`, so that NaN fails, too
        raise VncaError(
            f"{name} has values from {darkest} to {brightest}: black must be 0 and white {white}, "
            "and the brightest pixel no darker than half of it"
        )
    # One image at a time: the random numbers for all at once would take eight bytes a pixel.
    if levels == 1:
        numbers = [draw(image.shape) < image / white for image in images]
    else:
        numbers = [rounded(image, white, levels) for image in images]
    return as_stored(np.stack(numbers), likelihood)


def check_shape(name, shape, dtype, likelihood):
    """Raises VncaError unless an array of this shape and dtype may have images of a Likelihood."""
    size, colours = likelihood.size, likelihood.colours
    axes = (*shape, 1) if len(shape) == 3 else shape
    if not (
        len(axes) == 4
        and axes[3] == colours
        and 1 <= axes[0] <= 1_000_000
        and 1 <= min(axes[1:3]) <= max(axes[1:3]) <= size
        and (dtype.kind in "bf" or dtype == np.uint8)
    ):
        wanted = "[images, height, width" + (f", {colours}]" if colours > 1 else "]")
        raise VncaError(
            f"{name} is {dtype} {list(shape)}: for config.model.size={size} and "
            f"config.model.colours={colours} it must be bool, uint8 0…255 or floats 0…1, {wanted}, "
            f"with 1 to 1,000,000 images of at most {size}×{size}"
        )


def rounded(images, white, levels):
    """Numbers from 0 to `white`, as the nearest of 0, 1, …, levels: uint8 of their shape."""
    return np.round(images * (levels / white)).astype(np.uint8)


def as_stored(images, likelihood):
    """Images [N, H, W, colours] of 0 … levels, centred in zeros, as a Likelihood stores them: uint8
    [N, stored_bytes]."""
    size = likelihood.size
    _, height, width, _ = images.shape
    above, left = (size - height) // 2, (size - width) // 2
    margins = [(0, 0), (above, size - height - above), (left, size - width - left), (0, 0)]
    numbers = np.pad(images, margins).reshape(len(images), -1)
    return np.packbits(numbers, axis=1) if likelihood.levels == 1 else numbers


def _check_names(name, names, result):
    """The names of the classes, a tuple with one for each label; None without names."""
    if names is None:
        return None
    labels = [result[f"{key}_labels"] for key in IMAGES]
    most = max((int(some.max()) for some in labels if some is not None), default=-1)
    if names.ndim != 1 or names.dtype.kind != "U" or most >= len(names):
        raise VncaError(
            f"{name} is {names.dtype} {list(names.shape)}: it must be an array of strings, one for "
            f"each label from 0 to {most}"
        )
    return tuple(names.tolist())


def _check_labels(name, labels, count):
    """The classes of `count` images: uint8 [count]; None without labels."""
    if labels is None:
        return None
    if not (
        labels.shape == (count,) and labels.dtype.kind in "iu" and np.isin(labels, range(256)).all()
    ):
        raise VncaError(
            f"{name} is {labels.dtype} {list(labels.shape)}: it must be whole numbers from 0 to "
            f"255, one for each of {count} images"
        )
    return labels.astype(np.uint8)
