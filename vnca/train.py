"""The training loop and its edge: files, clock, signals and the lines for a person."""

import contextlib
import json
import os
import platform
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vnca import VncaError, checkpoint, pictures
from vnca.config import check_batch, cores
from vnca.data import unpack
from vnca.devices import any_process, first_copy, gather, is_first, local_rows
from vnca.evaluate import shuffled, test_iwelbo
from vnca.models import grown, make_model, regrowth
from vnca.noise import prior_samples
from vnca.run import duration, held, settle, stop_signals
from vnca.summary import update_flops
from vnca.update import (
    METRICS,
    batches,
    first_not_finite,
    init_pool,
    init_state,
    make_update_call,
    split_pool,
)

KEEP_CHECKPOINTS = 3  # 2 with a pool: as published each holds 512 MiB of cells
TEST_IMAGES, TEST_SAMPLES, TEST_CHUNK = 64, 4, 8  # of the quick test IWELBO while training


def train(config, workdir, log):
    """Trains as the config says, from the newest checkpoint in `workdir` or anew.

    Writes checkpoints, metrics.jsonl and pictures there; `log` gets each line for a person.
    Raises VncaError for what the user can mend: a batch that the devices do not divide, the
    workdir of another config, storage that fails, a loss that is not finite.
    """
    workdir = Path(workdir)
    check_batch(config, jax.device_count())
    with held(workdir, log):
        config, data, path, restore = settle(config, workdir, log)
        # From here on a signal is a question to the loop; before, it ends the process, which has
        # nothing to save. Not later: while JAX compiles, a callback can swallow an interrupt.
        with stop_signals(log) as stop_asked:
            run(config, data, path, restore, workdir, log, stop_asked)


def run(config, data, path, restore, workdir, log, stop_asked):
    """The training of `train`, on what `settle` has found, until it is done or asked to stop."""
    batch, updates, per_call = (
        config.train[name] for name in ("batch_size", "updates", "updates_per_call")
    )
    model = make_model(config.model)
    fresh = batch // 2 if model.develop else batch  # images of an update that are not the pool's

    def begin():
        state = init_state(model, config.seed)
        if model.develop:
            state["pool"] = init_pool(model, config, state["params"], data.train)
        return state

    state = restore(jax.eval_shape(begin)) if restore else begin()
    done = saved = int(state["update"])
    describe(config, data, state, log)
    if restore:
        log(f"resuming {path} at update {done:,}")
    keep = KEEP_CHECKPOINTS - bool(model.develop)
    if done >= updates:
        if is_first():
            checkpoint.prune(path, keep)  # the last save may have been killed before it did
        log(f"nothing to do: train.updates is {updates:,}")
        return

    state, images = on_devices(state, data.train)
    update_call = make_update_call(model, config, jax.device_count())

    def is_due(every):
        every = -(-every // per_call) * per_call  # in whole calls: none can be cut short
        return done == updates or done // every > before // every

    def explained(fault):
        # The state just before it: the same updates again, from the one that was kept.
        again, images = on_devices(kept, data.train)
        count = np.int32(fault.update - done - 1)
        again, _ = update_call(again, images, order[local_rows()], count)
        [numbers] = batches(config.seed, fault.update, 1, fresh, len(data.train))
        where = first_not_finite(model, config, on_host(again), data.train, numbers)
        return VncaError(f"{fault}. {where}")

    began = time.monotonic()  # a call of no updates compiles the program: the ETA is honest
    order = np.zeros((jax.local_device_count(), per_call, fresh // jax.device_count()), np.int32)
    state, _ = jax.block_until_ready(update_call(state, images, order, np.int32(0)))
    log(f"compiled in {duration(time.monotonic() - began)}")
    metrics = Metrics(config, workdir / "metrics.jsonl", done, log)

    while done < updates and not any_process(stop_asked()):
        # The first call is a quarter, for a line with a loss soon; the second makes it whole.
        count = per_call // 4 or 1 if metrics.first else per_call - done % per_call
        before, count = done, min(count, updates - done)
        kept = config.train.debug_nans and jax.tree.map(np.array, on_host(state))
        order = batches(config.seed, done + 1, count, fresh, len(data.train))
        order = np.pad(order, ((0, per_call - count), (0, 0)))  # the same shape for a short one
        order = order.reshape(per_call, jax.device_count(), -1).swapaxes(0, 1)
        state, values = update_call(state, images, order[local_rows()], np.int32(count))
        try:
            metrics.add(done + 1, count, values)
            if metrics.first or kept:  # a line as soon as there can be one
                metrics.flush()
        except NotFinite as fault:
            if not kept:
                raise
            raise explained(fault) from fault
        done += count
        if is_due(config.eval.every):
            metrics.flush()
            metrics.add_test(done, look(model, state["params"], data, config.seed, workdir))
        if is_due(config.train.checkpoint_every):
            saved = save(workdir, state, config, metrics, keep)
    if saved < done:
        save(workdir, state, config, metrics, keep)
    if done < updates:
        log(f"stopped at update {done:,} of {updates:,}; the same command goes on from there")
    else:
        log(f"done; checkpoints, metrics.jsonl and pictures are in {workdir}")


def on_devices(state, images):
    """State and images on this process's devices: whole on each, except a pool, split over all."""
    mesh = Mesh(jax.local_devices(), "devices")  # just as pmap makes it, or the call compiles twice
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("devices",)))

    def share(x):
        return np.asarray(x).reshape(jax.device_count(), -1, *x.shape[1:])[local_rows()]

    rest, pool = split_pool(state)
    pool = jax.device_put(jax.tree.map(share, pool), split)
    return jax.device_put(rest, whole) | pool, jax.device_put(images, whole)


def on_host(state):
    """The state as host arrays, the pool of all devices whole; every process must ask for it."""
    rest, pool = split_pool(state)
    pool = jax.tree.map(lambda x: gather(x).reshape(-1, *x.shape[2:]), pool)
    return jax.device_get(first_copy(rest)) | pool


def describe(config, data, state, log):
    """The first lines: devices, data, model, and what one update costs."""
    device, count = jax.devices()[0], jax.device_count()
    of_cpu = f", {cores()} cores" if device.platform == "cpu" else ""
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    params = sum(x.size for x in jax.tree.leaves(state["params"]))
    log(f"devices  {count} × {device.device_kind} ({platform.machine()}{of_cpu}){hosts}")
    log(f"data     {data.name}: {len(data.train):,} training, {len(data.test):,} test images")
    log(f"model    {config.model.name}: {params:,} parameters, latent {config.model.latent_size}")
    log(
        f"update   {config.train.batch_size} images, {update_flops(config) / 1e9:,.1f} GFLOP; "
        f"{config.train.updates_per_call} in a device call; {config.train.updates:,} in all"
    )


def look(model, params, data, seed, workdir):
    """A quick test IWELBO (nats), and pictures of what the model does now."""
    numbers = shuffled(TEST_IMAGES)
    chunk = min(TEST_CHUNK, -(-TEST_IMAGES // jax.device_count()))  # the rest would be padding
    parts = test_iwelbo(model, params, data.test, numbers, TEST_SAMPLES, chunk, seed)
    estimate = float(np.mean([row[0] for part in parts for row in part]))
    if is_first():
        params = first_copy(params)
        x = unpack(data.test[numbers[:16]])
        prior = prior_samples(seed, 32, model.latent_size)
        logits, stages, recovery = _imagine(model, params, x, prior)
        drawings = {
            "samples": pictures.samples(logits[:32]),
            "reconstructions": pictures.reconstructions(x, logits[32:]),
        }
        if stages:
            drawings["growth"] = pictures.growth([stage[:, 0] for stage in stages])
        if recovery:
            drawings["recovery"] = pictures.growth(jnp.stack(recovery, axis=1))
        for name, drawing in drawings.items():
            checkpoint.write(workdir / f"{name}.png", lambda file, png=drawing: file.write(png))
    return estimate


@partial(jax.jit, static_argnums=0)
def _imagine(model, params, x, prior):
    """Logits of prior samples and of reconstructions (from the mean of q); one sample's growth;
    and grown digits of which a quarter is lost: before, damaged, and after more and more steps."""
    mean, _ = model.encode(params, x)
    logits = model.decode(params, jnp.concatenate([prior, mean]))
    stages = model.grow(params, prior[:1]) if model.grow else []
    recovery = []
    if model.develop:
        recovery = [s[..., :1] for s in regrowth(model, params, grown(model, params, x[:8]))]
    return logits, stages, recovery


def save(workdir, state, config, metrics, keep):
    """A checkpoint, once everything that it holds is in the metrics; returns its update."""
    metrics.flush()
    state = on_host(state)
    if is_first():
        checkpoint.save(workdir, state, config.to_dict(), keep)
    return int(state["update"])


class NotFinite(VncaError):
    """A loss term or gradient that is not finite, in update number `update`."""

    def __init__(self, message, update):
        super().__init__(message)
        self.update = update


class Metrics:
    """metrics.jsonl, and the lines for a person.

    A call's values are fetched when the next call has begun, so that no device waits for the host.
    Only process 0 writes; every process finds a value that is not finite.
    """

    def __init__(self, config, path, done, log):
        self.config, self.path, self.log = config, path, log
        self.waiting = None  # first update, count, values of the call that is running
        self.lines, self.recent = [], []  # to be written; of the next line for a person
        self.since, self.shown, self.first = time.monotonic(), done, True
        if is_first():
            checkpoint.clean(path.parent)
            kept = _records(path, done)
            checkpoint.write(path, lambda file: file.writelines(kept))

    def add(self, first, count, values):
        """Takes the values, [K, 4] on the devices, of updates first, …, first + count − 1."""
        waiting, self.waiting = self.waiting, (first, count, values)
        if waiting:
            self._fetch(*waiting)

    def add_test(self, update, value):
        self._put({"update": update, "test_iwelbo": value})
        self.log(f"update {update:,}  quick test IWELBO {value:.2f} nats ({TEST_IMAGES} images)")

    def flush(self):
        """Fetches what is left, and returns with every record on the disk."""
        waiting, self.waiting = self.waiting, None
        if waiting:
            self._fetch(*waiting)
        self._write(sync=True)

    def _put(self, record):
        self.lines.append(json.dumps(record).encode() + b"\n")

    def _fetch(self, first, count, values):
        for update, row in enumerate(np.asarray(values)[:count].tolist(), first):
            if not np.all(np.isfinite(row)):
                self._write()
                named = ", ".join(f"{n} {v:.4g}" for n, v in zip(METRICS, row, strict=True))
                raise NotFinite(
                    f"update {update:,} is not finite ({named}); any checkpoint is from before it. "
                    f"A lower config.train.learning_rate than {self.config.train.learning_rate:g} "
                    "may do, in a new --workdir; --config.train.debug_nans=True names the "
                    "operation that made it",
                    update,
                )
            self._put({"update": update} | dict(zip(METRICS, row, strict=True)))
            self.recent.append(row)
        self._write()
        self._show(first + count - 1)

    def _write(self, sync=False):
        lines, self.lines = self.lines, []
        if not is_first():
            return
        try:
            with open(self.path, "ab") as file:
                file.writelines(lines)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as fault:
            raise VncaError(f"cannot write {self.path}: {fault.strerror}; make room") from fault

    def _show(self, done):
        """A line every `log_every` updates, or, where that is unset, every few seconds."""
        train, seconds = self.config.train, time.monotonic() - self.since
        every, updates = train.log_every, train.updates
        if every is None and jax.default_backend() != "cpu":
            every = 1000
        due = done // every > self.shown // every if every else seconds >= 5
        if not (due or self.first or done == updates):
            return
        loss, reconstruction, kl, _ = np.mean(self.recent, axis=0)
        clipped = np.mean([norm > train.clip_norm for *_, norm in self.recent])
        clipped = f"  {clipped:.0%} clipped" if clipped else ""
        rate = (done - self.shown) / seconds
        self.log(
            f"update {done:,}/{updates:,}  loss {loss:.2f} = {reconstruction:.2f} "
            f"reconstruction + {kl:.2f} KL{clipped}  {rate:.3g} updates/s  "
            f"{rate * train.batch_size:,.3g} images/s  ETA {duration((updates - done) / rate)}"
        )
        self.recent, self.since, self.shown, self.first = [], time.monotonic(), done, False


def _records(path, done):
    """The lines of metrics.jsonl, bytes, up to update `done`: without those that a kill has cut
    off or a loss of power has spoilt, which come after it."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as fault:
        raise VncaError(f"cannot read {path}: {fault.strerror}; mend it or move it away") from fault

    def is_whole(line):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a name with one bit off
            return line.endswith(b"}\n") and json.loads(line)["update"] <= done

    return [line for line in lines if is_whole(line)]
