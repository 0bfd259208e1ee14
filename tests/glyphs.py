"""Images of four kinds of glyphs, drawn in place of images that a user may have, in the files in
which these come."""

import gzip
import struct

import numpy as np

KINDS = 4  # a ring, a cross, a disc, two bars


def draw(count, seed, side=28):
    """Glyphs of random place, size and grey level: uint8 [count, side, side], and their kinds."""
    random = np.random.RandomState(seed)
    kinds = np.arange(count, dtype=np.uint8) % KINDS
    y, x = np.mgrid[:side, :side]
    images = []
    for kind in kinds:
        row, column = side / 2 + random.uniform(-0.1, 0.1, 2) * side
        size = side * random.uniform(0.25, 0.4)
        u, v = np.abs(x - column) / size, np.abs(y - row) / size
        radius = np.hypot(u, v)
        inside = [
            np.abs(radius - 0.8) < 0.2,
            (np.minimum(u, v) < 0.2) & (np.maximum(u, v) < 1),
            radius < 0.9,
            (np.abs(u - 0.6) < 0.25) & (v < 1),
        ][kind]
        images.append(inside * random.uniform(120, 255))
    return np.array(images).astype(np.uint8), kinds


def idx(array):
    """The bytes of an IDX file of this array, uint8 or int32."""
    code = 8 if array.dtype == np.uint8 else 12
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx(folder, train, test, train_labels=None, test_labels=None, ending=".gz"):
    """Writes the IDX files under MNIST's names, gzipped, or plain with the ending ""."""
    folder.mkdir(exist_ok=True)
    for name, array in (
        ("train-images-idx3-ubyte", train),
        ("t10k-images-idx3-ubyte", test),
        ("train-labels-idx1-ubyte", train_labels),
        ("t10k-labels-idx1-ubyte", test_labels),
    ):
        if array is not None:
            content = idx(array)
            content = gzip.compress(content) if ending else content
            (folder / f"{name}{ending}").write_bytes(content)
    return folder


def central_bits(stored):
    """The central 28×28 of images of 32×32 bits, as both are packed: uint8 [N, 128] -> [N, 98].
    Fails unless all bits around them are 0."""
    whole = np.unpackbits(stored).reshape(-1, 32, 32)
    centre = whole[:, 2:30, 2:30]
    assert centre.sum() == whole.sum()
    return np.packbits(centre.reshape(-1, 784), axis=1)


def damaged(path, places):
    """Writes a file with a bit flipped at a place, and cut off there, and yields each time; in the
    end it is as it was."""
    good, random = path.read_bytes(), np.random.RandomState(0)
    for at in places:
        for rest in bytes([good[at] ^ 1 << random.randint(8)]) + good[at:][1:], b"":
            path.write_bytes(good[:at] + rest)
            yield
    path.write_bytes(good)
