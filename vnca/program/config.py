"""The config: its fields, what they may be, and what is fitted to the machine.

A config file returns an `ml_collections.ConfigDict`; here it is checked as a whole, before any
work, so that a mistake costs a second and one line.
"""

import difflib

from ml_collections import ConfigDict

from vnca.program import VncaError

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
