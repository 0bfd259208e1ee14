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
CHANGED = 32 / 255  # a colour that differs by more makes a pixel a changed one
STABILITY_STEPS = 500  # in the figure and in the study: many more than in training


# ---- PNG files -----------------------------------------------------------------------------------


def png(*frames):
    """Encodes images, uint8 [H, W, 1] (grey) or [H, W, 3], as the bytes of a PNG file.

    Several frames make an animated PNG (APNG) that repeats forever, ten frames a second. Format:
    the PNG specification, third edition (W3C 2025).
    """
    height, width, colours = frames[0].shape
    sequence_numbers = itertools.count()

    def contents():  # of each chunk its kind (four bytes) and its data; x packs a zero byte
        kind = 2 if colours == 3 else 0
        yield struct.pack(">4sIIBB3x", b"IHDR", width, height, 8, kind)  # 8 bits a colour
        if len(frames) > 1:
            yield struct.pack(">4sI4x", b"acTL", len(frames))
        for i, frame in enumerate(frames):
            if len(frames) > 1:  # the frame covers the whole picture, from (0, 0), for 100/1000 s
                number = next(sequence_numbers)
                yield struct.pack(">4sIII8xHH2x", b"fcTL", number, width, height, 100, 1000)
            kind = struct.pack(">4sI", b"fdAT", next(sequence_numbers)) if i else b"IDAT"
            # Each row begins with its filter type, 0: none.
            rows = np.insert(frame.reshape(height, -1), 0, 0, axis=1)
            yield kind + zlib.compress(rows.tobytes(), 9)
        yield b"IEND"

    file = b"\x89PNG\r\n\x1a\n"
    for content in contents():
        # The size of the data (without the kind), the kind with the data, and their checksum.
        file += struct.pack(f">I{len(content)}sI", len(content) - 4, content, zlib.crc32(content))
    return file


def sheet(rows, scale=4):
    """Arranges rows of square images [n, n, colours] in 0…1 as one image, uint8 [H, W, colours].

    Each pixel becomes scale×scale pixels. Images smaller than the largest are centred. The gaps
    between images are grey.
    """
    place = max(len(image) for row in rows for image in row) + GAP
    shape = len(rows), place, max(map(len, rows)), place, rows[0][0].shape[-1]
    places = np.full(shape, BACKGROUND, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            start = (place + GAP - len(image)) // 2
            end = start + len(image)
            places[i, start:end, j, start:end] = np.round(255 * image)
    page = places.reshape(len(rows) * place, -1, shape[-1])
    page = np.pad(page, [(0, GAP), (0, GAP), (0, 0)], constant_values=BACKGROUND)
    return page.repeat(scale, 0).repeat(scale, 1)


def animate(frames, columns):
    """The bytes of an animated PNG of frames, each of images [B, n, n, colours] in 0…1, arranged in
    rows of `columns`, where each image has at least 64×64 pixels."""
    return png(*(sheet(lines(x, columns), max(2, 64 // len(x[0]))) for x in frames))


def lines(images, columns):
    """Cuts images [B, …] into rows of at most `columns`."""
    return [images[i : i + columns] for i in range(0, len(images), columns)]


def shown(model, cells):
    """The picture that cells [..., C] show: NumPy [..., colours] in 0…1. Pixels
    that are not finite are black."""
    logits = cells[..., : model.likelihood.outputs]
    is_finite = np.isfinite(logits).all(axis=-1, keepdims=True)
    return np.where(is_finite, model.likelihood.picture(logits), 0)


def has_changed(likelihood, seen, expected):
    """Which pixels of pictures differ from expected ones, both [..., colours] in 0…1: bool [...].

    In black and white, they are on different sides of one half, where one half itself, the
    brightness of a lost cell, is black. With more levels, one of their colours differs by more than
    32 of 255. A pixel that is NaN has always changed.
    """
    if likelihood.levels == 1:
        differ = (seen > 0.5) != (expected > 0.5)
    else:
        differ = abs(seen - expected) > CHANGED
    return (differ | jnp.isnan(seen)).any(axis=-1)


def changed_in_words(likelihood, adjective):
    """What `has_changed` finds, for the axis of a plot: adjective is "wrong" or "changed"."""
    if likelihood.levels == 1:
        return f"{adjective} pixels"
    return f"{adjective} pixels (a colour differs by more than 32 of 255)"


def title(draw, model):
    """The title of what a function draws of a Model, with what its pictures show: means, say."""
    return draw.__doc__.format(shows=model.likelihood.shows)


def rows_of_eight(images):
    """Draws images [B, n, n, colours], eight in a row, as a PNG file."""
    return png(sheet(lines(images, 8)))


def pairs(images, reconstructions):
    """Draws each image above its reconstruction, as a PNG file."""
    rows = zip(lines(images, 8), lines(reconstructions, 8), strict=True)
    return png(sheet([*itertools.chain(*rows)]))


def rows_of_growth(rows):
    """Draws grids as a PNG file: one row for each array, such as each size of a growing grid.

    rows: a list of images [1 + steps, n, n, colours], the grid before the first step and after each
    one. Small grids are centred. A long row continues on a new line every 9 steps, and each line
    repeats the last grid of the line above.
    """
    parts = (row[i : i + 10] for row in rows for i in range(0, max(len(row) - 1, 1), 9))
    return png(sheet([*parts]))


# ---- Growth and damage, of models on a grid of fixed size ----------------------------------------


@partial(jax.jit, static_argnums=0)
def advance(model, params, cells, steps):
    """Cells [B, H, W, C] after `steps` more steps. Unlike `develop`, it has no limit on the steps
    and no gradient."""
    return lax.fori_loop(0, steps, lambda _, s: model.step(params, s), cells)


@partial(jax.jit, static_argnums=0)
def grow_images(model, params, images):
    """Encodes images [B, H, W, colours] and grows cells [B, H, W, C] from the means of q(z|x), for
    as many steps as the model's `decode` takes."""
    mean, _ = model.encode(params, images)
    return advance(model, params, model.initial_cells(mean), model.steps)


def lose_quadrant(cells, offset=0):
    """Sets one quadrant of each image's cells [B, H, W, C] to zero.

    Image i loses quadrant (i + offset) mod 4. Quadrants are counted from the top left, row by row.
    """
    quadrants = np.kron([[0, 1], [2, 3]], np.ones((cells.shape[1] // 2,) * 2))
    lost = (np.arange(len(cells)) + offset) % 4
    return jnp.where((quadrants == lost[:, None, None])[..., None], 0, cells)


# ---- What training draws -------------------------------------------------------------------------


def prior_samples(seed, count, latent_size):
    """Samples of z from N(0, I), float32 [count, latent]. All pictures use the same samples."""
    return normal(stream(seed, "prior"), jnp.arange(count), latent_size)


def decode_samples(model, params, seed):
    """The pictures of 32 samples from the prior: [32, H, W, colours]."""
    z = prior_samples(seed, 32, model.latent_size)
    return shown(model, jax.jit(model.decode)(params, z))


def decode_means(model, params, images):
    """The reconstructions of images [N, H, W, colours] from the means of q(z|x), as pictures."""
    mean, _ = jax.jit(model.encode)(params, images)
    return shown(model, jax.jit(model.decode)(params, mean))


# Each function below takes a model, its parameters, up to 32 test images [≤ 32, H, W, colours] and
# the seed of its noise, and returns the bytes of a PNG file. Its name is part of the file's name,
# and its docstring is the title, in which {shows} stands for what a picture shows (`title`).


def samples(model, params, images, seed):
    """Samples from the prior: the {shows} of each pixel."""
    return rows_of_eight(decode_samples(model, params, seed))


def reconstructions(model, params, images, seed):
    """Test images, each above the {shows} of p(x|z), with the mean of q(z|x) as z."""
    return pairs(images, decode_means(model, params, images))


def growth(model, params, images, seed):
    """Growth of one sample, the {shows} of each pixel. Each grid size has a row, which may wrap."""
    stages = jax.jit(model.grow)(params, prior_samples(seed, 1, model.latent_size))
    return rows_of_growth([shown(model, stage[:, 0]) for stage in stages])


def recovery(model, params, images, seed):
    """Grown images ({shows}s), without a quadrant of the cells, and 2, 4, 8, 16, 32 steps later."""
    cells = grow_images(model, params, images[:8])
    states = [cells, lose_quadrant(cells)]
    for steps in (2, 2, 4, 8, 16):
        states.append(advance(model, params, states[-1], steps))
    return rows_of_growth(np.stack([shown(model, cells) for cells in states], axis=1))


def training_pictures(model, params, images, seed):
    """The pictures that training draws as it runs: {name: bytes of a PNG file}.

    images: up to 16 of the test set, [≤ 16, H, W, colours].
    """
    draws = [samples, reconstructions]
    if model.grow:
        draws.append(growth)
    if model.step:
        draws.append(recovery)
    return {draw.__name__: draw(model, params, images, seed) for draw in draws}
