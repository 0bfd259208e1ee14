"""The config: its fields, what they may be, and what is fitted to the machine.

A config file returns an `ml_collections.ConfigDict`; here it is checked as a whole, before any
work, so that a mistake costs a second and one line.
"""

import difflib
import math
import os

from ml_collections import ConfigDict

from vnca.program import VncaError
from vnca.program.arithmetic import (
    cell_channels,
    fresh_images,
    hidden_channels,
    update_flops,
)

SECTIONS = "data", "model", "train", "eval"

# Fields that one model has and the others do not.
MODEL_FIELDS = {
    "doubling": ("model.doublings", "model.steps_per_doubling"),
    "nondoubling": (
        "model.steps",
        "model.train_steps",
        "model.channels",
        "model.hidden",
        "model.position_waves",
        "train.pool_size",
        "train.pool_from",
        "train.damage_size",
        "train.pool_fresh",
        "train.encoder_from",
    ),
    "baseline": (),
}

# Fields that came later: what a config that was saved without them means.
LATER = {
    "eval.split": "test",
    "model.channels": None,
    "model.hidden": None,
    "model.position_waves": 0,
    "train.pool_fresh": None,
    "train.encoder_from": None,
}

OPTIONAL = (
    "data.dir",
    "model.channels",
    "model.hidden",
    "train.pool_fresh",
    "train.encoder_from",
    "train.decay_updates",
    "train.micro_batch",
    "train.updates_per_call",
    "train.checkpoint_every",
    "train.log_every",
    "eval.images",
    "eval.every",
    "eval.chunk",
)
FITTED = (
    "data.name",
    "train.micro_batch",
    "train.updates_per_call",
    "train.checkpoint_every",
    "eval.every",
)
MAY_CHANGE = (  # and all of eval: how long, how often, and what becomes of the pool from here on
    "train.updates",
    "train.pool_fresh",
    "train.log_every",
    "train.checkpoint_every",
    "train.debug_nans",
)


def count(low, high=2**31 - 1):
    """A check for whole numbers from low to high, and the words for it."""
    return int, lambda v: low <= v <= high, f"a whole number from {low:,} to {high:,}"


def positive(high, low=1e-30):
    """A check for finite numbers above 0, up to high, and the words for it."""
    # What is much smaller is 0 in float32.
    return float, lambda v: low <= v <= high, f"a number above 0, from {low:g} to {high:g}"


def one_of(*names):
    """A check for one of a few names, and the words for it."""
    return str, lambda v: v in names, "one of " + ", ".join(names)


FIELDS = {  # field: type, test, what would do
    "seed": count(0),
    "data.name": one_of("auto", "larochelle", "bundled"),
    "data.dir": (str, bool, "the name of a folder"),
    "model.name": one_of(*MODEL_FIELDS),
    "model.latent_size": count(1, 4096),
    "model.encoder_width": count(1, 512),
    "model.doublings": count(5, 8),
    "model.steps_per_doubling": count(1, 1000),
    "model.steps": count(1, 1000),
    "model.train_steps": (
        (tuple, list),
        lambda v: len(v) == 2 and all(type(n) is int for n in v) and 1 <= v[0] <= v[1] <= 1000,
        "two whole numbers, the least and the most steps in training, such as (32,63)",
    ),
    "model.channels": count(1, 4096),
    "model.hidden": count(1, 4096),
    "model.position_waves": count(0, 5),
    "train.updates": count(1),
    "train.batch_size": count(1, 60_000),
    "train.pool_size": count(1, 60_000),
    "train.pool_from": count(1),
    "train.damage_size": count(1, 32),
    "train.pool_fresh": count(1, 30_000),
    "train.encoder_from": (str, bool, "the workdir of a training run"),
    "train.learning_rate": positive(10),
    "train.warmup_updates": count(0),
    "train.decay_updates": count(1),
    "train.clip_norm": positive(1e9),
    "train.debug_nans": (bool, lambda v: True, "True or False"),
    "train.dtype": one_of("float32", "bfloat16"),
    "train.micro_batch": count(1, 60_000),
    "train.updates_per_call": count(1, 10_000),
    "train.checkpoint_every": count(1),
    "train.log_every": count(1),
    "eval.every": count(1),
    "eval.samples": count(1),
    "eval.split": one_of("test", "train"),
    "eval.images": count(1, 10_000),
    "eval.chunk": count(1, 10_000),
    "eval.precision": one_of("highest", "default"),
}


def completed(saved):
    """A saved config (nested dict) with the fields that have come since."""
    own = MODEL_FIELDS.get(saved.get("model", {}).get("name"), ())
    for field, value in LATER.items():
        section, name = field.split(".")
        of_a_model = any(field in fields for fields in MODEL_FIELDS.values())
        if section in saved and (field in own or not of_a_model):
            saved[section].setdefault(name, value)
    return saved


def flatten(config, prefix=""):
    """Nested dicts as one dict: {"train.updates": 100000, …}."""
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, (dict, ConfigDict)) and value  # an empty one is a value
        value = list(value) if isinstance(value, tuple) else value  # as JSON gives it back
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def check_known(field, value=""):
    """Raises VncaError for a field that no config has; `value` is for the message."""
    if field not in FIELDS:
        close = difflib.get_close_matches(field, FIELDS, 1)
        raise VncaError(
            f"config.{field}{value}: there is no such field; "
            + (f"did you mean config.{close[0]}?" if close else "--help lists them")
        )


def check(config):
    """Raises VncaError for the first field that is unknown, missing, mistyped or makes no sense."""
    if not isinstance(config, ConfigDict):
        raise VncaError(
            f"get_config() returned {config!r}: it must return an ml_collections.ConfigDict"
        )
    for name in SECTIONS:
        if name in config and not isinstance(config[name], ConfigDict):
            raise VncaError(f"config.{name}={config[name]!r}: it must be a section, a ConfigDict")
    flat = flatten(config)
    for field in flat:
        if field not in SECTIONS:  # one without fields, which misses its first, below
            check_known(field)
    names = {field for fields in MODEL_FIELDS.values() for field in fields}
    wanted = MODEL_FIELDS.get(str(flat.get("model.name")), names)
    for field, (kind, test, would_do) in FIELDS.items():
        if field in names and field not in wanted:
            if field in flat:
                raise VncaError(
                    f"config.{field}={flat[field]!r}: the model {flat['model.name']} has no such "
                    "field; leave it out, or start from that model's own config"
                )
            continue
        if field not in flat:
            raise VncaError(f"config.{field} is missing: it must be {would_do}")
        value = flat[field]
        if value is None and field in OPTIONAL:
            continue
        # Python counts True as an int; and a whole number will do for a rate.
        right_type = isinstance(value, (int, float) if kind is float else kind)
        if isinstance(value, bool) != (kind is bool) or not right_type or not test(value):
            raise VncaError(f"config.{field}={value!r}: it must be {would_do}")
    if config.model.name == "nondoubling":
        check_channels(config.model)
        if config.model.position_waves and config.train.damage_size == 32:
            raise VncaError(
                "config.train.damage_size=32: no cell is left to inherit from; 31 would do"
            )


def check_channels(model):
    """Raises VncaError unless a cell has channels for z, or for a logit, its position and z."""
    waves, latent = model.position_waves, model.latent_size
    least = latent + (4 * waves + 1 if waves else 0)
    if (model.channels or latent) < least:
        position = f", {4 * waves} of its position and 1 of the logit" if waves else ""
        raise VncaError(
            f"config.model.channels={model.channels}: a cell has {latent} channels of z{position}, "
            f"so they must be {least} at least"
        )


def check_batch(config, devices):
    """Raises VncaError unless the devices divide the global batch, and a pool if there is one."""
    train = config.train
    pool = train.get("pool_size")
    # Half of a pool's batch is fresh, half of the rest is damaged.
    part = 4 * devices if pool else devices
    _check_divides("train.batch_size", train.batch_size, part, devices)
    if pool:
        _check_divides("train.pool_size", pool, devices, devices)
        if train.batch_size > pool:
            raise VncaError(
                f"config.train.pool_size={pool}: it must be at least the batch, {train.batch_size}"
            )
        fresh, most = fresh_images(config), train.batch_size // 2
        _check_divides("train.pool_fresh", fresh, devices, devices)
        if train.batch_size % fresh or fresh > most:
            raise VncaError(
                f"config.train.pool_fresh={fresh}: it must divide the batch, {train.batch_size}, "
                f"and be at most half of it, {most}"
            )


def _check_divides(field, value, part, devices):
    if value % part:
        fits = sorted({max(value // part, 1) * part, -(-value // part) * part})
        raise VncaError(
            f"config.{field}={value}: it must be a multiple of {part} on {devices} "
            f"device{'s' * (devices > 1)}: {' or '.join(map(str, fits))} would do"
        )


def cores():
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def fit_to_machine(config, platform=None, devices=None):
    """Fills the fields that depend on the machine and are unset; returns a new config.

    From the arithmetic of an update, the kind of device and the number of cores, never from
    a timing, so that the same machine always gets the same program. platform ("cpu", "tpu", …) and
    the number of devices: None: as they are here.
    """
    import jax  # not above: a mistake of the command line need not wait for it

    config = config.copy_and_resolve_references()
    train, evaluation = config.train, config.eval
    on_cpu = (platform or jax.default_backend()) == "cpu"
    devices = devices or jax.device_count()
    # Rates that our programs reached or, for accelerators, exceed; FLOP/s of all devices together.
    rate = 60e9 * cores() if on_cpu else 10e12 * devices
    seconds = update_flops(config) / rate

    def updates_in(duration, at_least=1, at_most=100_000):
        return min(max(round(duration / seconds), at_least), at_most)

    def unset(section, name, value):
        if section[name] is None:
            section[name] = value

    # On a CPU 4 images of 32×32×256 fill the cache (4 MB). The baseline's arrays are smaller, and
    # each piece reads kernels of 41 MB and adds to their gradients: 16 images took 0.135 s, twice 8
    # 0.174. An accelerator wants them all.
    cached = 16 if config.model.name == "baseline" else 4
    unset(train, "micro_batch", cached if on_cpu else train.batch_size)
    # Seconds on a CPU, for a sign of life and a quick Ctrl-C; elsewhere 125, as the reproduction.
    unset(train, "updates_per_call", updates_in(3, at_most=125) if on_cpu else 125)
    # An accelerator exceeds the rate: there twenty times in a run at least.
    often = 100_000 if on_cpu else max(train.updates // 20, 1)
    unset(train, "checkpoint_every", min(updates_in(600), often))
    minute = max(updates_in(60), math.ceil(3200 / train.batch_size))
    unset(evaluation, "every", min(minute, often))
    # Five seconds of a device; but fewer than 4 images leave a CPU's core idle, and more than 16
    # leave its cache. An accelerator is taken to make 80 TFLOP/s in bfloat16, of which a product in
    # float32 takes six; there the widest array of all images should stay on the chip (32 MiB), in
    # whole tiles of 8.
    image = evaluation.samples * update_flops(config) / train.batch_size / 3  # FLOP, forward only
    products = 6 if evaluation.precision == "highest" else 1
    images = round(5 * (rate / devices if on_cpu else 80e12 / products) / image)
    channels = (
        config.model.encoder_width
        if config.model.name == "baseline"
        else max(cell_channels(config.model), hidden_channels(config.model))
    )
    cells = 4**config.model.doublings if config.model.name == "doubling" else 32 * 32
    on_chip = (32 << 20) // (4 * cells * channels)
    fitting = min(max(images, 4), 16) if on_cpu else max(min(images, on_chip) // 8 * 8, 8)
    unset(evaluation, "chunk", fitting)
    return config


def adopt(saved, config):
    """The config, with what a saved one (nested dict, or None) has settled: the data set that
    `auto` stood for, and what was fitted to the machine, wherever it is unset now."""
    config = config.copy_and_resolve_references()
    if saved:
        for field in FITTED:
            section, name = field.split(".")
            if config[section][name] in (None, "auto"):
                config[section][name] = saved[section][name]
    return config


def differences(saved, config):
    """What differs between a saved config (nested dict) and this one, and must not on resume."""
    saved, config = flatten(saved), flatten(config)
    return [
        f"config.{field} is {config.get(field)!r}, was {saved.get(field)!r}"
        for field in sorted(saved | config)
        if not (field in MAY_CHANGE or field.startswith("eval."))
        and saved.get(field) != config.get(field)
    ]
