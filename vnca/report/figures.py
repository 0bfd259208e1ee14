"""The figures of the study, drawn from a run's newest checkpoint and the packaged models."""

import io
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
from vnca.report.packaged import KINDS, posterior_means, trained_models
from vnca.report.pictures import png, prior_samples, probabilities, sheet
from vnca.report.regrowth import advance, damage_and_regrow, grow_images, lose_quadrant
from vnca.report.study import STABILITY_STEPS


def figures(config, workdir, log, make_method=make_method, which=None):
    """Writes every figure of all three models into `workdir`/figures, and the interactive page
    play.html.

    The figures are PNG files named KIND_NAME.png, some of them animated. They show the models that
    `packaged.trained_models` returns; which: the checkpoint, if not the newest. KIND_arrays.npz has
    the samples and the reconstructions as arrays (`arrays`). The plots come last and need the
    packages of the extra `report`. Raises VncaError if the checkpoint in `workdir` belongs to
    another config.
    """
    workdir = Path(workdir)
    models = trained_models(config, workdir, log, make_method, which)
    folder = workdir / "figures"
    agree(lambda: files.make_folder(folder))

    def write(name, content, title, suffix="png"):
        path = folder / f"{name}.{suffix}"
        if is_first():
            files.write_bytes(path, content)
        log(f"{path}  {title}")

    for kind, trained in models.items():
        data = trained.data
        images = unpack(data.test[fixed_shuffle(32, len(data.test))])
        for draw, kinds in FIGURES:
            if kind in kinds:
                content = draw(trained.model, trained.params, images, config.seed)
                write(f"{kind}_{draw.__name__}", content, draw.__doc__)
        content = io.BytesIO()
        np.savez(content, **arrays(trained.model, trained.params, images, config.seed))
        write(
            f"{kind}_arrays", content.getvalue(), "Samples and reconstructions, as arrays.", "npz"
        )
    write("play", play.page(models).encode(), "An interactive page for any browser.", "html")
    plots.draw_all(models, workdir, write, log)


def training_pictures(model, params, images, seed):
    """The pictures that training draws as it runs: {name: bytes of a PNG file}.

    images: up to 16 of the test set, [≤ 16, 32, 32, 1].
    """
    draw = [samples, reconstructions]
    draw += [growth] if model.grow else []
    draw += [recovery] if model.develop else []
    return {picture.__name__: picture(model, params, images, seed) for picture in draw}


# Each function below takes a model, its parameters, up to 32 test images [≤ 32, 32, 32, 1] and the
# seed of its noise, and returns the bytes of a PNG file. Its name is part of the file's name, and
# its docstring is the title.


def samples(model, params, images, seed):
    """Samples from the prior: the probability of each pixel."""
    return pictures.rows_of_eight(decode_samples(model, params, seed))


def reconstructions(model, params, images, seed):
    """Test images, each above its reconstruction from the mean of q(z|x)."""
    return pictures.pairs(images, decode_means(model, params, images))


def arrays(model, params, images, seed):
    """What the pictures `samples` and `reconstructions` show: {name: NumPy [≤ 32, 32, 32]}.

    samples, reconstructions: float32, the probability of each pixel; images: uint8, 0 and 1.
    """
    return {
        "samples": probabilities(decode_samples(model, params, seed)),
        "images": np.asarray(images[..., 0], np.uint8),
        "reconstructions": probabilities(decode_means(model, params, images)),
    }


def decode_samples(model, params, seed):
    """The logits of 32 samples from the prior: [32, 32, 32, 1]."""
    return jax.jit(model.decode)(params, prior_samples(seed, 32, model.latent_size))


def decode_means(model, params, images):
    """The logits of images [N, 32, 32, 1], from the means of q(z|x): [N, 32, 32, 1]."""
    return jax.jit(model.decode)(params, posterior_means(model, params, images))


def growth(model, params, images, seed):
    """Growth of one sample, step by step. Each grid size starts a row; a long row is wrapped."""
    stages = jax.jit(model.grow)(params, prior_samples(seed, 1, model.latent_size))
    return pictures.rows_of_growth([stage[:, 0] for stage in stages])


def growth_animated(model, params, images, seed):
    """Growth of sixteen samples. Small grids are enlarged."""
    stages = jax.jit(model.grow)(params, prior_samples(seed, 16, model.latent_size))
    size = stages[-1].shape[2]
    frames = [
        image.repeat(size // image.shape[-1], 1).repeat(size // image.shape[-1], 2)
        for stage in stages
        for image in map(probabilities, stage)
    ]
    return animate([*frames, *[frames[-1]] * 10], 8)


def interpolation(model, params, images, seed):
    """Linear interpolations between samples from the prior, eight steps in each row."""
    return png(sheet(list(interpolate(model, params, seed, 8))))


def interpolation_animated(model, params, images, seed):
    """Linear interpolations from each sample to the next, and from the last to the first."""
    lines = interpolate(model, params, seed, 12)
    return animate(list(lines.swapaxes(0, 1)), 4)


def interpolate(model, params, seed, steps):
    """Probabilities [8, steps, 32, 32] on the lines from each of eight prior samples to the
    next."""
    z = prior_samples(seed, 8, model.latent_size)
    weights = jnp.linspace(0, 1, steps)[:, None]
    lines = jnp.stack([a + weights * (b - a) for a, b in zip(z, jnp.roll(z, -1, 0), strict=True)])
    logits = jax.lax.map(partial(model.decode, params), lines)
    return probabilities(logits.reshape(-1, *logits.shape[2:])).reshape(8, steps, 32, 32)


def recovery(model, params, images, seed):
    """Grown images, without a quadrant of their cells, and after 2, 4, 8, 16 and 32 steps."""
    states = damage_and_regrow(model, params, grow_images(model, params, images[:8]))
    return pictures.rows_of_growth(jnp.stack([cells[..., :1] for cells in states], axis=1))


def recovery_animated(model, params, images, seed):
    """Grown images lose a quadrant of their cells, regrow, and lose another one."""
    cells, frames = grow_images(model, params, images[:16]), []
    for offset in range(2):
        frames += [probabilities(cells)] * 6
        cells = lose_quadrant(cells, offset)
        frames += [probabilities(cells)] * 4
        for _ in range(32):
            cells = advance(model, params, cells, 1)
            frames.append(probabilities(cells))
    return animate(frames, 8)


def stability(model, params, images, seed):
    """Grown images, and after 50, 100, 200, 350 and 500 steps. Non-finite cells are black."""
    columns = [grow_images(model, params, images[:8])]
    steps_done = model.steps
    for steps in (50, 100, 200, 350, STABILITY_STEPS):
        if steps > steps_done:
            columns.append(advance(model, params, columns[-1], steps - steps_done))
            steps_done = steps
    finite = [np.where(np.isfinite(cells[..., :1]), cells[..., :1], -np.inf) for cells in columns]
    return png(sheet(list(np.stack([probabilities(cells) for cells in finite], axis=1))))


def channels(model, params, images, seed):
    """The first sixteen channels of four grown grids, each scaled to its own range."""
    means = posterior_means(model, params, images[:4])
    cells = jax.jit(model.grow, static_argnums=2)(params, means, 16)
    cells = np.moveaxis(np.asarray(cells[-1][-1]), -1, 1)
    low = cells.min(axis=(2, 3), keepdims=True)
    high = cells.max(axis=(2, 3), keepdims=True)
    return png(sheet(list((cells - low) / np.maximum(high - low, 1e-6))))


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


def animate(frames, columns):
    """An animated PNG of frames of images [B, 32, 32], arranged in rows of `columns` images."""
    pages = [sheet([f[i : i + columns] for i in range(0, len(f), columns)], 2) for f in frames]
    return png(*pages)
