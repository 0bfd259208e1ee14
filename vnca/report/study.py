"""The numbers beside the figures: recovery, healing, stability, the IWELBO by samples and digit."""

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
from vnca.program.method import make_method
from vnca.program.order import fixed_shuffle
from vnca.program.progress import collect, read_partial, write_partial
from vnca.program.signals import stop_signals
from vnca.report.packaged import identity, trained_models
from vnca.report.regrowth import after_steps, grown

IMAGES = 1000  # where eval.images is unset
SQUARES = 0, 4, 8, 12, 16, 20  # cells on a side of what is lost; 0: nothing, to compare with
RECOVERY_STEPS, STABILITY_STEPS = 64, 500  # steps after the damage; steps from the seed
# Of healing: seeds, samples of each, cells on a side of a loss, steps after the first, the second.
SEEDS, PRIOR_SAMPLES, LOST, REGROWN = range(5), 80, 16, (38, 68)
HELD = 2  # nats of log p(x|z), in the mean: what holds its digits loses and gains no more


def study(config, workdir, log, make_method=make_method):
    """Measures the models that `figures` shows, on their own test images; writes study.json.

    On the first eval.images of the fixed shuffle (1,000 where unset) with eval.samples, on one
    device. Stopped and started again, it goes on where it was. Raises VncaError where the
    checkpoint is of another config, and for one of several processes.
    """
    if jax.process_count() > 1:
        raise VncaError("--mode=study is for one process: run it on one host, by itself")
    workdir = Path(workdir)
    shown = trained_models(config, workdir, log, make_method)
    count, samples = config.eval.images or IMAGES, config.eval.samples
    files.make_folder(workdir)
    settings = {
        "models": identity(shown),
        "samples": samples,
        "seed": config.seed,
        "precision": config.eval.precision,
    }
    kept = workdir / "study.partial.npz"
    rows = read_partial(kept, settings)  # of each part, [images, …]
    save = partial(write_partial, kept, settings)

    numbers = {kind: fixed_shuffle(count, len(shown[kind].data.test)) for kind in shown}
    parts = measures(numbers, samples, config.seed)
    with (
        stop_signals(log) as (stop_asked, log),
        jax.default_matmul_precision(config.eval.precision),
    ):
        for name, kind, measure, of, seed in parts:
            results = in_chunks(measure, shown[kind], of[len(rows.get(name, ())) :], seed)
            rows = collect(results, rows, name, len(of), stop_asked, save, log, lambda _, n=name: n)
            if len(rows.get(name, ())) < len(of):
                return

    rows = {name: rows[name][: len(of)] for name, _, _, of, _ in parts}
    labels = {kind: s.data.test_labels[numbers[kind]] for kind, s in shown.items()}
    result = settings | {
        "images": count,
        "recovery": {str(n): spread(rows["recovery"][:, i]) for i, n in enumerate(SQUARES)},
        "healing": {str(s): changes(rows[f"healing, seed {s}"]) for s in SEEDS},
        "steps": shown["nondoubling"].model.steps,
        "stability": spread(rows["stability"]),
        "iwelbo": {kind: bounds(rows[f"IWELBO of {kind}"], labels[kind]) for kind in shown},
    }
    files.write_json(workdir / "study.json", result, indent=None)
    for line in summary(result):
        log(line)
    log(f"written to {workdir / 'study.json'}")


def measures(numbers, samples, seed):
    """What is measured, in order: (name, kind of model, function, numbers of the rows, seed) each.

    numbers: of the test images, by kind.
    """
    of = "nondoubling"
    parts = [
        ("recovery", of, recovery_curves, numbers[of], seed),
        ("stability", of, stability_curves, numbers[of], seed),
    ]
    parts += [(f"healing, seed {s}", of, healing, np.arange(PRIOR_SAMPLES), s) for s in SEEDS]
    weights = partial(log_weights, samples)
    return parts + [(f"IWELBO of {k}", k, weights, numbers[k], seed) for k in numbers]


def in_chunks(measure, trained, numbers, seed):
    """`measure` of the test images with these numbers: yields NumPy [≤ eval.chunk, …]."""
    chunk, test = trained.config.eval.chunk, trained.data.test
    for start in range(0, len(numbers), chunk):
        part = numbers[start : start + chunk]
        padded = np.pad(part, (0, chunk - len(part)), mode="edge")  # the same program
        new = measure(trained.model, trained.params, unpack(test[padded]), padded, seed)
        yield np.asarray(new)[: len(part)]


# Each takes a model, its parameters, images [B, 32, 32, 1], their numbers in the test set [B], and
# the seed of the noise, and gives an array [B, …].


def recovery_curves(model, params, x, numbers, seed):
    """`judged` grown digits 0, 1, … 64 steps after they lost a square: [B, squares, 65, 2].

    Where a square lies is uniform, a function of seed, image and size.
    """
    cells = grown(model, params, x)
    rows = []
    for size in SQUARES:
        mask = draw_each(partial(damage_mask, size=size), stream(seed, "square"), numbers)
        rows.append(followed(model, RECOVERY_STEPS, params, jnp.where(mask, 0, cells), x))
    return jnp.stack(rows, axis=1)


def stability_curves(model, params, x, numbers, seed):
    """`judged` digits as they grow from the seed, after 0, 1, … 500 steps: [B, 501, 2]."""
    mean, _ = model.encode(params, x)
    return followed(model, STABILITY_STEPS, params, model.initial_cells(mean), x)


def healing(model, params, x, numbers, seed):
    """Pixels in which samples from the prior differ from what they were, grown for the model's own
    steps, before the first of two losses: just after it, 38 steps later, just after the second,
    and 68 steps after that: [B, 4].

    A sample and where its squares of 16×16 cells lie are functions of the seed and its number.
    """
    del x
    z = normal(stream(seed, "prior"), numbers, model.latent_size)
    cells = after_steps(model, params, model.initial_cells(z), model.steps)
    before, columns = cells[..., 0] > 0, []
    for loss, steps in enumerate(REGROWN):
        key = stream(seed, "loss", loss)
        mask = draw_each(partial(damage_mask, size=LOST), key, numbers)
        lost = jnp.where(mask, cells, 0)
        cells = after_steps(model, params, lost, steps)
        columns += [differing(lost, before), differing(cells, before)]
    return jnp.stack(columns, axis=1)


@partial(jax.jit, static_argnums=(0, 1))
def log_weights(samples, model, params, x, numbers, seed):
    """log p(x|z) + log p(z) − log q(z|x) for each sample, nats: [B, samples].

    With the noise of --mode=evaluate, so that all of them together give its number.
    """

    mean, logvar = model.encode(params, x)

    def weight(s):
        noise = normal(stream(seed, "evaluation", s), numbers, model.latent_size)
        return log_importance_weight(model, params, x, mean, logvar, noise)[0]

    return lax.map(weight, jnp.arange(samples)).T


@partial(jax.jit, static_argnums=(0, 1))
def followed(model, steps, params, cells, x):
    """`judged` cells, now and after each step: [B, 1 + steps, 2]."""

    def step(cells, _):
        return model.step(params, cells), judged(cells, x)

    cells, rows = lax.scan(step, cells, length=steps)
    return jnp.concatenate([rows, judged(cells, x)[None]]).swapaxes(0, 1)


def judged(cells, x):
    """Pixels of x that these cells have wrong, and log p(x|z), nats: [B, 2].

    A cell stands for a lit pixel where its logit is above 0 (that of a lost cell is 0), and is
    wrong where it is not a number.
    """
    log_px = bernoulli_log_likelihood(cells[..., :1], x)
    return jnp.stack([differing(cells, x[..., 0] > 0.5), log_px], axis=-1)


def differing(cells, lit):
    """How many of these cells are not as in `lit`, bool [B, 32, 32]: [B]."""
    logits = cells[..., 0]
    return jnp.sum(((logits > 0) != lit) | jnp.isnan(logits), axis=(1, 2))


# What is said of them all.


def spread(rows):
    """Mean and standard deviation over images, of [B, steps, 2]: {term: [steps, 2]}, as lists."""
    both = np.stack([rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)], -1)
    return dict(zip(("wrong", "log_px"), both.swapaxes(0, 1).round(3).tolist(), strict=True))


def changes(rows):
    """Median, 90th percentile and most of [samples, 4]: {term: [4]}, as lists."""
    found = np.median(rows, axis=0), np.percentile(rows, 90, axis=0), rows.max(axis=0)
    return dict(zip(("median", "p90", "most"), (v.round(3).tolist() for v in found), strict=True))


def bounds(log_weights, labels):
    """The IWELBO, nats, of log weights [B, S]: with 1, 2, 4, … of the samples, mean over images and
    over the groups of so many; and of each digit with all of them, mean and standard error."""
    images, most = log_weights.shape
    numbers = sorted({2**i for i in range(most.bit_length())} | {most})
    values = []
    for n in numbers:
        groups = log_weights[:, : most // n * n].reshape(images, -1, n).astype(np.float64)
        values.append((np.logaddexp.reduce(groups, axis=-1) - np.log(n)).mean(axis=1))
    by_digit = [values[-1][labels == digit] for digit in range(10)]
    return {
        "samples": numbers,
        "iwelbo": [round(v.mean(), 5) for v in values],
        "stderr": error(values[-1]),
        "digits": [[round(v.mean(), 3) if len(v) else None, error(v)] for v in by_digit],
    }


def error(values):
    """The standard error of their mean; None of less than two."""
    return round(standard_error(values), 3) if len(values) > 1 else None


def remaining(found):
    """What is left of the first loss after the first regrowth, and after the second: medians."""
    lost, first, _, second = found["median"]
    return [part / lost if lost else float("nan") for part in (first, second)]


def summary(result):
    """The study in a few lines."""
    lines = []
    for size, curves in result["recovery"].items():
        wrong, log_px = ([curves[term][t][0] for t in (0, 8, 32)] for term in ("wrong", "log_px"))
        lines.append(
            f"{size}×{size} lost: wrong pixels {wrong[0]:.1f}, after 8 steps {wrong[1]:.1f}, after "
            f"32 {wrong[2]:.1f}; log p(x|z) {log_px[0]:.1f}, {log_px[1]:.1f}, {log_px[2]:.1f} nats"
        )
    for seed, found in result["healing"].items():
        at = [f"{m:g} ({p:g}, {most:g})" for m, p, most in zip(*found.values(), strict=True)]
        first, second = remaining(found)
        lines.append(
            f"{LOST}×{LOST} lost of {PRIOR_SAMPLES} samples, seed {seed}: pixels changed, median "
            f"(90th percentile, most): {at[0]}; after {REGROWN[0]} steps {at[1]}; a second time "
            f"lost {at[2]}; after {REGROWN[1]} steps {at[3]}; {first:.2f} and {second:.2f} of the "
            "first"
        )
    held = np.array(result["stability"]["log_px"])[result["steps"] :, 0]
    far = np.max(np.abs(held - held[0]))  # not a number where a digit is none
    lines.append(
        f"log p(x|z) from {result['steps']} to {STABILITY_STEPS} steps: {held.min():.1f} to "
        f"{held.max():.1f} nats, {'' if far <= HELD else 'NOT '}within {HELD} of {held[0]:.1f}, "
        "where it begins"
    )
    for steps in sorted({result["steps"], 36, 64, 100, 300, STABILITY_STEPS}):
        wrong, log_px = (result["stability"][term][steps] for term in ("wrong", "log_px"))
        lines.append(
            f"{steps} steps from the seed: wrong pixels {wrong[0]:.1f} ± {wrong[1]:.1f}, "
            f"log p(x|z) {log_px[0]:.1f} ± {log_px[1]:.1f} nats (± one standard deviation)"
        )
    for kind, of in result["iwelbo"].items():
        pairs = zip(of["samples"], of["iwelbo"], strict=True)
        by_samples = ", ".join(f"{n}: {value:.2f}" for n, value in pairs)
        lines.append(f"IWELBO of {kind} by samples: {by_samples} (± {of['stderr']}) nats")
    return lines
