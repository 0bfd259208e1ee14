"""--mode=study: recovery, healing, stability, and the IWELBO by samples and class.

The first three are measured on the non-doubling model. For recovery, a grown test digit loses a
square of cells and is compared with the test digit. For healing, a sample from the prior loses two
squares, one after the other, and is compared with itself before. plots.py draws all but healing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vnca.losses import bernoulli_log_likelihood, log_importance_weight
from vnca.models import unpack
from vnca.pool import damage_mask
from vnca.program import VncaError, progress, stop
from vnca.program.evaluate import standard_error
from vnca.program.method import is_plain
from vnca.program.order import fixed_shuffle, images_to_evaluate
from vnca.program.pictures import advance, grow_images
from vnca.report.trained import fingerprints, trained_models
from vnca.training import draw_each, normal, stream

IMAGES = 1000  # if eval.images is not set
# Recovery: the sides of the lost squares, in cells (0: no damage), and the steps after the damage.
SQUARE_SIZES = 0, 4, 8, 12, 16, 20
RECOVERY_STEPS = 64
# Healing: samples for each seed, the side of the lost square, and the steps after each of the two
# losses, as in the reproduction's animation.
HEALING_SEEDS = range(5)
PRIOR_SAMPLES = 80
HEALING_SIZE = 16
HEALING_STEPS = 38, 68
STABILITY_STEPS = 500  # from the initial cells


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
        "plain": {kind: is_plain(m.model, m.config) for kind, m in models.items()},
    }
    result = settings | {"images": count, "steps": models["nondoubling"].model.steps}
    file = run.workdir / "study.json"
    rows = progress.load(file, settings)  # {name of a measurement: [images, …]}
    with stop.saving(), jax.default_matmul_precision(config.eval.precision):
        for name, kind, measure, indices, seed, summarize in measurements(config, models, count):
            left = indices[len(rows.get(name, ())) :]
            parts = measure_in_chunks(measure, models[kind], left, seed)
            rows = progress.collect(
                file, settings, rows, name, parts, len(indices), lambda _, name=name: name
            )
            section, _, key = name.partition(" ")
            summary = summarize(rows[name][: len(indices)])
            result[section] = result.get(section, {}) | ({key: summary} if key else summary)
            if key:  # the others are curves
                stop.say(f"{name}: {summary}")
        progress.write(file, result, indent=None)
        stop.say(f"written to {file}")


def measurements(config, models, count):
    """The measurements in order: yields (name, kind of model, function, indices, seed, function
    that summarizes its results). A name is "SECTION" or "SECTION KEY", as in study.json.

    The indices are those of the first `count` test images of the fixed shuffle. For healing, they
    number samples from the prior instead.
    """
    samples, seed = config.eval.samples, config.seed
    images = {kind: fixed_shuffle(count, len(m.data.test)) for kind, m in models.items()}
    of, indices, numbers = "nondoubling", images["nondoubling"], np.arange(PRIOR_SAMPLES)
    yield "recovery", of, recovery_curves, indices, seed, summarize_recovery
    yield "stability", of, stability_curves, indices, seed, mean_and_deviation
    for s in HEALING_SEEDS:
        yield f"healing {s}", of, healing_changes, numbers, s, summarize_changes
    for kind, m in models.items():
        summarize = partial(summarize_bounds, test_labels=m.data.test_labels)
        yield f"iwelbo {kind}", kind, partial(log_weights, samples), images[kind], seed, summarize


def measure_in_chunks(measure, trained, indices, seed):
    """Measures the test images with these indices: yields NumPy [≤ eval.chunk, …]."""
    chunk, test = trained.config.eval.chunk, trained.data.test
    for start in range(0, len(indices), chunk):
        part = indices[start : start + chunk]
        filled = np.resize(part, chunk)  # repeats some, so that it compiles once
        x = unpack(test[filled % len(test)])  # healing uses no images, and may have more indices
        rows = measure(trained.model, trained.params, x, filled, seed)
        yield np.asarray(rows)[: len(part)]


# Each measurement takes a model, its parameters, images [B, 32, 32, 1], their indices in the test
# set [B], and the seed of the noise. It returns an array [B, …].


def recovery_curves(model, params, x, indices, seed):
    """The scores of grown digits 0, 1, … 64 steps after they lost a square: [B, sizes, 65, 2].

    The position of a square is uniform, and a function of seed, image and size.
    """
    cells = grow_images(model, params, x)
    curves = []
    for size in SQUARE_SIZES:
        mask = draw_each(partial(damage_mask, size=size), stream(seed, "square"), indices)
        damaged = jnp.where(mask, 0, cells)
        curves.append(score_steps(model, RECOVERY_STEPS, params, damaged, x))
    return jnp.stack(curves, axis=1)


def stability_curves(model, params, x, indices, seed):
    """The scores of digits after 0, 1, … 500 steps from the initial cells: [B, 501, 2]."""
    mean, _ = model.encode(params, x)
    return score_steps(model, STABILITY_STEPS, params, model.initial_cells(mean), x)


def healing_changes(model, params, x, indices, seed):
    """How many pixels of samples from the prior are changed by two losses of a 16×16 square.

    A sample grows for as many steps as `decode` takes. Its pixels then are the reference. They are
    compared just after the first loss, 38 steps later, just after the second loss, and 68 steps
    later: [B, 4]. Samples and positions of the squares are functions of the seed and the index.
    """
    z = normal(stream(seed, "prior"), indices, model.latent_size)
    cells = advance(model, params, model.initial_cells(z), model.steps)
    reference, columns = cells[..., 0] > 0, []
    for loss, steps in enumerate(HEALING_STEPS):
        key = stream(seed, "loss", loss)
        mask = draw_each(partial(damage_mask, size=HEALING_SIZE), key, indices)
        damaged = jnp.where(mask, 0, cells)
        cells = advance(model, params, damaged, steps)
        columns += [count_wrong(damaged, reference), count_wrong(cells, reference)]
    return jnp.stack(columns, axis=1)


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
        return model.step(params, cells), score_cells(cells, x)

    _, scores = lax.scan(step, cells, length=1 + steps)  # the last step is not looked at
    return scores.swapaxes(0, 1)


def score_cells(cells, x):
    """The number of wrong pixels of the images x, and log p(x|z) in nats: [B, 2]."""
    log_px = bernoulli_log_likelihood(cells[..., :1], x)
    return jnp.stack([count_wrong(cells, x[..., 0] > 0.5), log_px], axis=-1)


def count_wrong(cells, pixels):
    """How many cells show another value than `pixels`, bool [B, 32, 32]: [B].

    A cell shows 1 if its logit is above 0. A lost cell has logit 0 and shows 0. NaN is always
    wrong.
    """
    logits = cells[..., 0]
    return jnp.sum(((logits > 0) != pixels) | jnp.isnan(logits), axis=(1, 2))


# ---- Summaries --------------------------------------------------------------------------------


def summarize_recovery(curves):
    """`mean_and_deviation` for each size of the lost square, of curves [B, sizes, steps, 2]."""
    return {str(n): mean_and_deviation(curves[:, i]) for i, n in enumerate(SQUARE_SIZES)}


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


def summarize_bounds(log_weights, test_labels):
    """The IWELBO in nats from log importance weights [B, S] of the first B test images of the fixed
    shuffle. test_labels: those of the whole test set, or None.

    Returns a dict. "samples": 1, 2, 4, … S. "iwelbo": for each of these counts, the mean over
    images and over disjoint groups of that many samples. "stderr": the standard error with all
    samples. "digits": for each class from 0 on, mean and standard error with all samples, or None
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
        "stderr": mean_and_error(values[-1])[1],
        "digits": by_class,
    }


def mean_and_error(values):
    """The mean and its standard error, or None and None for fewer than two values."""
    if len(values) < 2:
        return [None, None]
    return np.round([values.mean(), standard_error(values)], 3).tolist()
