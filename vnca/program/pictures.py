"""Pictures of a model's results as PNG files, written with the standard library and NumPy alone."""

import itertools
import struct
import zlib

import jax.numpy as jnp
import numpy as np

from vnca.noise import normal, stream

BACKGROUND = 96  # the grey level of the gaps between images


def png(*frames):
    """Encodes grey images, uint8 [H, W], as the bytes of a PNG file.

    Several frames make an animated PNG (APNG) that repeats forever, ten frames a second.
    """
    height, width = frames[0].shape
    sequence_numbers = itertools.count()

    def chunk(kind, *content):
        content = b"".join(content)
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    def compress(pixels):
        rows = np.pad(pixels, ((0, 0), (1, 0)))  # each row begins with its filter type, 0: none
        return zlib.compress(rows.tobytes(), 9)

    def frame_control():
        """The control chunk that precedes each frame of an animation. Frames cover the whole
        image, so their offset is (0, 0)."""
        region = struct.pack(">IIIII", next(sequence_numbers), width, height, 0, 0)
        return chunk(b"fcTL", region, struct.pack(">HHBB", 100, 1000, 0, 0))

    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))]  # 8 bits, grey
    if len(frames) > 1:
        chunks += [chunk(b"acTL", struct.pack(">II", len(frames), 0)), frame_control()]
    chunks.append(chunk(b"IDAT", compress(frames[0])))
    for frame in frames[1:]:
        chunks.append(frame_control())
        number = struct.pack(">I", next(sequence_numbers))
        chunks.append(chunk(b"fdAT", number, compress(frame)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND")


def prior_samples(seed, count, latent_size):
    """Samples of z from N(0, I), float32 [count, latent]. All pictures use the same samples."""
    return normal(stream(seed, "prior"), jnp.arange(count), latent_size)


def probabilities(logits):
    """Converts logits [B, H, W, 1] to the probability that each pixel is 1: [B, H, W] in 0…1."""
    return 1 / (1 + np.exp(-np.clip(np.asarray(logits[..., 0], np.float32), -30, 30)))


def sheet(rows, scale=4, gap=2):
    """Arranges rows of square images [n, n] in 0…1 as one grey image, uint8 [H, W].

    Each pixel becomes scale×scale pixels. Images smaller than the largest are centred. The gaps
    between images are grey.
    """
    size = max(image.shape[0] for row in rows for image in row)
    pitch = size + gap
    height = len(rows) * pitch + gap
    width = max(map(len, rows)) * pitch + gap
    page = np.full((height, width), BACKGROUND, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            n = image.shape[0]
            top, left = (gap + k * pitch + (size - n) // 2 for k in (i, j))
            page[top : top + n, left : left + n] = np.round(255 * np.asarray(image))
    return page.repeat(scale, 0).repeat(scale, 1)


def rows_of_eight(logits):
    """Draws the probabilities of logits [B, H, W, 1], eight images in a row, as a PNG file."""
    images = probabilities(logits)
    return png(sheet([images[i : i + 8] for i in range(0, len(images), 8)]))


def pairs(images, logits):
    """Draws each image [B, H, W, 1] above the reconstruction given by logits of the same shape, as
    a PNG file."""
    originals = np.asarray(images[..., 0])
    reconstructions = probabilities(logits)
    rows = []
    for i in range(0, len(originals), 8):
        rows += [originals[i : i + 8], reconstructions[i : i + 8]]
    return png(sheet(rows))


def rows_of_growth(rows):
    """Draws grids as a PNG file: one row for each array, such as each size of a growing grid.

    rows: a list of logits [1 + steps, n, n, 1], the grid before the first step and after each one.
    Small grids are centred. A long row continues on a new line every 9 steps.
    """
    return png(sheet([list(probabilities(r[i : i + 10])) for r in rows for i in _starts(len(r))]))


def _starts(length):
    """Where the lines of 10 grids start in a row. Each line repeats the last grid of the line
    above."""
    return range(0, max(length - 1, 1), 9)
