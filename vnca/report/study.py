"""--mode=study: recovery, healing, stability, and the IWELBO by samples and class.

Of images with more levels than two, also how near reconstructions are.

The first three are measured on models that take single steps. For recovery, a grown test image
loses a square of cells and is compared with the test image. For healing, a sample from the prior
loses two squares, one after the other, and is compared with itself before. plots.py draws all but
healing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vnca.likelihoods import as_floats
from vnca.losses import log_importance_weight
from vnca.pool import damage_mask
from vnca.program import VncaError, progress, stop
from vnca.program.evaluate import standard_error
from vnca.program.learner import is_plain, method_sha256
from vnca.program.metrics import in_bits
from vnca.program.order import fixed_shuffle, images_to_evaluate
from vnca.program.pictures import STABILITY_STEPS, advance, grow_images, has_changed
from vnca.report.trained import fingerprints, trained_models
from vnca.training import draw_each, normal, stream

IMAGES = 1000  # if eval.images is not set
# Recovery: the sides of the lost squares, in eighths of the grid's (0: no damage), and the steps
# after the damage.
SQUARE_EIGHTHS = range(6)
RECOVERY_STEPS = 64
# Healing: samples for each seed, and the steps after each of the two losses of a square, whose side
# is half of the grid's, as in the reproduction's animation.
HEALING_SEEDS = range(5)
PRIOR_SAMPLES = 80
HEALING_STEPS = 38, 68
CURVES = "recovery", "stability"  # too long to be printed


def study(run):
    """Measures the models that `figures` shows, on their own test images, and writes study.json.

    The images are the first eval.images of the fixed shuffle: if that is not set, 1,000, or all of
    a smaller test set. Each has eval.samples samples. The study runs on one device. A stopped study
    raises Stopped, and resumes where it was. Raises VncaError if eval.images is above the size of a
    test set, or if there are several processes.
    """
    if jax.process_count() > 1:
        raise VncaError("--mode=study runs in one process only: run it on one host")
    config, models = run.config, trained_models(run)
    available = min(len(m.data.test) for m in models.values())
    count = images_to_evaluate(config, available, IMAGES)
    settings = {
        "models": fingerprints(models),
        "samples": config.eval.samples,
        "seed": config.seed,
        "precision": config.eval.precision,
        "plain": {name: is_plain(m.model, m.config) for name, m in models.items()},
        "steps": {name: m.model.steps for name, m in models.items() if m.model.step},
    }
    result = settings | {"images": count}
    settings["method"] = method_sha256()
    file = run.workdir / "study.json"
    rows = progress.load(file, settings)  # {name of a measurement: [images, …]}
    with stop.saving(), jax.default_matmul_precision(config.eval.precision):
        for name, model, measure, indices, seed, summarize in measurements(config, models, count):
            left = indices[len(rows.get(name, ())) :]
            parts = measure_in_chunks(measure, models[model], left, seed)
            rows = progress.collect(
                file, settings, rows, name, parts, len(indices), lambda _, name=name: name
            )
            summary = summarize(rows[name][: len(indices)])
            *sections, last = name.split()
            place = result
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = summary
            if sections[0] not in CURVES:
                stop.say(f"{name}: {summary}")
        progress.write(file, result, indent=None)
        stop.say(f"written to {file}")


def measurements(config, models, count):
    """The measurements in order: yields (name, name of the model, function, indices, seed, function
    that summarizes its results). A name is "SECTION MODEL", or "healing MODEL SEED", and says where
    study.json has the result.

    The indices are those of the first `count` test images of the fixed shuffle. For healing, they
    number samples from the prior instead.
    """
    samples, seed = config.eval.samples, config.seed
    images = {name: fixed_shuffle(count, len(m.data.test)) for name, m in models.items()}
    for name, m in models.items():
        if m.model.likelihood.levels > 1:
            measure = partial(reconstruction_scores, m.data.test)
            section = f"reconstruction {name}"
            yield section, name, measure, images[name], seed, summarize_reconstructions
    for name, m in models.items():
        if m.model.step:
            indices, numbers = images[name], np.arange(PRIOR_SAMPLES)
            summarize = partial(summarize_recovery, grid=m.model.likelihood.size)
            yield f"recovery {name}", name, recovery_curves, indices, seed, summarize
            yield f"stability {name}", name, stability_curves, indices, seed, mean_and_deviation
            for s in HEALING_SEEDS:
                section = f"healing {name} {s}"
                yield section, name, healing_changes, numbers, s, summarize_changes
    for name, m in models.items():
        summarize = partial(summarize_bounds, m.model.likelihood, test_labels=m.data.test_labels)
        yield f"iwelbo {name}", name, partial(log_weights, samples), images[name], seed, summarize


def measure_in_chunks(measure, trained, indices, seed):
    """Measures the test images with these indices: yields NumPy [≤ eval.chunk, …]."""
    chunk, test = trained.config.eval.chunk, trained.data.test
    for start in range(0, len(indices), chunk):
        part = indices[start : start + chunk]
        filled = np.resize(part, chunk)  # repeats some, so that it compiles once
        stored = test[filled % len(test)]  # healing uses no images, and may have more indices
        x = as_floats(trained.model.likelihood, stored)
        rows = measure(trained.model, trained.params, x, filled, seed)
        yield np.asarray(rows)[: len(part)]


# Each measurement takes a model, its parameters, images [B, H, W, colours], their indices in the
# test set [B], and the seed of the noise. It returns an array [B, …].


def recovery_curves(model, params, x, indices, seed):
    """The scores of grown images 0, 1, … 64 steps after they lost a square: [B, sizes, 65, 2].

    The position of a square is uniform, and a function of seed, image and size.
    """
    cells = grow_images(model, params, x)
    curves = []
    for size in square_sizes(cells.shape[1]):
        mask = draw_masks(stream(seed, "square"), indices, cells.shape[1], size)
        damaged = jnp.where(mask, 0, cells)
        curves.append(score_steps(model, RECOVERY_STEPS, params, damaged, x))
    return jnp.stack(curves, axis=1)


def square_sizes(grid):
    """The sides of the squares that are lost from a grid, in cells."""
    return [grid * eighths // 8 for eighths in SQUARE_EIGHTHS]


def draw_masks(key, indices, grid, size):
    """Masks [B, grid, grid, 1] of size×size cells at random places, one for each index."""
    return draw_each(partial(damage_mask, grid=grid, size=size), key, indices)


def stability_curves(model, params, x, indices, seed):
    """The scores of images after 0, 1, … 500 steps from the initial cells: [B, 501, 2]."""
    mean, _ = model.encode(params, x)
    return score_steps(model, STABILITY_STEPS, params, model.initial_cells(mean), x)


def healing_changes(model, params, x, indices, seed):
    """How many pixels of samples from the prior are changed by two losses of a square, half as high
    and wide as the grid.

    A sample grows for as many steps as `decode` takes. Its picture then is the reference. They are
    compared just after the first loss, 38 steps later, just after the second loss, and 68 steps
    later: [B, 4]. Samples and positions of the squares are functions of the seed and the index.
    """
    z = normal(stream(seed, "prior"), indices, model.latent_size)
    cells = advance(model, params, model.initial_cells(z), model.steps)
    grid = cells.shape[1]
    reference = picture_of(model, cells)
    changes = []
    for loss, steps in enumerate(HEALING_STEPS):
        mask = draw_masks(stream(seed, "loss", loss), indices, grid, grid // 2)
        damaged = jnp.where(mask, 0, cells)
        cells = advance(model, params, damaged, steps)
        changes += [count_wrong(model, damaged, reference), count_wrong(model, cells, reference)]
    return jnp.stack(changes, axis=1)


@partial(jax.jit, static_argnums=(0, 1))
def log_weights(samples, model, params, x, indices, seed):
    """log p(x|z) + log p(z) − log q(z|x) for each sample, nats: [B, samples].

    The noise is that of --mode=evaluate, so all samples together give the same IWELBO.
    """
    mean, logvar = model.encode(params, x)

    def weight(s):
        noise = normal(stream(seed, "evaluation", s), indices, model.latent_size)
        return log_importance_weight(model, params, x, mean, logvar, noise)[0]

    return lax.map(weight, jnp.arange(samples)).T


@partial(jax.jit, static_argnums=(0, 1))
def score_steps(model, steps, params, cells, x):
    """The scores of these cells, now and after each step: [B, 1 + steps, 2]."""

    def step(cells, _):
        return model.step(params, cells), score_cells(model, cells, x)

    _, scores = lax.scan(step, cells, length=1 + steps)  # the last step is not looked at
    return scores.swapaxes(0, 1)


def score_cells(model, cells, x):
    """The number of wrong pixels of the images x, and log p(x|z) in nats: [B, 2]."""
    logits = cells[..., : model.likelihood.outputs]
    log_px = model.likelihood.log_prob(logits, x)
    return jnp.stack([count_wrong(model, cells, x), log_px], axis=-1)


def picture_of(model, cells):
    """The picture that cells [B, H, W, C] show: [B, H, W, colours] in 0…1."""
    return model.likelihood.picture(cells[..., : model.likelihood.outputs])


def count_wrong(model, cells, expected):
    """How many pixels of the picture that cells show differ from those of an expected one, [B, H,
    W, colours], as `has_changed` has it: [B]."""
    wrong = has_changed(model.likelihood, picture_of(model, cells), expected)
    return jnp.sum(wrong, axis=(1, 2))


@partial(jax.jit, static_argnums=1)
def reconstruction_scores(test, model, params, x, indices, seed):
    """How near the reconstructions of images x are, from z = μ: [B, 3].

    They are the pixels that have changed, the mean squared difference of all numbers, in 0…1, and
    whether the reconstruction is nearer to x (by squared distance) than to any other test image.
    test: all test images as they are stored, uint8 [N, stored_bytes]; indices: which of them x are.
    """
    mean, _ = model.encode(params, x)
    cells = model.decode(params, mean)
    seen = picture_of(model, cells)

    def squares(image):  # the mean squared difference from each reconstruction, [B]
        return jnp.mean((seen - image) ** 2, axis=(1, 2, 3))

    everyone = lax.map(lambda stored: squares(as_floats(model.likelihood, stored)), test)  # [N, B]
    own = everyone[indices, jnp.arange(len(x))]
    others = everyone.at[indices, jnp.arange(len(x))].set(jnp.inf).min(axis=0)
    return jnp.stack([count_wrong(model, cells, x), own, own < others], axis=-1)


# ---- Summaries --------------------------------------------------------------------------------


def summarize_recovery(curves, grid):
    """`mean_and_deviation` for each size of the lost square, of curves [B, sizes, steps, 2]."""
    sizes = square_sizes(grid)
    return {str(size): mean_and_deviation(curves[:, i]) for i, size in enumerate(sizes)}


def mean_and_deviation(scores):
    """Mean and standard deviation over images of scores [B, steps, 2]: {term: [steps, 2]}, as
    lists."""
    moments = [f(scores, axis=0, dtype=np.float64) for f in (np.mean, np.std)]
    wrong, log_px = np.stack(moments, axis=-1).swapaxes(0, 1).round(3).tolist()
    return {"wrong": wrong, "log_px": log_px}


def summarize_changes(rows):
    """Median, 90th percentile and maximum over samples of [samples, 4]: {term: [4]}, as lists."""
    percentiles = {"median": 50, "p90": 90, "most": 100}
    return {n: np.percentile(rows, p, axis=0).round(3).tolist() for n, p in percentiles.items()}


def summarize_reconstructions(rows):
    """Of the results [images, 3] of `reconstruction_scores`: the median and the 90th percentile of
    the changed pixels, the PSNR in dB (of the mean square over all images), and the share of
    reconstructions that are nearest to their own image."""
    changed, squares, is_nearest = rows.astype(np.float64).T
    return {
        "changed": np.percentile(changed, [50, 90]).tolist(),
        "psnr": round(-10 * float(np.log10(squares.mean())), 3),
        "nearest": float(is_nearest.mean()),
    }


def summarize_bounds(likelihood, log_weights, test_labels):
    """The IWELBO in nats from log importance weights [B, S] of the first B test images of the fixed
    shuffle. test_labels: those of the whole test set, or None.

    Returns a dict. "samples": 1, 2, 4, … S. "iwelbo": for each of these counts, the mean over
    images and over disjoint groups of that many samples. "stderr": the standard error with all
    samples; if images have more than two levels, "bits_per_dimension": the bound with all of
    them. "digits": for each class from 0 on, mean and standard error with all samples, or None
    without labels.
    """
    images, samples = log_weights.shape
    counts = sorted({2**i for i in range(samples.bit_length())} | {samples})
    values = []
    for n in counts:
        groups = log_weights[:, : samples // n * n].reshape(images, -1, n).astype(np.float64)
        values.append((np.logaddexp.reduce(groups, axis=-1) - np.log(n)).mean(axis=1))
    by_class = None
    if test_labels is not None:
        labels = test_labels[fixed_shuffle(images, len(test_labels))]
        classes = range(int(test_labels.max()) + 1)
        by_class = [mean_and_error(values[-1][labels == n]) for n in classes]
    return {
        "samples": counts,
        "iwelbo": np.mean(values, axis=1).round(5).tolist(),
        **in_bits(likelihood, float(np.mean(values[-1]))),
        "stderr": mean_and_error(values[-1])[1],
        "digits": by_class,
    }


def mean_and_error(values):
    """The mean and its standard error, or None and None for fewer than two values."""
    if len(values) < 2:
        return [None, None]
    return np.round([values.mean(), standard_error(values)], 3).tolist()
