"""--mode=figures: every figure of some trained models, and the page to play with.

A new picture takes a function here and its name in `figures_of`. A new plot, for which matplotlib
is needed, takes a function and its name in PLOTS of plots.py.
"""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vnca.likelihoods import as_floats
from vnca.program import machine, store
from vnca.program.order import fixed_shuffle
from vnca.program.pictures import (
    STABILITY_STEPS,
    advance,
    animate,
    decode_means,
    decode_samples,
    grow_images,
    growth,
    lose_quadrant,
    png,
    prior_samples,
    reconstructions,
    recovery,
    rows_of_eight,
    samples,
    sheet,
    shown,
    title,
)
from vnca.program.stop import say
from vnca.report import play
from vnca.report.trained import class_labels, posterior_means, trained_models
from vnca.training import stream


def figures(run):
    """Writes the figures of the run's model and of the packaged models of other names into
    `workdir`/figures, and the page play.html.

    The figures are PNG files named MODEL_FIGURE.png, some of them animated. MODEL_arrays.npz has
    the samples and the reconstructions as arrays (`arrays`). The plots come last and need the
    packages of the extra `report`.
    """
    models = trained_models(run)
    folder = run.workdir / "figures"
    folder.mkdir(exist_ok=True)

    def write(name, content, title):
        if machine.is_first():
            store.write(folder / name, lambda file: file.write(content))
        say(f"{folder / name}  {title}")

    for name, trained in models.items():
        test = trained.data.test
        images = as_floats(trained.model.likelihood, test[fixed_shuffle(32, len(test))])
        subject = trained.model, trained.params, images, run.config.seed
        for draw in figures_of(trained.model):
            write(f"{name}_{draw.__name__}.png", draw(*subject), title(draw, trained.model))
        content = io.BytesIO()
        np.savez(content, **arrays(*subject))
        write(f"{name}_arrays.npz", content.getvalue(), "Samples and reconstructions, as arrays.")
    own = models[run.config.model.name]
    write("data_examples.png", data_examples(own), data_examples.__doc__)
    write(
        "play.html", play.page(models, run.plain).encode(), "An interactive page for any browser."
    )
    try:
        from vnca.report import plots  # imports matplotlib and scikit-learn
    except ImportError as fault:
        say(f"no plots: {fault.name} is missing: python -m pip install -e '.[report]' installs it")
        return
    for plot in plots.draw_all(models, run):
        write(*plot)


def arrays(model, params, images, seed):
    """What the pictures `samples` and `reconstructions` show: {name: NumPy [≤ 32, H, W, colours]},
    float32 in 0…1."""
    return {
        "samples": decode_samples(model, params, seed),
        "images": np.asarray(images),
        "reconstructions": decode_means(model, params, images),
    }


def data_examples(trained):
    """Ten test images of each class, and the mean of all test images of that class."""
    data, likelihood = trained.data, trained.model.likelihood
    labels = class_labels(data)
    classes = (
        np.asarray(as_floats(likelihood, data.test[labels == label]))
        for label in np.unique(labels)[:10]
    )
    return png(sheet([[*images[:10], images.mean(axis=0)] for images in classes], 2))


# Each function below that `figures_of` names takes a model, its parameters, up to 32 test images,
# [≤ 32, H, W, colours], and the seed of its noise. It returns the bytes of a PNG file. Its name is
# part of the file's name, and its docstring is the title, in which {shows} stands for what a
# picture shows (`title`). Those that training draws, too, are in vnca/program/pictures.py.


def growth_animated(model, params, images, seed):
    """Growth of sixteen samples, the {shows} of each pixel. Small grids are enlarged."""
    stages = jax.jit(model.grow)(params, prior_samples(seed, 16, model.latent_size))
    images = [shown(model, cells) for stage in stages for cells in stage]
    size = len(images[-1][0])
    frames = [x.repeat(size // len(x[0]), 1).repeat(size // len(x[0]), 2) for x in images]
    return animate(frames + frames[-1:] * 10, 8)


def interpolation(model, params, images, seed):
    """Linear interpolations between samples of z, eight steps a row: the {shows} of each pixel."""
    return png(sheet(interpolate(model, params, seed, 8)))


def interpolation_animated(model, params, images, seed):
    """Linear interpolations from each sample of z to the next: the {shows} of each pixel."""
    return animate(interpolate(model, params, seed, 12).swapaxes(0, 1), 4)


def interpolate(model, params, seed, steps):
    """Pictures [8, steps, H, W, colours] on the lines from each of eight prior samples to the
    next."""
    z = prior_samples(seed, 8, model.latent_size)[:, None]
    weights = jnp.linspace(0, 1, steps)[:, None]
    lines = z + weights * (jnp.roll(z, -1, 0) - z)
    return shown(model, jax.lax.map(partial(model.decode, params), lines))


def recovery_animated(model, params, images, seed):
    """Grown images ({shows}s) lose a quadrant of their cells, regrow, and lose another one."""
    cells, frames = grow_images(model, params, images[:16]), []
    for offset in range(2):
        frames += [cells] * 6
        cells = lose_quadrant(cells, offset)
        frames += [cells] * 4
        for _ in range(32):
            cells = advance(model, params, cells, 1)
            frames.append(cells)
    return animate((shown(model, cells) for cells in frames), 8)


def stability(model, params, images, seed):
    """Grown images ({shows}s), and after 50, 100, 200, 350, 500 steps. Not finite is black."""
    cells = model.initial_cells(posterior_means(model, params, images[:8]))
    times = model.steps, 50, 100, 200, 350, STABILITY_STEPS
    columns = [shown(model, advance(model, params, cells, steps)) for steps in times]
    return png(sheet(np.stack(columns, axis=1)))


def channels(model, params, images, seed):
    """The first sixteen channels of four grown grids, each scaled to its own range."""
    means = posterior_means(model, params, images[:4])
    cells = jax.jit(model.grow, static_argnums=2)(params, means, 16)[-1][-1]
    low, high = (f(cells, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    scaled = (cells - low) / np.maximum(high - low, 1e-6)
    return png(sheet(np.moveaxis(scaled, -1, 1)[..., None]))


def sampled_pixels(model, params, images, seed):
    """Samples from the prior, and in each a sample of every pixel: not the {shows}, but p(x|z)."""
    z = prior_samples(seed, 32, model.latent_size)
    logits = jax.jit(model.decode)(params, z)
    key = stream(seed, "pixels")
    return rows_of_eight(np.clip(model.likelihood.sample(key, logits), 0, 1))


def figures_of(model):
    """The pictures that a Model can show."""
    more = [sampled_pixels] if model.likelihood.levels > 1 else []
    if model.step:
        return [
            samples,
            reconstructions,
            growth,
            recovery,
            recovery_animated,
            stability,
            channels,
            *more,
        ]
    if model.grow:
        return [
            samples,
            reconstructions,
            growth,
            growth_animated,
            interpolation,
            interpolation_animated,
            channels,
            *more,
        ]
    return [samples, reconstructions, interpolation, *more]
