"""The data sets as packed bits: binarized MNIST, as published (`larochelle`) and as in the package
(`bundled`), and one's own images (`own`).

An image takes 98 bytes on the host and on the devices: `np.packbits` of its 784 pixels, row by row.
`vnca.images.unpack` converts a batch to float images inside jit.

`python -m vnca.program.data IDX_DIR` recreates `bundled.npz` from MNIST's four IDX files.
"""

import hashlib
import os
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vnca.program import VncaError, files
from vnca.program.download import BRING, Unavailable, blocks, why
from vnca.program.own import PACKED, PIXELS, read_own
from vnca.program.metrics import pace

MNIST_IMAGES = 60_000, 10_000  # for training and for testing, in larochelle and bundled


class Dataset(NamedTuple):
    """N packed binary images for training and M for testing, and their labels where these are
    known. MNIST has N = 60,000 and M = 10,000."""

    name: str  # "larochelle", "bundled" or "own", never "auto"
    train: np.ndarray  # uint8 [N, 98]
    test: np.ndarray  # uint8 [M, 98]
    train_labels: np.ndarray | None  # uint8 [N]; None for larochelle, or own without labels
    test_labels: np.ndarray | None  # uint8 [M]; None for own without labels

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

    @property
    def bytes(self) -> int:
        """The size of the text. Each pixel is a digit and a separator."""
        return self.rows * PIXELS * 2


# H. Larochelle's files, the set of the reported likelihoods. The site uses plain HTTP, so a file is
# trusted only if its hash is right. The test file is sorted by digit, with MNIST's counts.
LAROCHELLE_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
LAROCHELLE = {
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
}
TEST_COUNTS = 980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009  # images of each digit 0…9

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
    log: Callable[[str], None] = print,
) -> Dataset:
    """Loads a data set: "larochelle", "bundled", "auto" (larochelle if available, else bundled), or
    "own".

    larochelle comes from `data_dir` if given: a folder with three .amat files or with one .npz file
    of their packed bits, or that .npz file. The folder is never written to. Otherwise it comes from
    the `cache_folder`, after a download if it is not there yet. Its train and valid files together
    are `train`. own comes from `data_dir`, as `read_own` describes.

    Raises VncaError for an unknown name, for a `data_dir` that is needed and missing or has no use,
    for a given or cached file that is missing or damaged, and for "larochelle" if it cannot be
    downloaded. In that last case "auto" logs a warning and loads bundled.
    """
    if name not in ("auto", "larochelle", "bundled", "own"):
        raise VncaError(f"data.name is {name!r}: choose auto, larochelle, bundled or own")
    if name == "own":
        if not data_dir:
            raise VncaError(
                "config.data.name=own needs the place of your images: add --config.data.dir=PATH"
            )
        return Dataset("own", **read_own(os.path.expanduser(data_dir), log))
    if name == "bundled":
        if data_dir:
            raise VncaError(
                f"data.dir={data_dir} has no meaning for the bundled set: leave it out, or use "
                "--config.data.name=larochelle, or own for your own images"
            )
        return _load_bundled()
    try:
        packed = _load_given(Path(os.path.expanduser(data_dir))) if data_dir else _load_cached(log)
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
    labels = np.repeat(np.arange(10, dtype=np.uint8), TEST_COUNTS)
    return Dataset("larochelle", train, packed["test"], None, labels)


@lru_cache
def image_counts(name: str, data_dir: str | os.PathLike | None) -> tuple[int, int]:
    """The numbers of training and test images of a set. Only one's own images are read for it, once
    and without the warnings that training logs."""
    if name != "own":
        return MNIST_IMAGES
    data = load(name, data_dir, log=lambda line: None)
    return len(data.train), len(data.test)


# ---- The sources of a set: the package, a folder, the cache


def _load_bundled() -> Dataset:
    arrays = _read(_read_npz, BUNDLED, BUNDLED_ARRAYS, "reinstall the package")
    return Dataset("bundled", **arrays)


def _load_given(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz" and os.path.isfile(path):
        return _read(_read_npz, path, _packed_arrays(), BRING)
    if not os.path.isdir(path):
        raise VncaError(f"data.dir={path} is not a folder; {BRING}")
    texts = {key: path / split.file for key, split in LAROCHELLE.items()}
    npz = sorted(path.glob("*.npz"))
    if len(npz) == 1 and not any(map(os.path.exists, texts.values())):
        return _read(_read_npz, npz[0], _packed_arrays(), BRING)
    return {key: _read(_read_amat, texts[key], LAROCHELLE[key], BRING) for key in texts}


def _load_cached(log) -> dict[str, np.ndarray]:
    path = cache_folder() / "larochelle.npz"
    if not os.path.exists(path):
        return _download(path, log)
    return _read(_read_npz, path, _packed_arrays(), "delete it to download it again")


def cache_folder() -> Path:
    """The folder vnca in the user's cache folder. Raises Unavailable if the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vnca"
    except RuntimeError as fault:  # users in containers may have no home
        raise Unavailable(f"there is no home folder: set XDG_CACHE_HOME, or {BRING}") from fault


def _packed_arrays() -> dict[str, tuple[tuple[int, ...], str]]:
    return {key: ((s.rows, PACKED), s.packed_sha256) for key, s in LAROCHELLE.items()}


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
    return _pack(np.fromfile(path, np.uint8), split)


def _pack(text: np.ndarray, split: Split) -> np.ndarray:
    """The packed bits, uint8 [rows, 98], of the bytes of a text, uint8 [rows · 784 · 2].

    Each pixel is two bytes, its digit and a separator, so no parser is needed. Raises ValueError
    unless the text is the published one.
    """
    if len(text) != split.bytes:
        raise ValueError(f"it has {len(text):,} bytes, not {split.bytes:,}")
    _check_sha256(text, split.sha256, "the text")
    return np.packbits(text.reshape(split.rows, PIXELS, 2)[..., 0] == ord("1"), axis=1)


def _read_npz(path: Path, expected: dict) -> dict[str, np.ndarray]:
    """Reads the uint8 arrays in `expected`, {key: (shape, SHA-256)}, and no pickle."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for key, (shape, sha256) in expected.items():
            with archive.open(f"{key}.npy") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
            if (array.shape, array.dtype) != (shape, np.uint8):
                found = f"{array.dtype} {list(array.shape)}"
                raise ValueError(f"{key} is {found}, not uint8 {list(shape)}")
            arrays[key] = np.ascontiguousarray(array)
            _check_sha256(arrays[key], sha256, key)
    return arrays


# ---- The download


def _download(path: Path, log) -> dict[str, np.ndarray]:
    """Downloads the three files and writes their packed bits to `path`, all of them or, with a
    warning, nothing.

    Each text is held in memory, and `path` appears in one operation. So several downloads can run
    at the same time.
    """

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # a mistake is found before 110 MB arrive
    except OSError as fault:
        text = f"cannot use the cache {path.parent}: {why(fault)}; {BRING}"
        raise Unavailable(text) from fault
    packed = _download_texts(log)
    try:
        files.write(path, lambda file: np.savez_compressed(file, **packed))
    except VncaError as fault:
        log(f"warning: the next start downloads it again, because {path} cannot be written "
            f"({why(fault.__cause__)})")  # fmt: skip
    return packed


def _download_texts(log) -> dict[str, np.ndarray]:
    """The packed bits of the three texts on the site: {key: uint8 [rows, 98]}.

    Raises Unavailable if one does not arrive, or is not the published one.
    """
    total = sum(split.bytes for split in LAROCHELLE.values())
    log(f"downloading {total / 1e6:,.0f} MB from {LAROCHELLE_URL}")
    packed, done = {}, 0  # arrays; bytes
    start = shown = time.monotonic()
    for key, split in LAROCHELLE.items():
        url, text = LAROCHELLE_URL + split.file, bytearray()
        for block in blocks(url):
            text += block
            done += len(block)
            if len(text) > split.bytes:  # a longer body could fill the memory
                break
            now = time.monotonic()
            if now - shown > 5 or done == total:
                shown = now
                speed = pace(now - start, (total - done) / 1e6, MB=done / 1e6)
                log(f"{done / 1e6:.1f} of {total / 1e6:.1f} MB  {speed}")
        try:
            packed[key] = _pack(np.frombuffer(text, np.uint8), split)
        except ValueError as fault:
            raise Unavailable(f"{url}: {why(fault)}; {BRING}") from fault
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
