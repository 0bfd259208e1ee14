"""The data sets: binarized MNIST, as published (`larochelle`) and as in the package (`bundled`),
faces in colours, which the package has too (`faces`), and one's own images (`own`).

On the host and on the devices, an image is a row of bytes, as a Likelihood says. In the files of
the digits it is the packed bits of 28×28 pixels, `np.packbits`, row by row.

`python -m vnca.program.data IDX_DIR` makes `bundled.npz` from MNIST's four IDX files.
"""

import hashlib
import os
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vnca.likelihoods import as_floats, binomial
from vnca.model import make_likelihood
from vnca.program import VncaError, folders, store
from vnca.program.own import IMAGES, as_stored, read_own, reading, rounded
from vnca.program.stop import say

# H. Larochelle's files, the set of the reported likelihoods: text, an image a line, 784 characters
# 0 or 1, separated by single spaces. The site uses plain HTTP, so a file is trusted only if its
# hash is right. The test file is sorted by digit, with MNIST's counts.
URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
TEXTS = {  # key: SHA-256 of binarized_mnist_KEY.amat
    "train": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "valid": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "test": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
BITS = {  # key: SHA-256 of the packed bits, which checks a copy in any file format
    "train": "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906",
    "valid": "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d",
    "test": "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2",
}
TEST_COUNTS = 980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009  # images of each digit 0…9
TIMEOUT = 10  # seconds without an answer or a byte; the whole transfer has no limit
BRING = (
    "provide the three .amat files with --config.data.dir=DIR, or use --config.data.name=bundled, "
    "or own for your own images"
)

REINSTALL = "reinstall the package"  # what helps where a file of it is damaged
BUNDLED = Path(__file__).with_name("bundled.npz")
BUNDLED_BITS = {  # key: SHA-256 of the array's bytes
    "train": "64ae24af85b9f4f718d9cac915298d13ca590a0ac86e2af84ba65b9896f9f782",
    "test": "24d940a7f1971047bca2850cd0c4cb49e61e6ef6a93d3cdc1a100e8bf7fad4c6",
    "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}
FACES = Path(__file__).with_name("faces.npz")  # FACES.md says what is in it
FACE_ARRAYS = {  # key: SHA-256 of the array's bytes
    "train": "2b3e1abffb95641f2e4bb788865898bed58a3c79638e9a2854d1a9d8109f59e6",
    "test": "2485b4ef9e5086dca82ef36b34c6657fccfe785320ca9fe771acc8ddd0ead270",
    "train_labels": "bc19dd50155e880ee6bcefbf3122531d0c1a0904b9fa42971da41c44378db99a",
    "test_labels": "7c5a7b4e0d51245291ef298e41677a11577869e62e4637caa1697971c5f282f5",
}
FACE_CLASSES = (
    "short hair", "long hair", "hat",
    "short hair, glasses", "long hair, glasses", "hat, glasses",
)  # fmt: skip
TRAINING_IMAGES = {
    "auto": 60_000, "larochelle": 60_000, "bundled": 60_000, "faces": 30_000, "celeba": 162_770,
}  # fmt: skip


MUTABLE = "own", "celeba"  # sets whose content only their SHA-256 tells


class Unavailable(VncaError):
    """The published set cannot be downloaded. Only for this error does `auto` use the bundled
    set."""


class Dataset(NamedTuple):
    """N images for training and M for testing, and their labels where these are known. MNIST has N
    = 60,000 and M = 10,000, and faces N = 30,000 and M = 3,000."""

    name: str  # "larochelle", "bundled", "faces" or "own", never "auto"
    train: np.ndarray  # uint8 [N, stored_bytes]
    test: np.ndarray  # uint8 [M, stored_bytes]
    train_labels: np.ndarray | None  # uint8 [N]; None for larochelle, or own without labels
    test_labels: np.ndarray | None  # uint8 [M]; None for own without labels
    class_names: tuple | None = None  # of labels 0, 1, …; None if they are called by their numbers

    @property
    def sha256(self):
        """The SHA-256 of all images: hexadecimal, 64 characters."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.test)} ".encode())
        for images in (self.train, self.test):
            digest.update(np.ascontiguousarray(images))
        return digest.hexdigest()

    @property
    def identity(self):
        """The name of the set. Pictures in a folder and arrays may change, so with theirs comes the
        start of their SHA-256."""
        return f"{self.name} {self.sha256[:12]}" if self.name in MUTABLE else self.name


DIGITS = binomial(32, 1, 1)  # 28×28 digits with two zeros on each side, as all published models


def load(name, data_dir=None, likelihood=DIGITS, log=say):
    """Loads a data set: "larochelle", "bundled", "auto" (larochelle if available, else bundled),
    "faces", "celeba" or "own", with the images stored for a Likelihood.

    larochelle comes from `data_dir` if given: a folder with the three .amat files or with one .npz
    file of their packed bits, or that .npz file itself. The folder is never written to. Otherwise
    larochelle comes from the `cache_folder`, and is downloaded if it is not there yet. Its train
    and valid files together are `train`. own and celeba come from `data_dir`, as `read_own` and
    `folders.read_celeba` describe. log: a function that takes a line of text.

    Raises VncaError for an unknown name, for images of another size or with other colours, for a
    `data_dir` that is needed and missing or has no use, for a given or cached file that is missing
    or damaged, and for "larochelle" if it cannot be downloaded. If that happens, "auto" logs a
    warning and loads bundled.
    """
    if (
        name not in (*TRAINING_IMAGES, "own")
        or (name in ("own", "celeba") and not data_dir)
        or (name in ("bundled", "faces") and data_dir)
    ):
        raise VncaError(
            f"config.data.name={name} and config.data.dir={data_dir}: choose auto or larochelle, "
            "bundled or faces without data.dir, or own or celeba with the place of the images as "
            "data.dir"
        )
    place = Path(os.path.expanduser(data_dir or ""))
    if name == "own":
        return Dataset(name, **read_own(place, likelihood, log))
    if name == "faces":
        return _faces(likelihood)
    if name == "celeba":
        return _celeba(place, likelihood, log)
    if likelihood.colours > 1 or likelihood.size < 28:
        raise VncaError(
            f"config.data.name={name}: these are grey digits of 28×28 pixels: they need "
            f"model.colours=1, not {likelihood.colours}, and a model.size of 32 or more, not "
            f"{likelihood.size}"
        )
    if name == "bundled":
        arrays = _read_bits(BUNDLED, REINSTALL, BUNDLED_BITS)
        return Dataset(name, **arrays | {n: digits(arrays[n], likelihood) for n in IMAGES})
    try:
        if not data_dir:
            bits = _read_cached(log)
        elif [*place.glob("*.amat")]:
            bits = _read_texts(place.resolve().as_uri(), VncaError)
        else:
            bits = _read_bits(next(place.glob("*.npz"), place), BRING, BITS)
    except Unavailable as fault:
        if name == "larochelle":
            raise
        log(
            f"warning: using the bundled set instead of the published one ({fault}). It is a "
            "different binarization of the same digits, so its likelihoods are not comparable to "
            "published ones"
        )
        return load("bundled", None, likelihood)
    train, valid, test = (digits(bits[key], likelihood) for key in BITS)
    labels = np.uint8(np.repeat(range(10), TEST_COUNTS))
    return Dataset("larochelle", np.concatenate([train, valid]), test, None, labels)


def _faces(likelihood):
    """The Dataset of faces, their colours rounded to the levels of a Likelihood."""
    size, colours, levels = likelihood.size, likelihood.colours, likelihood.levels
    if (size, colours) != (16, 3) or levels == 1:
        raise VncaError(
            f"config.data.name=faces: these are faces of 16×16 pixels in colours: they need "
            f"model.size=16, not {size}, model.colours=3, not {colours}, and a model.levels above "
            f"1, not {levels}"
        )
    with reading(FACES, REINSTALL), np.load(FACES) as file:
        arrays = _known_arrays(file, FACE_ARRAYS)
    numbers = rounded(np.arange(256), 255, levels)  # of each brightness of a colour
    stored = {n: as_stored(numbers[arrays[n]], likelihood) for n in IMAGES}
    return Dataset("faces", **arrays | stored, class_names=FACE_CLASSES)


def _celeba(place, likelihood, log):
    """The Dataset of CelebA in a folder, its colours rounded to the levels of a Likelihood."""
    if likelihood.levels == 1:
        raise VncaError("config.model.levels=1: config.data.name=celeba needs more levels")
    arrays = folders.read_celeba(place, likelihood, log, cache_folder())
    numbers = rounded(np.arange(256), 255, likelihood.levels)
    # One after the other, so that two gigabytes are not there twice.
    stored = {n: as_stored(numbers[arrays.pop(n)], likelihood) for n in IMAGES}
    return Dataset("celeba", **stored, train_labels=None, test_labels=None)


def digits(bits, likelihood):
    """The packed bits of N digits, uint8 [98·N], as they are stored for a Likelihood."""
    pixels = np.unpackbits(bits).reshape(-1, 28, 28, 1)
    return as_stored(pixels * np.uint8(likelihood.levels), likelihood)


def noise(likelihood, count):
    """So many images of random numbers, as they are stored for a Likelihood. Two rows and columns
    on each side are 0, since a baseline may not draw them."""
    side = likelihood.size - 4
    shape = count, side, side, likelihood.colours
    numbers = np.random.RandomState(0).randint(likelihood.levels + 1, size=shape, dtype=np.uint8)
    return as_stored(numbers, likelihood)


def check_border(data, likelihood, drawn_size):
    """Raises VncaError if an image of a Dataset is not 0 all around its central square of
    drawn_size×drawn_size, which is all that a baseline draws. A white pixel there would cost 10⁴
    nats."""
    for images in (data.train, data.test):
        used = np.bitwise_or.reduce(images, axis=0)  # where any image is not 0
        used = np.array(as_floats(likelihood, used))
        start = (likelihood.size - drawn_size) // 2
        used[start : start + drawn_size, start : start + drawn_size] = 0
        if used.any():
            raise VncaError(
                f"config.model.drawn_size={drawn_size}: images of {data.name} are not 0 outside of "
                f"their central {drawn_size}×{drawn_size}: set it to {likelihood.size}"
            )


def training_images(config):
    """How many training images a config has. Only one's own images have to be read to count them,
    and only once. Raises VncaError as `load` does."""
    data = config.data
    if data.name == "own":
        return _own_training_images(data.dir, make_likelihood(config.model))
    return TRAINING_IMAGES[data.name]


@lru_cache
def _own_training_images(data_dir, likelihood):
    return len(load("own", data_dir, likelihood).train)


# ---- Sets that are known by their hashes: {key: array} -------------------------------------------


def _read_cached(log):
    """The bits from the cache. If they are not there, it downloads and keeps all of them."""
    folder = cache_folder()
    path = folder / "larochelle.npz"
    if os.path.exists(path):
        return _read_bits(path, "delete it to download it again", BITS)
    log(f"downloading 110 MB from {URL}")
    bits = _read_texts(URL, Unavailable, log)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store.clean(folder)
        store.write(path, lambda file: np.savez_compressed(file, **bits))
    except OSError as fault:
        log(f"warning: the next start downloads it again, because it cannot be kept ({fault})")
    return bits


def cache_folder():
    """The folder vnca in the user's cache folder. Raises Unavailable if the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    with reading("XDG_CACHE_HOME", BRING, Unavailable):  # users in containers may have no home
        return Path(base if os.path.isabs(base) else Path.home() / ".cache", "vnca")


def _read_texts(place, error, log=lambda line: None):
    """The bits of the three texts at a place, the URL of a site or of a folder. In a text, each
    pixel is two bytes, a digit and a separator. Logs each file's name and size."""
    bits = {}
    for key, sha256 in TEXTS.items():
        url = f"{place}/binarized_mnist_{key}.amat"
        with reading(url, BRING, error), urllib.request.urlopen(url, timeout=TIMEOUT) as file:
            # A text has 78,400,000 bytes or fewer; a longer answer could fill the memory.
            text = _known(key, file.read(100_000_000), sha256)
            bits[key] = np.packbits(np.frombuffer(text[::2], np.uint8) == ord("1"))
        log(f"{url}: {len(text) // 1_000_000} MB")
    return bits


def _read_bits(path, remedy, hashes):
    with reading(path, remedy), np.load(path) as file:
        return _known_arrays(file, hashes)


def _known_arrays(arrays, hashes):
    return {
        key: _known(key, np.ascontiguousarray(arrays[key], np.uint8), sha256)
        for key, sha256 in hashes.items()
    }


def _known(key, content, sha256):
    """The content, bytes or an array of bytes. Raises ValueError if it has another hash."""
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise ValueError(f"{key} has SHA-256 {actual}, not {sha256}")
    return content


# ---- The bundled set -----------------------------------------------------------------------------


def make_bundled(idx_dir):
    """Creates the arrays of `bundled.npz` from MNIST's four IDX files (gzipped or plain) in
    `idx_dir`.

    `read_own` reads and binarizes them, as it does with anyone's images. The keys are train and
    test (packed bits, uint8 [n, 98]), train_labels and test_labels (uint8 [n]).

    Raises VncaError if a file is missing, or if the arrays are not those of the package.
    """
    with reading(idx_dir, "provide MNIST's original files"):
        arrays = read_own(idx_dir, DIGITS)
        for name in IMAGES:
            pixels = np.unpackbits(arrays[name]).reshape(-1, 32, 32)[:, 2:30, 2:30]
            arrays[name] = np.packbits(pixels.reshape(len(pixels), -1), axis=1)
        return _known_arrays(arrays, BUNDLED_BITS)


def write_bundled(idx_dir):
    """Writes `bundled.npz` with the arrays of `make_bundled`. Raises what that raises, and
    OSError."""
    store.write(BUNDLED, lambda file: np.savez_compressed(file, **make_bundled(idx_dir)))


if __name__ == "__main__":
    from vnca.program import cli

    cli.call(write_bundled, "python -m vnca.program.data IDX_DIR")
