"""The check of a machine: whether it computes the method right, and how far off it is.

`python -m vnca.report.check` records the losses of the quickstart again, by the plain method in
float32. A change of configs/quickstart.py, or of what an update computes, needs it.
"""

import json
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib.version
import numpy as np
from jax import lax
from ml_collections import ConfigDict

from vnca import pool
from vnca.program import VncaError, checkpoint, files
from vnca.program.arithmetic import update_flops
from vnca.program.check import (
    EVERYTHING,
    IMAGES,
    TOLERANCES,
    amount,
    deviations,
    drawn_params,
    fast_against_plain,
    is_accelerator,
    multiplied,
    named,
    precisions,
    share,
    values,
    worst,
)
from vnca.program.data import load
from vnca.program.devices import local_rows, on_devices, on_host
from vnca.program.hosts import agree, ask_all, from_first, gather, is_first
from vnca.program.machine import check_batch, check_images, cores, fit_to_machine
from vnca.program.method import make_method
from vnca.program.order import deal
from vnca.program.progress import duration
from vnca.report import known_answers, packaged
from vnca.training import METRICS, init_state, make_update_call

QUICKSTART = Path(__file__).with_name("quickstart.json")  # its config, and its losses
UPDATES = 10  # before a run is interrupted, and as many after
# On two CPU devices the fast form was within 1.1e-7 in float32, and within 7.8e-3 in bfloat16.
LOSS_TOLERANCES = {"highest": 1e-4, "training": 5e-2}
# No accelerator has computed the known answers yet. Its exp and log may be less exact than a CPU's.
ANSWER_TOLERANCES = {"highest": 1e-3, "training": 0.1}
PLAIN_SLOWDOWN = 10  # of the plain method on a CPU, roughly


class Result(NamedTuple):
    """One line of the table."""

    part: str
    what: str
    figures: dict  # {name of an array: its deviation}, infinite if a number is not finite
    tolerance: float  # of each deviation
    seconds: float

    @property
    def passed(self):
        return all(off <= self.tolerance for off in self.figures.values())


def check(config, workdir, log, make_method=make_method):
    """Checks the config's model on the devices at hand, and writes check.json in `workdir`.

    Logs a line for each result, and then a table. Raises VncaError if a result is beyond its
    tolerance, if the batch does not fit the devices, or if the workdir cannot be made.
    """
    check_batch(config, jax.device_count())
    data = load("bundled")
    check_images(config, len(data.train))
    agree(lambda: files.make_folder(workdir))
    config, start = prepared(config), time.monotonic()
    log(header(config))
    if not is_accelerator():
        on = f"{cores()} idle core{'s' * (cores() > 1)}"
        log(f"this takes about {duration(expected_seconds(config))} on {on}")
    results = []
    for part, found in PARTS.items():
        before = time.monotonic()
        for what, figures, tolerance in found(config, data, make_method, workdir):
            seconds = time.monotonic() - before
            results.append(Result(part, what, shared(figures), tolerance, seconds))
            log(line(results[-1]))
            before = time.monotonic()
    for text in table(results):
        log(text)
    files.write_json(Path(workdir) / "check.json", report(config, results))
    log(f"{duration(time.monotonic() - start)}; written to {Path(workdir) / 'check.json'}")
    failed = [r for r in results if not r.passed]
    if ask_all(lambda: bool(failed))():
        for result in failed:
            log(line(result))
        raise VncaError(
            f"{len(failed)} of {len(results)} checks failed, of: "
            f"{', '.join(sorted({r.part for r in failed}))}. {remedy(failed)}; "
            "check.json holds every figure, to be pasted into an issue"
        )


def remedy(failed):
    """What to do about the results that failed, as words."""
    if {r.part for r in failed} == {"fast against plain"}:
        return "Train and evaluate with --plain, which does without the fast form"
    return (
        "Run it again with --plain: if it passes, train with --plain; if not, the devices or this "
        "version of JAX compute wrongly, or the program was changed"
    )


def prepared(config):
    """The config with UPDATES updates in a device call, rows of the pool from the first update on,
    and unset fields fitted."""
    config = config.copy_and_resolve_references()
    if "pool_from" in config.train:
        config.train.pool_from = 1  # with rows of the pool
    config.train.updates_per_call = UPDATES
    return fit_to_machine(config)


def expected_seconds(config):
    """How long the check takes on the cores of an idle CPU, from the arithmetic."""
    image, batch = update_flops(config) / config.train.batch_size, config.train.batch_size
    of_values = share(config, jax.device_count())[1] * image * 4 / 3
    flops = of_values * (1 + PLAIN_SLOWDOWN) + jax.device_count() * IMAGES * image
    flops += (3 * UPDATES + 2) * batch * image + 2 * UPDATES * 10e9  # the last is the quickstart's
    return 75 + flops / (60e9 * cores())  # to compile, and for the known answers


def shared(figures):
    """The largest figures of all processes."""
    return dict(zip(figures, gather(np.array([[*figures.values()]])).max(axis=0), strict=True))


# ---- The parts, each a generator of (what, {name: deviation}, tolerance) ------------------------


def fast_form(config, data, make_method, workdir):
    """Values and gradients by the method in use, against those by the plain one."""
    method, plain = make_method(config), plain_method(config)
    for precision in precisions(config):
        found = fast_against_plain(method, plain, config, precision, data.test)
        names = EVERYTHING, "encoder", "decoder", "log p(x|z)", "KL", "ELBO"
        groups = {name: {} for name in names}
        for name, off in found.items():
            part = EVERYTHING if name.startswith(EVERYTHING) else name.split("/")[0]
            groups.setdefault(part if part in groups else "gradients", {})[name] = off
        for group, figures in groups.items():
            if figures:  # if the fast form is refused, one group has all there is to say
                yield f"{group}, {precision}", figures, TOLERANCES[precision]


def plain_method(config):
    """The plain method, whatever the flags say."""
    return make_method(config, plain=True)


def answers(config, data, make_method, workdir):
    """The packaged models' answers, against those that were computed in float64."""
    bits = data.test[: known_answers.IMAGES]
    for precision in ("highest", "training") if is_accelerator() else ("highest",):
        limit = ANSWER_TOLERANCES[precision] if is_accelerator() else known_answers.TOLERANCE
        for kind in packaged.KINDS:
            made = packaged.load(kind, make_method)
            with multiplied(precision):
                compute = jax.jit(partial(known_answers.answers, made.model))
                found = jax.device_get(compute(made.params, bits))
            figures = deviations(found, known_answers.load(kind))
            yield f"{kind}, {precision}", figures, limit


def devices(config, data, make_method, workdir):
    """Each device against the first one, and all of them together against one."""
    method = make_method(config)
    limit = TOLERANCES[precisions(config)[-1]]
    yield "each gives the first one's answer", same_answers(method, config, data), 1e-6
    if jax.process_count() == 1:  # one device has no part of another process's pool
        yield "a batch split over all", split_batch(method, config, data), limit
    yield "rows of a pool, taken and put back", pool_rows(), 0.0


def same_answers(method, config, data):
    """The deviations of each device's `values` from those of the first."""
    noise = np.random.RandomState(1).standard_normal((IMAGES, method.model.latent_size))
    compute = jax.pmap(
        lambda params, bits, noise, _: values(method, config.train.dtype, params, bits, noise),
        in_axes=(None, None, None, 0),
    )
    found = compute(
        drawn_params(method.model), data.test[:IMAGES], noise.astype(np.float32),
        np.zeros(jax.local_device_count()),
    )  # fmt: skip
    found = jax.tree.map(gather, found)
    return deviations(found, {name: x[:1] for name, x in found.items()})


def drawn_state(method, config, data):
    """A State before the first update, with parameters of which none are zero."""
    return init_state(method, config, data.train)._replace(params=drawn_params(method.model))


def split_batch(method, config, data):
    """How far one update on all devices deviates from one on the first: Adam's moments, which the
    gradient alone determines, the metrics and the pool."""
    config = config.copy_and_resolve_references()
    share_of_batch = config.train.batch_size // jax.device_count()
    config.train.micro_batch = min(config.train.micro_batch, share_of_batch)
    found = []
    for count in sorted({1, jax.device_count()}):
        state = jax.device_get(drawn_state(method, config, data))
        state = state._replace(
            pool=jax.tree.map(lambda x, n=count: x.reshape(n, -1, *x.shape[1:]), state.pool)
        )
        update = make_update_call(method, config, jax.local_devices()[:count])
        order = deal(config, 1, 1, len(data.train), count)
        state, metrics = update(state, data.train, order, np.int32(1))
        metrics = dict(zip(METRICS, np.asarray(metrics)[0], strict=True))
        whole = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), state.pool)
        found.append(named(state.moments, "moments") | named(whole, "pool") | metrics)
    return deviations(found[-1], found[0])


def pool_rows():
    """The deviations of rows that all devices take from a pool, and put into an empty one."""
    count = jax.device_count()
    rows = np.random.RandomState(0).permutation(8 * count).astype(np.int32)
    cells = np.random.RandomState(1).standard_normal((8 * count, 4, 4, 3)).astype(np.float32)

    def move(cells):
        taken = pool.take(cells, rows)
        return lax.all_gather(taken, "devices", tiled=True), pool.put(cells * 0, rows, taken)

    split = cells.reshape(count, 8, *cells.shape[1:])[local_rows()]
    taken, put = jax.tree.map(gather, jax.pmap(move, "devices")(split))
    known = {"taken": np.broadcast_to(cells[rows], taken.shape), "put back": cells}
    return deviations({"taken": taken, "put back": put.reshape(cells.shape)}, known)


def short_training(config, data, make_method, workdir):
    """Twenty updates of the quickstart, against the losses on record."""
    record = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    count = math.gcd(jax.device_count(), record["config"]["train"]["batch_size"])
    for precision in precisions(config) if jax.process_count() == 1 else ():
        losses = quickstart_losses(record["config"], data, make_method, precision, count)
        names = [f"update {t}" for t in range(1, len(losses) + 1)]
        known = dict(zip(names, record["losses"], strict=True))
        figures = deviations(dict(zip(names, losses, strict=True)), known)
        yield f"{len(losses)} losses, {precision}", figures, LOSS_TOLERANCES[precision]


def quickstart_losses(fields, data, make_method, precision, device_count):
    """The losses of the first twenty updates of a config, a nested dict, on so many devices."""
    config = prepared(ConfigDict(fields))
    method = make_method(config)
    with multiplied(precision):
        state = jax.device_get(init_state(method, config, data.train))
        update = make_update_call(method, config, jax.local_devices()[:device_count])
        losses = []
        for first in (1, 1 + UPDATES):
            order = deal(config, first, UPDATES, len(data.train), device_count)
            state, metrics = update(state, data.train, order, np.int32(UPDATES))
            losses += np.asarray(metrics)[:, 0].tolist()
    return losses


def interrupted(config, data, make_method, workdir):
    """Ten updates, saved, loaded and ten more, against twenty."""
    method = make_method(config)
    update = make_update_call(method, config)

    def ten_updates(state, first):
        state, images = on_devices(state, data.train)
        order = deal(config, first, UPDATES, len(data.train))
        return on_host(update(state, images, order, np.int32(UPDATES))[0])

    state = ten_updates(drawn_state(method, config, data), 1)
    loaded = saved_and_loaded(state, config, workdir) if is_first() else None
    loaded = from_first(loaded, state)
    uninterrupted = named(ten_updates(state, 1 + UPDATES), "state")
    resumed = named(ten_updates(loaded, 1 + UPDATES), "state")
    limit = TOLERANCES["training"] if is_accelerator() else 0.0
    yield "ten updates and ten more", deviations(resumed, uninterrupted), limit


def saved_and_loaded(state, config, workdir):
    """The state after saving and loading a checkpoint in its own folder in `workdir`."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    try:
        with tempfile.TemporaryDirectory(prefix=".check.", dir=workdir) as folder:
            _, restore = checkpoint.load(checkpoint.save(folder, state, config.to_dict(), keep=1))
            return restore(shapes)
    except OSError as fault:
        raise files.cannot_write(workdir, fault) from fault


PARTS = {
    "fast against plain": fast_form,
    "known answers": answers,
    "devices": devices,
    "short training": short_training,
    "interrupted": interrupted,
}


# ---- What is written ----------------------------------------------------------------------------


def header(config):
    """The machine and the model, on a line."""
    device, count = jax.devices()[0], jax.device_count()
    return (
        f"checking {config.model.name} on {count} × {device.device_kind}, JAX {jax.__version__}, "
        f"{config.train.dtype}"
    )


def verdict(result):
    """A result's largest deviation, and what may be said of it."""
    return amount(*worst(result.figures))


def line(result):
    """A result on a line, for people."""
    name, _ = worst(result.figures)
    most = f"at most {result.tolerance:g}" if result.tolerance else "equal bits wanted"
    return (
        f"{'ok' if result.passed else 'FAILED':7}{result.part}: {result.what}: "
        f"{verdict(result)} ({name}; {most})"
    )


def table(results):
    """The results as lines of a table."""
    lines = ["", f"{'check':60}{'deviation':>12}{'tolerance':>11}{'time':>9}"]
    for result in results:
        mark = "" if result.passed else "  FAILED"
        lines.append(
            f"{f'{result.part}: {result.what}':60}{verdict(result):>12}{result.tolerance:>11.0e}"
            f"{result.seconds:>7.1f} s{mark}"
        )
    return lines


def report(config, results):
    """What check.json holds: the machine, the config and every figure, null if not finite."""
    return {
        "passed": all(r.passed for r in results),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "hosts": jax.process_count(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "numpy": np.__version__,
        "config": config.to_dict(),
        "results": [
            {
                "part": r.part,
                "what": r.what,
                "passed": r.passed,
                "tolerance": r.tolerance,
                "seconds": round(r.seconds, 2),
                "figures": {name: float(off) for name, off in r.figures.items()},
            }
            for r in results
        ],
    }


def record(config):
    """Writes the losses of a config's first twenty updates, by the plain method on one device."""
    fields = config.to_dict()
    plain = partial(make_method, plain=True)
    losses = quickstart_losses(fields, load("bundled"), plain, "highest", 1)
    files.write_json(QUICKSTART, {"config": fields, "losses": losses})


if __name__ == "__main__":
    from configs import quickstart  # which lies beside the package in a clone

    record(quickstart.get_config())
