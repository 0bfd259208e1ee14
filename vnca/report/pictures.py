"""Pictures of what a model does, as PNG, written with the standard library and NumPy alone."""

import itertools
import struct
import zlib

import jax.numpy as jnp
import numpy as np

from vnca.noise import normal, stream


def png(*frames, milliseconds=100):
    """Grey images, uint8 [H, W], as the bytes of a PNG file, which is animated (APNG) where there
    are several: each is shown for so many milliseconds, again and again."""
    (height, width), number = frames[0].shape, itertools.count()

    def chunk(kind, *content):
        content = b"".join(content)
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    def compressed(pixels):
        rows = np.pad(pixels, ((0, 0), (1, 0)))  # each row opens with its filter, 0: none
        return zlib.compress(rows.tobytes(), 9)

    def control():
        """What an animation needs beside each frame, whole and at the page's corner."""
        place = struct.pack(">IIIII", next(number), width, height, 0, 0)
        return chunk(b"fcTL", place, struct.pack(">HHBB", milliseconds, 1000, 0, 0))

    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))]  # 8 bits, grey
    if len(frames) > 1:
        chunks += [chunk(b"acTL", struct.pack(">II", len(frames), 0)), control()]
    chunks.append(chunk(b"IDAT", compressed(frames[0])))
    for frame in frames[1:]:
        chunks += [control(), chunk(b"fdAT", struct.pack(">I", next(number)), compressed(frame))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND")


def prior_samples(seed, count, latent_size):
    """Samples of z from N(0, I), float32 [count, latent], the same in every picture."""
    return normal(stream(seed, "prior"), jnp.arange(count), latent_size)


def probabilities(logits):
    """Logits [B, H, W, 1] as the probability of a lit pixel, [B, H, W] in 0…1."""
    return 1 / (1 + np.exp(-np.clip(np.asarray(logits[..., 0], np.float32), -30, 30)))


def sheet(rows, scale=4, gap=2):
    """Rows of square images [n, n] in 0…1 as one grey image, uint8, every pixel scale×scale.

    Images smaller than the largest are centred, on the grey of the paper between them.
    """
    size = max(image.shape[0] for row in rows for image in row)
    cell = size + gap
    page = np.full((len(rows) * cell + gap, max(map(len, rows)) * cell + gap), 96, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            n = image.shape[0]
            top, left = (gap + k * cell + (size - n) // 2 for k in (i, j))
            page[top : top + n, left : left + n] = np.round(255 * np.asarray(image))
    return page.repeat(scale, 0).repeat(scale, 1)


def rows_of_eight(logits):
    """Logits [B, H, W, 1] -> PNG of their probabilities, eight in a row."""
    images = probabilities(logits)
    return png(sheet([images[i : i + 8] for i in range(0, len(images), 8)]))


def pairs(images, logits):
    """Originals above what the model makes of them: images, logits [B, H, W, 1] -> PNG."""
    originals, made = np.asarray(images[..., 0]), probabilities(logits)
    rows = [
        half for i in range(0, len(made), 8) for half in (originals[i : i + 8], made[i : i + 8])
    ]
    return png(sheet(rows))


def rows_of_growth(rows):
    """How a digit grows: a row for each doubling, the grid after it and after each NCA step.

    rows: lists of logits [1 + steps, n, n, 1] -> PNG. Smaller grids are centred, a long row is
    broken after each 9 steps.
    """
    return png(sheet([list(probabilities(r[i : i + 10])) for r in rows for i in _starts(len(r))]))


def _starts(length):
    """Where lines of 10 begin in a row, each opening with the last of the line above."""
    return range(0, max(length - 1, 1), 9)
