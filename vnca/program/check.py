"""Whether this machine computes the method right.

`trusted` compares the fast form with the plain method before training and measurements on an
accelerator. `check`, the mode, makes this comparison on any machine, and two with what is on
record: the known answers of the packaged models, and the losses of a short training.

`python -m vnca.program.check` records these losses again, by the plain method in float32. A
change of configs/quickstart.py, or of what an update computes, needs it.
"""

import itertools
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vnca import training
from vnca.likelihoods import as_floats
from vnca.losses import elbo, iwelbo, reparametrize
from vnca.program import VncaError, machine, runs, store
from vnca.program.config import validate
from vnca.program.data import REINSTALL, load, noise
from vnca.program.learner import make_learner, param_shapes
from vnca.program.order import deal
from vnca.program.own import reading
from vnca.program.stop import say
from vnca.program.trees import array_name

# The largest deviations allowed, by the precision of products: "default" is that of training, and
# goes with its dtype. On a CPU the small models and the quickstart were within 3.3e-6 of the plain
# method in float32, and within 1.5e-2 in bfloat16. A TPU sums a bias's gradient in two parts of
# bfloat16, exact to 2⁻¹⁷. An encoder of width 1 can exceed the limit in bfloat16: a bias's gradient
# is a sum there that almost cancels; the plain method's own rounding error was 0.24 of it (trial).
TOLERANCES = {"highest": 1e-3, "default": 0.1}
# On two CPU devices the fast form was within 2.4e-7 in float32, and within 7.8e-3 in bfloat16.
LOSS_TOLERANCES = {"highest": 1e-4, "default": 5e-2}
FORMS = "fast against plain"  # the name of the one comparison that --plain cannot fail


class Result(NamedTuple):
    """What one comparison found. All processes have the same verdict."""

    what: str
    figures: dict  # {name of an array: its deviation on this process}
    deviation: float  # the largest of all processes
    tolerance: float
    passed: bool

    def __str__(self):
        worst = max(self.figures, key=self.figures.get)
        return f"{self.what}: {worst} deviates by {self.deviation:.2g} (at most {self.tolerance:g})"


def result(what, figures, tolerance):
    """The Result of figures that `deviations` returned. Every process must call it."""
    largest = float(machine.gather(np.float32([max(figures.values())])).max())
    return Result(what, figures, largest, tolerance, largest <= tolerance)


def deviations(computed, known):
    """How far the arrays of a pytree are from known ones: {path: float}. For each array it is the
    largest difference, divided by the largest absolute value of the known array; infinite if a
    number is not finite."""

    def deviation(x, y):
        y = np.float64(y)
        off = abs(x - y).max() / (abs(y).max() or 1)
        return float(off) if np.isfinite(off) else np.inf

    offs = jax.tree.map(deviation, computed, known)
    return {array_name(path): off for path, off in jax.tree.leaves_with_path(offs)}


def is_accelerator():
    """Whether the devices are something other than CPUs."""
    return jax.default_backend() != "cpu"


def precisions(config):
    """The precisions to check at: "highest", and "default" if it gives other results here."""
    differ = is_accelerator() or config.train.dtype != "float32"
    return ["highest", "default"] if differ else ["highest"]


# ---- Fast against plain --------------------------------------------------------------------------


def trusted(learner, config):
    """The learner, or the plain one if the two deviate on this accelerator.

    They are compared at every start. If they deviate on one host, all hosts use the plain one. On
    CPUs nothing is compared, since the tests have done so there, nor where the learner is the plain
    one already. config: fitted to the machine. Raises VncaError as `fast_against_plain` does.
    """
    plain = make_learner(config, plain=True)
    if is_accelerator() and learner != plain:
        say("comparing the fast form with the plain method on this device")
        failed = [str(r) for r in fast_against_plain(learner, config) if not r.passed]
        if failed:
            say(
                "warning: the plain method is used in place of the fast form, since "
                f"{'; '.join(failed)}; --mode=check has every figure"
            )
            return plain
    return learner


def fast_against_plain(learner, config):
    """Compares what a learner and the plain one compute on this process's first device: an iterator
    over a Result for each precision. config: fitted to the machine.

    Raises VncaError if the device has too little free memory, or refuses the plain program too.
    """
    plain = make_learner(config, plain=True)
    for precision in precisions(config):
        expected = None
        try:
            expected = computed(plain, config, precision)
            figures = deviations(computed(learner, config, precision), expected)
        except jax.errors.JaxRuntimeError as fault:
            reason = str(fault).partition("\n")[0]
            # Too little memory says nothing about the form, and may be so only now.
            if expected is None or "RESOURCE_EXHAUSTED" in reason:
                raise VncaError(
                    f"the device cannot compare the fast form with the plain method ({reason}): "
                    "stop other programs that use it, repair its driver, or add --plain"
                ) from fault
            figures = {f"the device refuses it ({reason}), which": np.inf}
        yield result(f"{FORMS}, {precision}", figures, TOLERANCES[precision])


def computed(learner, config, precision):
    """What a learner computes of a few images on this process's first device, as a dict of NumPy
    arrays: those of `answers`, and what the learner's gradient function gives for the first update.

    gradient: shaped like the parameters; norm: its norm, a number; loss: its terms [3]; pool: after
    the update, in which a quarter of the batch was damaged.
    """
    config = reduced(config)
    dtype = "float32" if precision == "highest" else config.train.dtype
    model = training.computed_in(learner.model, dtype)
    stored = noise(model.likelihood, config.train.batch_size)

    def compute(state, stored):
        fresh = jnp.arange(len(stored) // 2 if state.pool else len(stored))
        grads, terms, pool = learner.gradient(model, config, state, 1, stored, fresh)
        return answers(model, state.params, stored) | {
            "gradient": grads,
            "norm": learner.global_norm(grads),
            "loss": terms,
            "pool": pool,
        }

    with jax.default_matmul_precision(precision):
        state = training.init_state(learner, config, stored, drawn_params(model))
        # A map over one device, since the gradient function needs the axis "devices".
        compute = jax.pmap(compute, "devices", in_axes=(None, 0), devices=jax.local_devices()[:1])
        return jax.device_get(compute(state, stored[None]))


def reduced(config):
    """The config with a batch of at most 31 images, and a pool as large.

    A fast form may compute differently depending on the size of a micro-batch. Here the size is
    that of training if a device has fewer than 32 images of the batch, or if it has a multiple of
    16 in micro-batches of at most 16, as on a CPU. Otherwise, what a form does with larger
    micro-batches is not checked.
    """
    share = max(config.train.batch_size // jax.device_count(), 1)
    batch = min(share, 16 + share % 16)
    config = ConfigDict(config.to_dict())
    pool = batch if config.train.pool_size else 0
    config.train.update(batch_size=batch, pool_size=pool, pool_fresh=None, pool_from=1)
    return config


def drawn_params(model):
    """Random parameters, NumPy float32, with no array of zeros. With those that training starts
    from, an automaton's steps change nothing, and its gradients are mostly zeros."""
    random = np.random.RandomState(0)

    def draw(path, x):
        limit = max(np.prod(x.shape[:-1]), 16) ** -0.5
        # Small, so that the cells of 64 steps stay in the range that training keeps them in.
        limit *= 0.1 if "residual" in array_name(path) else 1
        return np.float32(random.uniform(-limit, limit, x.shape))

    return jax.tree.map_with_path(draw, param_shapes(model))


# ---- Known answers -------------------------------------------------------------------------------

# What the packaged models give for the first 16 test images of the package, computed in float64.
# tests/known_answers.py, a NumPy program that shares no code with this package, computed them.
# `python -m tests.known_answers` writes them again, which a new packaged model needs.
KNOWN_ANSWERS = Path(__file__).with_name("known_answers.npz")
DRAWN = slice(2, -2)  # rows and columns of logits; around them, those of a baseline are constant


def read_answers():
    """The answers on record, {"MODEL/PART": array}. Raises VncaError if they cannot be read."""
    with reading(KNOWN_ANSWERS, REINSTALL), np.load(KNOWN_ANSWERS) as file:
        return dict(file)


def known_answers(run):
    """Compares each device's answers with those on record, and with the first device's: an iterator
    over Results. Raises VncaError, OSError or store.Damaged at once if a file of the package cannot
    be read."""
    known = read_answers()
    names = [name for name in runs.packaged_names() if f"{name}/nats" in known]
    packages = {name: runs.packaged(name) for name in names}
    return itertools.chain(
        *(compared_answers(name, package, run.plain, known) for name, package in packages.items())
    )


def compared_answers(name, package, plain, known):
    """The two Results of a packaged model, for the first 16 test images of the package on each
    device. known: the arrays on record."""
    # On a CPU both forms were within 8e-7. No accelerator was tried, and one may have a less exact
    # exp or log.
    limit = 1e-3 if is_accelerator() else 5e-6
    model = make_learner(package.config, plain).model
    images = load(package.config.data.name, None, model.likelihood).test[:16]
    stored = np.stack([images] * jax.local_device_count())  # uint8 [D, 16, stored_bytes]
    with jax.default_matmul_precision("highest"):
        compute = jax.pmap(partial(answers, model), "devices", in_axes=(None, 0))
        computed = jax.tree.map(machine.gather, compute(package.params, stored))
    parts = {f"{name}/{key}": excerpt(computed[key]) for key in {*computed} - {"nats", "step"}}
    parts[f"{name}/nats"] = np.dstack(computed["nats"])
    yield result("known answers", deviations(parts, {key: known[key] for key in parts}), limit)
    first = jax.tree.map(lambda x: x[:1], computed)
    yield result(f"{name} on each device", deviations(computed, first), 1e-6)


def answers(model, params, stored):
    """What a model gives for images as they are stored, uint8 [n, stored_bytes]: a dict. It may be
    traced.

    mean, logvar: of q(z|x), [n, latent]; logits: of one z, of all rows and columns but the first
    and the last two; nats: log p(x|z), the KL and the IWELBO of 4 samples, each [n]. There are two
    more of models on a grid of fixed size, whose cells lose a square after half of the steps. step:
    the cells after one more step, [n, H, W, C]; healed: the logits, of as many rows and columns,
    after the other half of the steps.
    """
    # A RandomState gives the same numbers in all versions of NumPy.
    noise = np.random.RandomState(0).standard_normal((4, len(stored), model.latent_size))
    noise = jnp.float32(noise)
    x = as_floats(model.likelihood, stored)
    mean, logvar = model.encode(params, x)
    z = reparametrize(mean, logvar, noise[0])
    logits = model.decode(params, z)
    _, *nats = elbo(model.likelihood, mean, logvar, logits, x)
    nats += iwelbo(model, params, x, lambda s: noise[s], len(noise))[:1]
    values = {"mean": mean, "logvar": logvar, "logits": logits[:, DRAWN, DRAWN], "nats": nats}
    if model.step:
        half = model.steps // 2
        cells = model.develop(params, model.initial_cells(z), half)
        grid = cells.shape[1]
        square = slice(grid // 4, grid - grid // 4)
        cells = cells.at[:, square, square].set(0)
        values["step"] = model.step(params, cells)
        outputs = model.likelihood.outputs
        values["healed"] = model.develop(params, cells, half)[:, DRAWN, DRAWN, :outputs]
    return values


def excerpt(x):
    """What is on record of an array [D, 16, …], of D devices and 16 images: float64 [D, 16, 6]. For
    each image it is four of its numbers, spread evenly, the mean of all, and the root of their mean
    square."""
    x = np.float64(x).reshape(*x.shape[:2], -1)
    spread = x[..., np.array([1, 3, 5, 7]) * x.shape[2] // 8]
    return np.dstack([spread, x.mean(axis=2), (x**2).mean(axis=2) ** 0.5])


# ---- Twenty losses -------------------------------------------------------------------------------

QUICKSTART = Path(__file__).with_name("quickstart.json")  # its config, and its losses


def twenty_losses(run):
    """Compares the losses of the quickstart with those on record: an iterator over Results. Raises
    VncaError at once if the record cannot be read."""
    with reading(QUICKSTART, REINSTALL):
        record = json.loads(QUICKSTART.read_text())
        config = ConfigDict(record["config"])
        validate(config)
        losses = np.float64(record["losses"]).reshape(20).tolist()
    return (
        result(
            f"loss after n updates, {precision}",
            deviations(first_losses(config, run.plain, precision), losses),
            LOSS_TOLERANCES[precision],
        )
        for precision in precisions(config)
    )


def first_losses(config, plain, precision):
    """The losses of the first twenty updates of a config, in nats: a list of floats. It runs on as
    many of this process's devices as divide the batch."""
    machine.fit(config)
    learner = make_learner(config, plain)
    images = load("bundled").train
    devices = np.gcd(config.train.batch_size, jax.local_device_count())
    update = training.make_update_call(learner, config, jax.local_devices()[:devices])
    order = deal(config, 1, len(images), devices)
    with jax.default_matmul_precision(precision):
        state = training.init_state(learner, config, images)
        _, metrics = update(state, images, order, 20)
    return metrics[:20, 0].tolist()


def record(config):
    """Writes the losses of a config by the plain method to quickstart.json."""
    fields = config.to_dict()  # as they are before they are fitted to this machine
    losses = first_losses(config, True, "highest")
    store.write_json(QUICKSTART, {"config": fields, "losses": losses})


# ---- The mode ------------------------------------------------------------------------------------


def check(run):
    """Checks the config's model on this machine's devices, and writes check.json to the workdir.

    Prints a line for each result. Raises VncaError if one is beyond its tolerance.
    """
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}, JAX {jax.__version__}"
    model_name = run.config.model.name
    say(f"checking {model_name} on {devices}")
    if f"{runs.packaged_name(run.config)}/nats" not in read_answers():
        say(
            f"the model {model_name} has no known answers: its fast form is compared with the "
            "plain one, no more"
        )
    results = []
    # The last two read what is on record at once: a damaged file is found before the work.
    for comparison in itertools.chain(
        fast_against_plain(run.learner, run.config), known_answers(run), twenty_losses(run)
    ):
        say(f"{'ok' if comparison.passed else 'FAILED':7}{comparison}")
        results.append(comparison)
    failed = [comparison.what for comparison in results if not comparison.passed]
    path = run.workdir / "check.json"
    if machine.is_first():
        store.write_json(
            path,
            {
                "passed": not failed,
                "devices": devices,
                "config": run.config.to_dict(),
                "results": [comparison._asdict() for comparison in results],
            },
        )
    say(f"written to {path}")
    if failed:
        remedy = "Train and evaluate with --plain, which does without the fast form"
        if any(FORMS not in what for what in failed):
            remedy = (
                "Run it again with --plain: if it passes, train with --plain; if not, the devices "
                "or this version of JAX compute wrongly, or the program was changed"
            )
        raise VncaError(
            f"{len(failed)} of {len(results)} comparisons failed: {'; '.join(failed)}. {remedy}; "
            f"{path} holds every figure, to be pasted into an issue"
        )


if __name__ == "__main__":
    from configs.quickstart import get_config  # only a clone has it, beside the package

    machine.pin_settings()
    record(get_config())
