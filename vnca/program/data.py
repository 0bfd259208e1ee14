"""The data sets as packed bits: binarized MNIST, as published (`larochelle`) and as in the package
(`bundled`), and one's own images (`own`).

An image takes 98 bytes on the host and on the devices: `np.packbits` of its 784 pixels, row by row.
`vnca.images.unpack` converts a batch to float images inside jit.

`python -m vnca.program.data IDX_DIR` recreates `bundled.npz` from MNIST's four IDX files.
"""

import contextlib
import hashlib
import io
import math
import os
import shutil
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vnca.program import VncaError, files
from vnca.program.download import BRING, Unavailable, blocks, progress, why
from vnca.program.own import PACKED, PIXELS, read_own

MNIST_IMAGES = 60_000, 10_000  # for training and for testing, in larochelle and bundled


class Dataset(NamedTuple):
    """N packed binary images for training and M for testing, and their labels where these are
    known. MNIST has N = 60,000 and M = 10,000."""

    name: str  # "larochelle", "bundled" or "own", never "auto"
    train: np.ndarray  # uint8 [N, 98]
    test: np.ndarray  # uint8 [M, 98]
    train_labels: np.ndarray | None  # uint8 [N]; None for larochelle, which has none
    test_labels: np.ndarray | None  # uint8 [M]; one's own images may have none

    @property
    def sha256(self) -> str:
        """The SHA-256 of the bits of all images: hexadecimal, 64 characters."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.test)} ".encode())
        digest.update(np.ascontiguousarray(self.train))
        digest.update(np.ascontiguousarray(self.test))
        return digest.hexdigest()

    @property
    def identity(self) -> str:
        """The name of the set. One's own images may change, so theirs includes the start of their
        SHA-256."""
        return f"own {self.sha256[:12]}" if self.name == "own" else self.name


class Split(NamedTuple):
    """One published text file: `rows` lines of 784 characters 0 or 1, separated by single
    spaces."""

    file: str
    rows: int
    sha256: str  # of the text
    packed_sha256: str  # of the packed bits, which checks a copy in any file format


class Source(NamedTuple):
    """The address and the expected content of the published set."""

    url: str  # ends in a slash
    splits: dict[str, Split]  # keys train, valid, test
    test_counts: tuple[int, ...]  # images of each digit 0…9 in the test file
    connect_s: float = 5.0  # timeout of connecting
    stall_s: float = 20.0  # timeout of waiting for the next byte; the whole transfer has none


# H. Larochelle's files, the set of the reported likelihoods. The site uses plain HTTP, so a file is
# trusted only if its hash is right. The test file is sorted by digit, with MNIST's counts.
LAROCHELLE = Source(
    "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
    {
        "train": Split(
            "binarized_mnist_train.amat",
            50_000,
            "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
            "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906",
        ),
        "valid": Split(
            "binarized_mnist_valid.amat",
            10_000,
            "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
            "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d",
        ),
        "test": Split(
            "binarized_mnist_test.amat",
            10_000,
            "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
            "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2",
        ),
    },
    (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
)

BUNDLED = Path(__file__).with_name("bundled.npz")
BUNDLED_ARRAYS = {  # key: shape, SHA-256 of the bytes
    "train": ((60_000, PACKED), "64ae24af85b9f4f718d9cac915298d13ca590a0ac86e2af84ba65b9896f9f782"),
    "test": ((10_000, PACKED), "24d940a7f1971047bca2850cd0c4cb49e61e6ef6a93d3cdc1a100e8bf7fad4c6"),
    "train_labels": ((60_000,), "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13"),
    "test_labels": ((10_000,), "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5"),
}


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    source: Source = LAROCHELLE,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Loads a data set: "larochelle", "bundled", "auto" (larochelle if available, else bundled), or
    "own".

    larochelle comes from the folder `data_dir` if given: three .amat files, or one .npz file with
    their packed bits. The folder is never written to. Otherwise it comes from the cache
    (`cache_dir`, default ~/.cache/vnca), after a download if it is not there yet. Its train and
    valid files together are `train`. own comes from `data_dir`, as `read_own` describes.

    Raises VncaError for an unknown name, for a given or cached file that is damaged, and for
    "larochelle" if it is not available. In that last case "auto" logs a warning and loads bundled.
    """
    if name not in ("auto", "larochelle", "bundled", "own"):
        raise VncaError(f"data.name is {name!r}: choose auto, larochelle, bundled or own")
    if name == "own":
        if not data_dir:
            raise VncaError(
                "config.data.name=own needs the place of your images: add --config.data.dir=PATH"
            )
        return Dataset("own", **read_own(os.path.expanduser(data_dir)))
    if name == "bundled":
        if data_dir:
            raise VncaError(
                f"data.dir={data_dir} has no meaning for the bundled set: leave it out, or use "
                "--config.data.name=larochelle, or own for your own images"
            )
        return _load_bundled()
    try:
        if data_dir:
            packed = _load_dir(Path(os.path.expanduser(data_dir)), source)
        else:
            packed = _load_cached(cache_dir, source, log)
    except Unavailable as fault:
        if name == "larochelle":
            raise
        log(
            f"warning: using the bundled set instead of the published one ({fault}). It is a "
            "different binarization of the same digits, so its likelihoods are not comparable to "
            "published ones"
        )
        return _load_bundled()
    train = np.concatenate([packed["train"], packed["valid"]])
    labels = np.repeat(np.arange(10, dtype=np.uint8), source.test_counts)
    return Dataset("larochelle", train, packed["test"], None, labels)


def image_counts(name: str, data_dir: str | os.PathLike | None) -> tuple[int, int]:
    """The numbers of training and test images of a set. Only one's own images are read for it."""
    if name != "own":
        return MNIST_IMAGES
    data = load(name, data_dir)
    return len(data.train), len(data.test)


# ---- The sources of a set: the package, a folder, the cache


def _load_bundled() -> Dataset:
    arrays = _read(_read_npz, BUNDLED, BUNDLED_ARRAYS, "reinstall the package")
    return Dataset("bundled", **arrays)


def _load_dir(folder: Path, source: Source) -> dict[str, np.ndarray]:
    if not os.path.isdir(folder):
        raise VncaError(f"data.dir={folder} is not a folder; {BRING}")
    texts = {key: folder / split.file for key, split in source.splits.items()}
    npz = sorted(folder.glob("*.npz"))
    if len(npz) == 1 and not any(map(os.path.exists, texts.values())):
        return _read(_read_npz, npz[0], _packed_arrays(source), BRING)
    return {key: _read(_read_amat, texts[key], source.splits[key], BRING) for key in texts}


def _load_cached(cache_dir, source: Source, log) -> dict[str, np.ndarray]:
    folder = Path(cache_dir) if cache_dir else cache_folder()
    path = folder / "larochelle.npz"
    if not os.path.exists(path):
        return _download(folder, path, source, log)
    return _read(_read_npz, path, _packed_arrays(source), "delete it to download it again")


def cache_folder() -> Path:
    """The folder vnca in the user's cache folder. Raises Unavailable if the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vnca"
    except RuntimeError as fault:  # users in containers may have no home
        raise Unavailable(f"there is no home folder: set XDG_CACHE_HOME, or {BRING}") from fault


def _packed_arrays(source: Source) -> dict[str, tuple[tuple[int, ...], str]]:
    return {key: ((s.rows, PACKED), s.packed_sha256) for key, s in source.splits.items()}


# ---- The file formats. Readers raise ValueError or OSError. `_read` adds the path and the remedy.


def _read(reader, path: Path, expected, remedy: str):
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may have no end
            raise ValueError("it is not a file")
        return reader(path, expected)
    except OSError as fault:
        if isinstance(fault, FileNotFoundError):
            raise VncaError(f"{path}: {why(fault)}; {remedy}") from fault
        raise files.cannot_read(path, fault) from fault
    except Exception as fault:  # a damaged zip file can fail in any module under zipfile
        raise VncaError(f"{path}: {why(fault)}; {remedy}") from fault


def _check_sha256(content, sha256: str, name: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has SHA-256 {found[:12]}…, not {sha256[:12]}…")


def _read_amat(path: Path, split: Split) -> np.ndarray:
    """Reads one text file as packed bits, uint8 [rows, 98]."""
    size, expected = path.stat().st_size, split.rows * PIXELS * 2
    if size != expected:
        raise ValueError(f"it has {size:,} bytes, not {expected:,}")
    text = np.fromfile(path, np.uint8)
    _check_sha256(text, split.sha256, "the text")
    # Each pixel is two bytes, its digit and a separator, so no parser is needed. Reading, hashing
    # and packing all three files takes 0.25 s.
    digits, separators = np.moveaxis(text.reshape(split.rows, PIXELS, 2), -1, 0)
    ends = (separators[:, :-1] == ord(" ")).all() and (separators[:, -1] == ord("\n")).all()
    if not (ends and ((digits == ord("0")) | (digits == ord("1"))).all()):
        raise ValueError("it is not lines of 784 characters 0 or 1, separated by single spaces")
    packed = np.packbits(digits == ord("1"), axis=1)
    _check_sha256(packed, split.packed_sha256, "the packed text")
    return packed


def _read_npz(path: Path, expected: dict) -> dict[str, np.ndarray]:
    """Reads only the uint8 arrays in `expected`, {key: (shape, SHA-256)}.

    np.load trusts the file. This function refuses an array that declares another size, dtype or
    shape before it allocates or unpickles anything.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for key, (shape, sha256) in expected.items():
            member, size = archive.getinfo(f"{key}.npy"), math.prod(shape)
            if member.file_size > size + 1024:  # np.save writes a header of 128 bytes
                raise ValueError(f"{key} declares {member.file_size:,} bytes, not {size:,}")
            content = io.BytesIO(archive.read(member))  # reads no more than the declared size
            if np.lib.format.read_magic(content) != (1, 0):
                raise ValueError(f"{key} does not have .npy version 1.0")
            found, fortran, dtype = np.lib.format.read_array_header_1_0(content)
            if (found, dtype) != (shape, np.uint8):
                raise ValueError(f"{key} is {dtype} {list(found)}, not uint8 {list(shape)}")
            flat, order = np.frombuffer(content.read(), np.uint8), "F" if fortran else "C"
            arrays[key] = np.ascontiguousarray(flat.reshape(shape, order=order))
            _check_sha256(arrays[key], sha256, key)
    return arrays


# ---- The download


def _download(folder: Path, path: Path, source: Source, log) -> dict[str, np.ndarray]:
    """Downloads the three files and writes their packed bits to `path`, all of them or nothing.

    Each process works in its own temporary folder, which is always removed, and then moves the
    finished file to `path` in one operation. So several downloads can run at the same time.
    """
    packed, done = {}, 0  # arrays; bytes
    total = sum(split.rows * PIXELS * 2 for split in source.splits.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("download-*"):
            with contextlib.suppress(FileNotFoundError):  # another process may have just removed it
                if time.time() - leftover.stat().st_mtime > 86_400:  # a day: its process was killed
                    shutil.rmtree(leftover, ignore_errors=True)
        with (
            tempfile.TemporaryDirectory(prefix="download-", dir=folder) as temporary,
            progress(total, log) as show,
        ):
            log(f"downloading {total / 1e6:,.0f} MB from {source.url}")
            for key, split in source.splits.items():
                url, text = source.url + split.file, Path(temporary, split.file)
                limit = done + split.rows * PIXELS * 2
                with open(text, "wb") as file:
                    for block in blocks(url, source.connect_s, source.stall_s):
                        file.write(block)
                        done += len(block)
                        if done > limit:  # a longer body could fill the disk
                            break
                        show(done)
                try:
                    packed[key] = _read_amat(text, split)
                except ValueError as fault:
                    raise Unavailable(f"{url}: {why(fault)}; {BRING}") from fault
                text.unlink()
            with open(Path(temporary, path.name), "wb") as file:
                np.savez_compressed(file, **packed)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, path)
    except OSError as fault:
        raise Unavailable(f"cannot use the cache {folder}: {why(fault)}; {BRING}") from fault
    return packed


# ---- The creation of the bundled set


def make_bundled(idx_dir: str | os.PathLike) -> dict[str, np.ndarray]:
    """Creates the arrays of `bundled.npz` from MNIST's four IDX files (gzipped or plain) in
    `idx_dir`.

    `read_own` reads and binarizes them, as it does with anyone's images. The keys are train and
    test (packed bits, uint8 [n, 98]), train_labels and test_labels (uint8 [n]).

    Raises VncaError if a file is missing, or if the arrays are not those of the package.
    """
    arrays = read_own(idx_dir)
    for key, (_, sha256) in BUNDLED_ARRAYS.items():
        try:
            _check_sha256(arrays[key] if arrays[key] is not None else b"", sha256, key)
        except ValueError as fault:
            raise VncaError(f"{idx_dir}: {fault}; provide MNIST's original files") from fault
    return arrays


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m vnca.program.data IDX_DIR")
    try:
        made = make_bundled(sys.argv[1])
    except VncaError as fault:
        sys.exit(f"error: {fault}")
    np.savez_compressed(BUNDLED, **made)
    for key, array in made.items():
        print(f"{key}: {list(array.shape)} {hashlib.sha256(array).hexdigest()}")
