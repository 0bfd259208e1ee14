"""The figures of the study: of a run's newest checkpoint, and of the packaged models."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vnca.images import unpack
from vnca.program import files
from vnca.program.hosts import agree, is_first
from vnca.program.method import make_method
from vnca.program.order import fixed_shuffle
from vnca.report import pictures, play, plots
from vnca.report.packaged import KINDS, codes, trained_models
from vnca.report.pictures import png, prior_samples, probabilities, sheet
from vnca.report.regrowth import after_steps, damaged, grown, regrowth
from vnca.report.study import STABILITY_STEPS


def figures(config, workdir, log, make_method=make_method):
    """Writes every figure of all three models into `workdir`/figures, as PNG, the moving ones
    animated: KIND_NAME.png; and play.html, a page to play with. The plots come last, and need the
    packages of the extra `report`.

    Of the workdir's newest checkpoint, with digits of its test set; of the packaged models for
    other kinds. Raises VncaError where the checkpoint is of another config.
    """
    workdir = Path(workdir)
    shown = trained_models(config, workdir, log, make_method)
    folder = workdir / "figures"
    agree(lambda: files.make_folder(folder))

    def write(name, content, title, suffix="png"):
        file = folder / f"{name}.{suffix}"
        if is_first():
            files.write(file, lambda file: file.write(content))
        log(f"{file}  {title}")

    for kind, trained in shown.items():
        data = trained.data
        images = unpack(data.test[fixed_shuffle(32, len(data.test))])
        for draw, kinds in FIGURES:
            if kind in kinds:
                content = draw(trained.model, trained.params, images, config.seed)
                write(f"{kind}_{draw.__name__}", content, draw.__doc__)
    write("play", play.page(shown).encode(), "A page to play with, for any browser.", "html")
    plots.draw_all(shown, workdir, write, log)


def of_training(model, params, images, seed):
    """The pictures that training draws as it goes: {name: bytes of a PNG}. images: 16 of the test
    set, [16, 32, 32, 1]."""
    draw = [samples, reconstructions]
    draw += [growth] if model.grow else []
    draw += [recovery] if model.develop else []
    return {picture.__name__: picture(model, params, images, seed) for picture in draw}


# Each takes a model, its parameters, 32 test images [32, 32, 32, 1] and the seed of its noise, and
# gives the bytes of a PNG file.


def samples(model, params, images, seed):
    """Samples from the prior: the probability of each pixel."""
    return pictures.rows_of_eight(
        jax.jit(model.decode)(params, prior_samples(seed, 32, model.latent_size))
    )


def reconstructions(model, params, images, seed):
    """Test digits, and below each what the model makes of the mean of its code."""
    return pictures.pairs(images, jax.jit(model.decode)(params, codes(model, params, images)))


def growth(model, params, images, seed):
    """How one sample grows: the grid, and after each step; a row for each size of it."""
    stages = jax.jit(model.grow)(params, prior_samples(seed, 1, model.latent_size))
    return pictures.rows_of_growth([stage[:, 0] for stage in stages])


def growth_animated(model, params, images, seed):
    """How sixteen samples grow; the cells of a small grid are drawn larger."""
    stages = jax.jit(model.grow)(params, prior_samples(seed, 16, model.latent_size))
    size = stages[-1].shape[2]
    frames = [
        image.repeat(size // image.shape[-1], 1).repeat(size // image.shape[-1], 2)
        for stage in stages
        for image in map(probabilities, stage)
    ]
    return animation([*frames, *[frames[-1]] * 10], 8)


def interpolation(model, params, images, seed):
    """Straight lines between samples from the prior, in eight steps, one a row."""
    return png(sheet(list(between(model, params, seed, 8))))


def interpolation_animated(model, params, images, seed):
    """Straight lines from sample to sample, and back to the first."""
    ways = between(model, params, seed, 12)
    return animation(list(ways.swapaxes(0, 1)), 4)


def between(model, params, seed, steps):
    """Probabilities [8, steps, 32, 32] on the lines from each of eight samples to the next."""
    z, way = prior_samples(seed, 8, model.latent_size), jnp.linspace(0, 1, steps)[:, None]
    lines = jnp.stack([a + way * (b - a) for a, b in zip(z, jnp.roll(z, -1, 0), strict=True)])
    logits = jax.lax.map(partial(model.decode, params), lines)
    return probabilities(logits.reshape(-1, *logits.shape[2:])).reshape(8, steps, 32, 32)


def recovery(model, params, images, seed):
    """Grown digits; a quadrant of their cells lost; and after 2, 4, 8, 16 and 32 steps more."""
    states = regrowth(model, params, grown(model, params, images[:8]))
    return pictures.rows_of_growth(jnp.stack([cells[..., :1] for cells in states], axis=1))


def recovery_animated(model, params, images, seed):
    """Grown digits that lose a quadrant of their cells, regrow, and lose another."""
    cells, frames = grown(model, params, images[:16]), []
    for turn in range(2):
        frames += [probabilities(cells)] * 6
        cells = damaged(cells, turn)
        frames += [probabilities(cells)] * 4
        for _ in range(32):
            cells = after_steps(model, params, cells, 1)
            frames.append(probabilities(cells))
    return animation(frames, 8)


def stability(model, params, images, seed):
    """Grown digits; after 50, 100, 200, 350, 500 steps; cells no longer finite are drawn black."""
    columns, done = [grown(model, params, images[:8])], model.steps
    for steps in (50, 100, 200, 350, STABILITY_STEPS):
        columns.append(after_steps(model, params, columns[-1], max(steps - done, 0)))
        done = max(steps, done)
    page = np.stack([probabilities(c) for c in columns], axis=1)
    return png(sheet(list(np.nan_to_num(page, nan=0.0))))


def channels(model, params, images, seed):
    """The first sixteen channels of four grown grids, each between its least and its largest."""
    cells = jax.jit(model.grow, static_argnums=2)(params, codes(model, params, images[:4]), 16)
    cells = np.moveaxis(np.asarray(cells[-1][-1]), -1, 1)
    least, most = (f(cells, axis=(2, 3), keepdims=True) for f in (np.min, np.max))
    return png(sheet(list((cells - least) / np.maximum(most - least, 1e-6))))


FIGURES = [
    (samples, KINDS),
    (reconstructions, KINDS),
    (growth, ("doubling", "nondoubling")),
    (growth_animated, ("doubling",)),
    (interpolation, ("doubling", "baseline")),
    (interpolation_animated, ("doubling",)),
    (recovery, ("nondoubling",)),
    (recovery_animated, ("nondoubling",)),
    (stability, ("nondoubling",)),
    (channels, ("doubling", "nondoubling")),
]


def animation(frames, columns):
    """Frames of images [B, 32, 32] as an animated PNG, the images in rows of so many."""
    pages = [sheet([f[i : i + columns] for i in range(0, len(f), columns)], 2) for f in frames]
    return png(*pages, milliseconds=100)
