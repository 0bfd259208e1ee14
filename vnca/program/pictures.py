"""Pictures of a trained model as PNG files, written with the standard library and NumPy alone."""

import itertools
import struct
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vnca.training import normal, stream

BACKGROUND = 96  # the grey level of the gaps between images
GAP = 2  # their width, in pixels of an image


# ---- PNG files -----------------------------------------------------------------------------------


def png(*frames):
    """Encodes grey images, uint8 [H, W], as the bytes of a PNG file.

    Several frames make an animated PNG (APNG) that repeats forever, ten frames a second. Format:
    the PNG specification, third edition (W3C 2025).
    """
    height, width = frames[0].shape
    sequence_numbers = itertools.count()

    def contents():  # of each chunk its kind (four bytes) and its data; x packs a zero byte
        yield struct.pack(">4sIIB4x", b"IHDR", width, height, 8)  # 8 bits, grey
        if len(frames) > 1:
            yield struct.pack(">4sI4x", b"acTL", len(frames))
        for i, frame in enumerate(frames):
            if len(frames) > 1:  # the frame covers the whole picture, from (0, 0), for 100/1000 s
                number = next(sequence_numbers)
                yield struct.pack(">4sIII8xHH2x", b"fcTL", number, width, height, 100, 1000)
            kind = struct.pack(">4sI", b"fdAT", next(sequence_numbers)) if i else b"IDAT"
            rows = np.insert(frame, 0, 0, axis=1)  # each row begins with its filter type, 0: none
            yield kind + zlib.compress(rows.tobytes(), 9)
        yield b"IEND"

    file = b"\x89PNG\r\n\x1a\n"
    for content in contents():
        # The size of the data (without the kind), the kind with the data, and their checksum.
        file += struct.pack(f">I{len(content)}sI", len(content) - 4, content, zlib.crc32(content))
    return file


def sheet(rows, scale=4):
    """Arranges rows of square images [n, n] in 0…1 as one grey image, uint8 [H, W].

    Each pixel becomes scale×scale pixels. Images smaller than the largest are centred. The gaps
    between images are grey.
    """
    place = max(len(image) for row in rows for image in row) + GAP
    places = np.full((len(rows), place, max(map(len, rows)), place), BACKGROUND, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            start = (place + GAP - len(image)) // 2
            end = start + len(image)
            places[i, start:end, j, start:end] = np.round(255 * image)
    page = np.pad(places.reshape(len(rows) * place, -1), (0, GAP), constant_values=BACKGROUND)
    return page.repeat(scale, 0).repeat(scale, 1)


def animate(frames, columns):
    """The bytes of an animated PNG of frames, each of images [B, 32, 32] in 0…1, arranged in rows
    of `columns`."""
    return png(*(sheet(lines(frame, columns), 2) for frame in frames))


def lines(images, columns):
    """Cuts images [B, …] into rows of at most `columns`."""
    return [images[i : i + columns] for i in range(0, len(images), columns)]


def probabilities(logits):
    """Converts logits [B, H, W, 1] to the probability that each pixel is 1: [B, H, W] in 0…1."""
    return 1 / (1 + np.exp(-np.clip(np.asarray(logits[..., 0], np.float32), -30, 30)))


def rows_of_eight(logits):
    """Draws the probabilities of logits [B, H, W, 1], eight images in a row, as a PNG file."""
    return png(sheet(lines(probabilities(logits), 8)))


def pairs(images, logits):
    """Draws each image [B, H, W, 1] above the reconstruction given by logits of the same shape, as
    a PNG file."""
    rows = zip(lines(images[..., 0], 8), lines(probabilities(logits), 8), strict=True)
    return png(sheet([*itertools.chain(*rows)]))


def rows_of_growth(rows):
    """Draws grids as a PNG file: one row for each array, such as each size of a growing grid.

    rows: a list of logits [1 + steps, n, n, 1], the grid before the first step and after each one.
    Small grids are centred. A long row continues on a new line every 9 steps, and each line repeats
    the last grid of the line above.
    """
    parts = (row[i : i + 10] for row in rows for i in range(0, max(len(row) - 1, 1), 9))
    return png(sheet([*map(probabilities, parts)]))


# ---- Growth and damage, of models on a grid of fixed size ----------------------------------------


@partial(jax.jit, static_argnums=0)
def advance(model, params, cells, count):
    """Cells [B, 32, 32, C] after `count` more steps. Unlike `develop`, it has no limit on the steps
    and no gradient."""
    return lax.fori_loop(0, count, lambda _, s: model.step(params, s), cells)


@partial(jax.jit, static_argnums=0)
def grow_images(model, params, images):
    """Encodes images [B, 32, 32, 1] and grows cells [B, 32, 32, C] from the means of q(z|x), for as
    many steps as the model's `decode` takes."""
    mean, _ = model.encode(params, images)
    return advance(model, params, model.initial_cells(mean), model.steps)


def lose_quadrant(cells, offset=0):
    """Sets one 16×16 quadrant of each image's cells [B, 32, 32, C] to zero.

    Image i loses quadrant (i + offset) mod 4. Quadrants are counted from the top left, row by row.
    """
    quadrants = np.kron([[0, 1], [2, 3]], np.ones((16, 16)))
    lost = (np.arange(len(cells)) + offset) % 4
    return jnp.where((quadrants == lost[:, None, None])[..., None], 0, cells)


# ---- What training draws -------------------------------------------------------------------------


def prior_samples(seed, count, latent_size):
    """Samples of z from N(0, I), float32 [count, latent]. All pictures use the same samples."""
    return normal(stream(seed, "prior"), jnp.arange(count), latent_size)


def decode_samples(model, params, seed):
    """The logits of 32 samples from the prior: [32, 32, 32, 1]."""
    return jax.jit(model.decode)(params, prior_samples(seed, 32, model.latent_size))


def decode_means(model, params, images):
    """The logits of images [N, 32, 32, 1], from the means of q(z|x): [N, 32, 32, 1]."""
    mean, _ = jax.jit(model.encode)(params, images)
    return jax.jit(model.decode)(params, mean)


# Each function below takes a model, its parameters, up to 32 test images [≤ 32, 32, 32, 1] and the
# seed of its noise, and returns the bytes of a PNG file. Its name is part of the file's name, and
# its docstring is the title.


def samples(model, params, images, seed):
    """Samples from the prior: the probability of each pixel."""
    return rows_of_eight(decode_samples(model, params, seed))


def reconstructions(model, params, images, seed):
    """Test images, each above its reconstruction from the mean of q(z|x)."""
    return pairs(images, decode_means(model, params, images))


def growth(model, params, images, seed):
    """Growth of one sample, step by step. Each grid size starts a row; a long row is wrapped."""
    stages = jax.jit(model.grow)(params, prior_samples(seed, 1, model.latent_size))
    return rows_of_growth([stage[:, 0] for stage in stages])


def recovery(model, params, images, seed):
    """Grown images, without a quadrant of their cells, and after 2, 4, 8, 16 and 32 steps."""
    cells = grow_images(model, params, images[:8])
    states = [cells, lose_quadrant(cells)]
    for steps in (2, 2, 4, 8, 16):
        states.append(advance(model, params, states[-1], steps))
    return rows_of_growth(jnp.stack([cells[..., :1] for cells in states], axis=1))


def training_pictures(model, params, images, seed):
    """The pictures that training draws as it runs: {name: bytes of a PNG file}.

    images: up to 16 of the test set, [≤ 16, 32, 32, 1].
    """
    can = {samples: True, reconstructions: True, growth: model.grow, recovery: model.develop}
    return {draw.__name__: draw(model, params, images, seed) for draw in can if can[draw]}
