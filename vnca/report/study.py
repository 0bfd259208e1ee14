"""Measurements for the figures: recovery, healing, stability, and the IWELBO by samples and class.

Recovery, healing and stability are measured on the non-doubling model.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vnca.images import unpack
from vnca.losses import bernoulli_log_likelihood, log_importance_weight
from vnca.noise import draw_each, normal, stream
from vnca.pool import damage_mask
from vnca.program import VncaError, files
from vnca.program.evaluate import standard_error
from vnca.program.method import is_plain, make_method
from vnca.program.order import fixed_shuffle, images_to_evaluate
from vnca.program.progress import collect, read_partial, set_aside, write_partial, write_result
from vnca.program.signals import stop_signals
from vnca.report.packaged import fingerprints, trained_models
from vnca.report.regrowth import advance, grow_images

IMAGES = 1000  # if eval.images is not set
# Recovery: the sides of the lost squares, in cells (0: no damage), and the steps after the damage.
SQUARE_SIZES = 0, 4, 8, 12, 16, 20
RECOVERY_STEPS = 64
# Healing: samples for each seed, the side of the lost square, and the steps after each of the two
# losses.
HEALING_SEEDS = range(5)
PRIOR_SAMPLES = 80
HEALING_SIZE = 16
HEALING_STEPS = 38, 68
STABILITY_STEPS = 500  # from the initial cells
STABLE_WITHIN = 2  # nats: the mean of log p(x|z) of a stable model changes by no more


def study(config, workdir, log, make_method=make_method, which=None):
    """Measures the models that `figures` shows, on their own test images, and writes
    study.json.

    It takes the first eval.images of the fixed shuffle (if not set, 1,000, or all of a smaller test
    set) and eval.samples, and runs on one device. which: the checkpoint, if not the newest. A
    stopped study raises Stopped, and resumes where it was. Raises VncaError if the checkpoint
    belongs to another config, if eval.images is above the size of a test set, or if there are
    several processes.
    """
    if jax.process_count() > 1:
        raise VncaError("--mode=study runs in one process only: run it on one host")
    workdir = Path(workdir)
    models = trained_models(config, workdir, log, make_method, which)
    available = min(len(m.data.test) for m in models.values())
    count, samples = images_to_evaluate(config, available, IMAGES), config.eval.samples
    files.make_folder(workdir)
    settings = {
        "models": fingerprints(models),
        "samples": samples,
        "seed": config.seed,
        "precision": config.eval.precision,
        "plain": {kind: is_plain(m.model, m.config) for kind, m in models.items()},
    }
    test_indices = {kind: fixed_shuffle(count, len(m.data.test)) for kind, m in models.items()}
    measurements = list_measurements(test_indices, samples, config.seed)

    def like(name):
        """The shape and dtype of the measurement of one image."""
        for other, kind, measure, _, seed in measurements:
            if other == name:
                image, index = np.zeros((1, 32, 32, 1), np.float32), np.zeros(1, int)
                measure = partial(measure, models[kind].model)
                return jax.eval_shape(measure, models[kind].params, image, index, seed)

    file = workdir / "study.json"
    rows = read_partial(file, settings, like)  # {name of a measurement: [images, …]}
    if rows:
        log(f"{len(rows)} of {len(measurements)} measurements were begun or done before")
    save = partial(write_partial, file, settings)
    if any(len(rows.get(name, ())) < len(indices) for name, _, _, indices, _ in measurements):
        set_aside(file, log)
    with (
        stop_signals(log) as (stop_asked, patient_log),
        jax.default_matmul_precision(config.eval.precision),
    ):
        for name, kind, measure, indices, seed in measurements:
            missing = indices[len(rows.get(name, ())) :]
            parts = measure_in_chunks(measure, models[kind], missing, seed)
            describe = lambda _, name=name: name  # noqa: E731
            rows = collect(parts, rows, name, len(indices), stop_asked, save, patient_log, describe)

        rows = {name: rows[name][: len(indices)] for name, _, _, indices, _ in measurements}
        result = settings | {
            "images": count,
            "recovery": {
                str(size): mean_and_deviation(rows["recovery"][:, i])
                for i, size in enumerate(SQUARE_SIZES)
            },
            "healing": {
                str(s): summarize_changes(rows[f"healing, seed {s}"]) for s in HEALING_SEEDS
            },
            "steps": models["nondoubling"].model.steps,
            "stability": mean_and_deviation(rows["stability"]),
            "iwelbo": {
                kind: summarize_bounds(rows[f"IWELBO of {kind}"], *known_labels(m.data, count))
                for kind, m in models.items()
            },
        }
        write_result(file, result, patient_log, indent=None)
        for line in summary_lines(result):
            patient_log(line)
        patient_log(f"written to {file}")


def list_measurements(test_indices, samples, seed):
    """The measurements in order: a list of (name, kind of model, function, indices, seed).

    test_indices: {kind: indices of test images}. For healing, the indices number samples from the
    prior instead.
    """
    images = test_indices["nondoubling"]
    found = [
        ("recovery", "nondoubling", recovery_curves, images, seed),
        ("stability", "nondoubling", stability_curves, images, seed),
    ]
    for s in HEALING_SEEDS:
        indices = np.arange(PRIOR_SAMPLES)
        found.append((f"healing, seed {s}", "nondoubling", healing_changes, indices, s))
    for kind, indices in test_indices.items():
        measure = partial(log_weights, samples)
        found.append((f"IWELBO of {kind}", kind, measure, indices, seed))
    return found


def measure_in_chunks(measure, trained, indices, seed):
    """Measures the test images with these indices: yields NumPy [≤ eval.chunk, …]."""
    chunk, test = trained.config.eval.chunk, trained.data.test
    for start in range(0, len(indices), chunk):
        part = indices[start : start + chunk]
        padded = np.pad(part, (0, chunk - len(part)), mode="edge")  # so that it compiles once
        x = unpack(test[padded % len(test)])  # there may be more samples from the prior than images
        rows = measure(trained.model, trained.params, x, padded, seed)
        yield np.asarray(rows)[: len(part)]


# Each function below takes a model, its parameters, images [B, 32, 32, 1], their indices in the
# test set [B], and the seed of the noise. It returns an array [B, …].


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
    del x
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

    cells, scores = lax.scan(step, cells, length=steps)
    return jnp.concatenate([scores, score_cells(cells, x)[None]]).swapaxes(0, 1)


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


def mean_and_deviation(scores):
    """Mean and standard deviation over images of scores [B, steps, 2]: {term: [steps, 2]}, as
    lists."""
    mean = scores.mean(axis=0, dtype=np.float64)
    deviation = scores.std(axis=0, dtype=np.float64)
    wrong, log_px = np.stack([mean, deviation], axis=-1).swapaxes(0, 1).round(3).tolist()
    return {"wrong": wrong, "log_px": log_px}


def summarize_changes(rows):
    """Median, 90th percentile and maximum over samples of [samples, 4]: {term: [4]}, as lists."""
    return {
        "median": np.median(rows, axis=0).round(3).tolist(),
        "p90": np.percentile(rows, 90, axis=0).round(3).tolist(),
        "most": rows.max(axis=0).round(3).tolist(),
    }


def known_labels(data, count):
    """The labels of the first `count` test images of the fixed shuffle, [count], or None; and the
    number of classes, which are numbered from 0."""
    if data.test_labels is None:
        return None, 0
    return data.test_labels[fixed_shuffle(count, len(data.test))], int(data.test_labels.max()) + 1


def summarize_bounds(log_weights, labels, classes=10):
    """The IWELBO in nats from log importance weights [B, S] of images with these labels, [B], which
    may be None.

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
    if labels is not None:
        of_class = [values[-1][labels == n] for n in range(classes)]
        by_class = [[round(v.mean(), 3) if len(v) else None, rounded_error(v)] for v in of_class]
    return {
        "samples": counts,
        "iwelbo": [round(v.mean(), 5) for v in values],
        "stderr": rounded_error(values[-1]),
        "digits": by_class,
    }


def rounded_error(values):
    """The standard error of the mean, or None for fewer than two values."""
    return round(standard_error(values), 3) if len(values) > 1 else None


def remaining_fractions(changes):
    """The changed pixels that remain after the first and after the second regrowth, as fractions of
    those just after the first loss. All are medians."""
    lost, first, _, second = changes["median"]
    return [part / lost if lost else float("nan") for part in (first, second)]


def summary_lines(result):
    """The study as lines of text."""
    lines = []
    for size, curves in result["recovery"].items():
        wrong, log_px = ([curves[term][t][0] for t in (0, 8, 32)] for term in ("wrong", "log_px"))
        damage = "no damage" if size == "0" else f"{size}×{size} lost"
        lines.append(
            f"{damage}: wrong pixels {wrong[0]:.1f}, after 8 steps {wrong[1]:.1f}, after "
            f"32 {wrong[2]:.1f}; log p(x|z) {log_px[0]:.1f}, {log_px[1]:.1f}, {log_px[2]:.1f} nats"
        )
    for seed, changes in result["healing"].items():
        terms = changes["median"], changes["p90"], changes["most"]
        counts = [f"{m:g} ({p:g}, {high:g})" for m, p, high in zip(*terms, strict=True)]
        first, second = remaining_fractions(changes)
        square = f"{HEALING_SIZE}×{HEALING_SIZE}"
        lines.append(
            f"{square} lost of {PRIOR_SAMPLES} samples, seed {seed}: changed pixels, median "
            f"(90th percentile, maximum): {counts[0]}; after {HEALING_STEPS[0]} steps {counts[1]}; "
            f"after a second loss {counts[2]}; after {HEALING_STEPS[1]} steps {counts[3]}; "
            f"{first:.2f} and {second:.2f} of the first loss remain"
        )
    start = min(result["steps"], STABILITY_STEPS)
    means = np.array(result["stability"]["log_px"])[start:, 0]
    drift = np.max(np.abs(means - means[0]))  # NaN if a digit has diverged
    lines.append(
        f"log p(x|z) from {start} to {STABILITY_STEPS} steps: {means.min():.1f} to "
        f"{means.max():.1f} nats, {'' if drift <= STABLE_WITHIN else 'NOT '}within {STABLE_WITHIN} "
        f"of the first value, {means[0]:.1f}"
    )
    for steps in sorted({start, 36, 64, 100, 300, STABILITY_STEPS}):
        wrong, log_px = (result["stability"][term][steps] for term in ("wrong", "log_px"))
        lines.append(
            f"{steps} steps from the initial cells: wrong pixels {wrong[0]:.1f} ± {wrong[1]:.1f}, "
            f"log p(x|z) {log_px[0]:.1f} ± {log_px[1]:.1f} nats (± one standard deviation)"
        )
    for kind, bounds in result["iwelbo"].items():
        pairs = zip(bounds["samples"], bounds["iwelbo"], strict=True)
        by_samples = ", ".join(f"{n}: {value:.2f}" for n, value in pairs)
        error = "" if bounds["stderr"] is None else f" (± {bounds['stderr']})"
        lines.append(f"IWELBO of {kind} by samples: {by_samples}{error} nats")
    return lines
