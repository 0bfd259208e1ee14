"""The training loop with its side effects: files, clock, signals and log lines."""

import platform
import re
import time
from pathlib import Path

import jax
import numpy as np

from vnca.images import unpack
from vnca.program import Stopped, VncaError, check, checkpoint, files
from vnca.program.arithmetic import update_flops
from vnca.program.config import differences
from vnca.program.devices import first_copy, on_devices, on_host
from vnca.program.evaluate import image_bounds
from vnca.program.hosts import ask_all, is_first
from vnca.program.machine import check_batch, check_images, cores
from vnca.program.method import make_method
from vnca.program.metrics import Metrics, NotFinite, set_older_aside
from vnca.program.nans import array_not_finite, first_not_finite
from vnca.program.order import batches, deal, fixed_shuffle, fresh_images
from vnca.program.progress import duration
from vnca.program.signals import stop_signals
from vnca.program.workdir import given_params, lock, open_run
from vnca.training import init_state, make_update_call

KEEP_CHECKPOINTS = 3  # 2 with a pool, because a published pool adds 512 MiB to each
TEST_IMAGES, TEST_SAMPLES, TEST_CHUNK = 64, 4, 8  # for the quick test IWELBO during training


def train(config, workdir, log, draw, make_method=make_method, packaged=None):
    """Trains a model as the config describes, from the newest checkpoint in `workdir` or anew.

    Writes checkpoints, metrics.jsonl and pictures to `workdir`, and log lines to `log`. draw:
    model, params, up to 16 test images [≤ 16, 32, 32, 1], seed -> {name: bytes of a PNG file};
    make_method: config -> `vnca.training.Method`; packaged: kind -> (config, params, path), for
    train.start_from=packaged. Raises VncaError for errors that the user can fix: a batch that does
    not fit the devices or the training set, a workdir of another config, storage that fails, a loss
    that is not finite. A signal that stops it raises Stopped, once everything is saved.
    """
    workdir = Path(workdir)
    check_batch(config, jax.device_count())
    with lock(workdir, log):
        run = open_run(config, workdir, log)
        # Until here a signal ends the process, which has nothing to save. From here on the loop
        # checks for signals. This must start before JAX compiles, because a callback of JAX can
        # swallow an interrupt.
        with stop_signals(log) as (stop_asked, log):
            train_until(stop_asked, *run, workdir, log, draw, make_method, packaged)


def train_until(
    stop_asked, config, data, found, restore, workdir, log, draw, make_method, packaged
):
    """Trains from the state that `open_run` has found, until all updates are done or stop_asked()
    is not 0."""
    updates, per_call = config.train.updates, config.train.updates_per_call
    method, train_size = make_method(config), len(data.train)
    check_images(config, train_size)

    def begin(trained=None):
        return init_state(method, config, data.train, trained)

    state = restore(jax.eval_shape(begin)) if restore else None
    if state is None or state.update < updates:
        method = check.trusted(method, config, log)
    model = method.model
    if state is None:
        state = begin(given_params(config, model, packaged, log))
    done = saved = int(state.update)
    describe(config, data, state, log)
    if restore:
        changes = differences(found["config"], config, may_change=True)
        log("; ".join([f"resuming {found['path']} at update {done:,}", *changes]))
    keep = KEEP_CHECKPOINTS - bool(model.develop)
    if done >= updates:
        if is_first():  # the last save may have been killed before it pruned
            checkpoint.prune(found["path"], keep)
        log(f"nothing to do: train.updates is {updates:,}; raise it to train for longer")
        return

    state, images = on_devices(state, data.train)
    update_call = make_update_call(method, config)

    def whole_calls(every):
        return -(-every // per_call) * per_call  # updates, rounded up to whole device calls

    def is_due(every):
        every = whole_calls(every)
        return done == updates or done // every > before // every

    def explain(fault):
        # Repeat the updates of the call up to the faulty one, to get the state just before it.
        state, images = on_devices(previous, data.train)
        state, _ = update_call(state, images, order, np.int32(fault.update - done - 1))
        [indices] = batches(config.seed, fault.update, 1, fresh_images(config), train_size)
        # The plain method: its lines are those to name, and each operation runs on any platform.
        plain = make_method(config, plain=True)
        cause = first_not_finite(plain, config, on_host(state), data.train, indices)
        return VncaError(f"{fault}. {cause}")

    start = time.monotonic()  # a call of zero updates compiles the program, so the ETA is right
    order = deal(config, done + 1, 1, train_size)
    state, _ = jax.block_until_ready(update_call(state, images, order, np.int32(0)))
    log(f"compiled in {duration(time.monotonic() - start)}")
    if not done:
        set_older_aside(workdir / "metrics.jsonl", whole_calls(config.train.checkpoint_every), log)
    metrics = Metrics(config, workdir / "metrics.jsonl", done, log)

    asked, status = ask_all(stop_asked), 0
    while done < updates and not (status := asked()):
        asked = ask_all(stop_asked)  # several hosts exchange answers while the call below runs
        # The first call is a quarter of a call, to log a loss soon. The second is the rest of it.
        count = per_call // 4 or 1 if metrics.first else per_call - done % per_call
        before, count = done, min(count, updates - done)
        previous = config.train.debug_nans and jax.tree.map(np.array, on_host(state))
        order = deal(config, done + 1, count, train_size)
        state, values = update_call(state, images, order, np.int32(count))
        try:
            metrics.add(done + 1, count, values)
            if metrics.first or previous:  # log the first line at once, and find NaNs at once
                metrics.flush()
        except NotFinite as fault:
            if not previous:
                raise
            raise explain(fault) from fault
        done += count
        if is_due(config.eval.every):
            metrics.flush()
            with metrics.clock_stopped():
                bound = quick_bound(model, state.params, data.test, config.seed)
                metrics.add_test(done, bound, min(TEST_IMAGES, len(data.test)))
                write_pictures(model, state.params, data.test, config.seed, workdir, draw)
        if is_due(config.train.checkpoint_every):
            saved = save(workdir, state, config, metrics, keep)
    if saved < done:
        save(workdir, state, config, metrics, keep)
    if done < updates:
        log(f"stopped at update {done:,} of {updates:,}; run the same command again to resume")
        raise Stopped(status)
    log(f"done; checkpoints, metrics.jsonl and pictures are in {workdir}")


def describe(config, data, state, log):
    """Logs the devices, the data, the model and the cost of an update."""
    device, count = jax.devices()[0], jax.device_count()
    cpu_cores = f", {cores()} core{'s' * (cores() > 1)}" if device.platform == "cpu" else ""
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    params = sum(x.size for x in jax.tree.leaves(state.params))
    log(f"devices  {count} × {device.device_kind} ({platform.machine()}{cpu_cores}){hosts}")
    if config.train.dtype == "bfloat16" and lacks_bfloat16(device):
        log(f"         {device.device_kind} emulates bfloat16: float32 is as fast, and exact")
    log(f"data     {data.name}: {len(data.train):,} training, {len(data.test):,} test images")
    log(f"model    {config.model.name}: {params:,} parameters, latent {config.model.latent_size}")
    log(
        f"update   {config.train.batch_size} images, {update_flops(config) / 1e9:,.1f} GFLOP; "
        f"{config.train.updates_per_call} per device call; {config.train.updates:,} in total"
    )
    decay = config.train.decay_updates
    if decay and decay < config.train.updates:
        log(
            f"warning: from update {decay:,} on the learning rate is 0, and nothing changes: set "
            f"config.train.decay_updates={config.train.updates}, or None for a constant rate"
        )


def lacks_bfloat16(device):
    """Whether a device is a GPU of before 2020, without units for bfloat16."""
    capability = getattr(device, "compute_capability", "")  # AMD's have names, such as gfx942
    return bool(re.fullmatch(r"[0-7]\.\d+", capability)) and device.platform == "gpu"


def quick_bound(model, params, test, seed):
    """A quick estimate of the test IWELBO, in nats, from few images and samples."""
    indices = fixed_shuffle(TEST_IMAGES, len(test))
    chunk = min(TEST_CHUNK, -(-len(indices) // jax.device_count()))  # more would be padding
    parts = image_bounds(model, params, test, indices, TEST_SAMPLES, chunk, seed)
    return float(np.mean([row[0] for part in parts for row in part]))


def write_pictures(model, params, test, seed, workdir, draw):
    """Writes pictures of the model's current results, on process 0."""
    if is_first():
        images = unpack(test[fixed_shuffle(16, len(test))])
        for name, png in draw(model, first_copy(params), images, seed).items():
            files.write_bytes(workdir / f"{name}.png", png)


def save(workdir, state, config, metrics, keep):
    """Writes a checkpoint after the metrics of all its updates. Returns its update.

    Raises NotFinite if an array of the state is not finite.
    """
    metrics.flush()
    with metrics.clock_stopped():
        state = on_host(state)
        if name := array_not_finite(state):
            raise NotFinite(config, int(state.update), name)
        if is_first():
            checkpoint.save(workdir, state, config.to_dict(), keep)
    return int(state.update)
