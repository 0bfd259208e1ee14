"""The config: one table of its fields, and the checks that are made before any work.

A config file returns an `ml_collections.ConfigDict`. Every field is checked before JAX starts, so
that a user error costs a second and prints one line. `vnca.program.machine` then checks the batch
and the pool against the devices and the data.
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vnca.program import VncaError
from vnca.program.own import MOST

SECTIONS = "data", "model", "train", "eval"
KINDS = "doubling", "nondoubling", "baseline"  # the published models
MODELS = *KINDS, "healing"
POOL = "nondoubling", "healing"  # the models that train with a pool
ABSENT = object()


class Values(NamedTuple):
    """The values that a field may have."""

    type: type | tuple[type, ...]
    test: Callable[[Any], bool]  # of a value that has the type
    words: str  # the same, for a message: "it must be …"


class Field(NamedTuple):
    """One field of the config."""

    name: str  # its section and its name, or its name alone
    values: Values
    meaning: str  # for --help
    models: tuple[str, ...] = MODELS  # the models that have the field
    optional: bool = False  # it may be None, which means unset
    fitted: bool = False  # if unset, the first start chooses a value, and later starts keep it
    may_change: bool = False  # a resumed run may have another value
    default: Any = ABSENT  # the value in a config that was saved before the field existed


def count(low, high=2**31 - 1):
    """Whole numbers from low to high."""
    return Values(int, lambda v: low <= v <= high, f"a whole number from {low:,} to {high:,}")


def positive(high):
    """Numbers from 1e-30 to high. A much smaller one would be 0 in float32."""
    return Values(float, lambda v: 1e-30 <= v <= high, f"a number from 1e-30 to {high:g}")


def one_of(*names):
    """A few names."""
    return Values(str, lambda v: v in names, f"one of {', '.join(names)}")


def text(words):
    """Any text but the empty one."""
    return Values(str, bool, words)


STEP_RANGE = Values(
    (tuple, list),
    lambda v: len(v) == 2 and all(type(n) is int for n in v) and 1 <= v[0] <= v[1] <= 1000,
    "two whole numbers, the smallest and the largest number of steps, such as (32,63)",
)
FLAG = Values(bool, lambda v: True, "True or False")

FIELDS = (
    Field("seed", count(0), "seed of the initial weights, the data order and all noise"),
    Field("data.name", one_of("auto", "larochelle", "bundled", "own"),
          "the data set; auto: larochelle if it is available, else bundled, with a warning",
          fitted=True),
    Field("data.dir", text("the name of a folder or a file"),
          "larochelle: an .npz file, or a folder with it or with the .amat files (unset: they are "
          "downloaded); own: an .npz file with train and test, and if you like train_labels and "
          "test_labels, or a folder with it or with IDX files",
          optional=True, may_change=True),
    Field("model.name", one_of(*MODELS),
          "a published model, or healing, a variant of nondoubling that heals at small size"),
    Field("model.latent_size", count(1, 4096),
          "size of z, and in doubling and nondoubling the channels of every cell"),
    Field("model.encoder_width", count(1, 512),
          "channels of the encoder's first layer; each later layer has twice as many"),
    Field("model.doublings", count(5, 8), "doublings of the grid; 5 give 32×32 cells",
          ("doubling",)),
    Field("model.steps_per_doubling", count(1, 1000), "NCA steps after each doubling",
          ("doubling",)),
    Field("model.steps", count(1, 1000), "NCA steps in evaluation", POOL),
    Field("model.train_steps", STEP_RANGE,
          "NCA steps in training, drawn anew for each update; both ends are included", POOL),
    Field("model.channels", count(1, 4096),
          "channels of every cell: a logit, others that steps change, its position and z",
          ("healing",)),
    Field("model.hidden", count(1, 4096), "channels of an NCA step's hidden layer", ("healing",)),
    Field("model.position_waves", count(1, 5),
          "frequencies that encode a cell's position, each in 4 channels", ("healing",)),
    Field("train.updates", count(1), "updates in the whole run", may_change=True),
    Field("train.batch_size", count(1, MOST), "images in an update, over all devices"),
    Field("train.pool_size", count(1, MOST),
          "images that the pool holds with their cells, over all devices", POOL),
    Field("train.damage_size", count(1, 32),
          "side of the square of cells that damage sets to zero", POOL),
    Field("train.pool_from", count(1), "the first update that takes cells from the pool",
          ("healing",)),
    Field("train.pool_fresh", count(1, MOST // 2),
          "images in a batch that do not come from the pool; unset: half of the batch",
          ("healing",), optional=True, may_change=True, default=None),
    Field("train.encoder_from", text("the workdir of a training run, a checkpoint, or packaged"),
          "the run whose encoder is taken and kept as it is; packaged: the packaged model's; "
          "unset: the encoder is trained",
          ("healing",), optional=True, default=None),
    Field("train.start_from", text("the workdir of a training run, a checkpoint, or packaged"),
          "the run whose parameters this one starts from; packaged: the packaged model's; unset: "
          "random ones",
          optional=True, default=None),
    Field("train.learning_rate", positive(10), "Adam's learning rate after the warm-up"),
    Field("train.warmup_updates", count(0), "updates in which the learning rate rises linearly"),
    Field("train.decay_updates", count(1),
          "update at which a cosine decay of the learning rate ends at 0; unset: a constant rate",
          optional=True, may_change=True),
    Field("train.clip_norm", positive(1e9), "largest norm of the gradient that reaches Adam"),
    Field("train.debug_nans", FLAG,
          "whether to name the operation that made the first NaN or infinity; slow",
          may_change=True),
    Field("train.dtype", one_of("float32", "bfloat16"), "dtype in which the layers compute"),
    Field("train.micro_batch", count(1, MOST),
          "largest micro-batch of a device, in images; unset: fitted to the machine",
          optional=True, fitted=True),
    Field("train.updates_per_call", count(1, 10_000),
          "updates in one device call; unset: fitted to the machine",
          optional=True, fitted=True),
    Field("train.checkpoint_every", count(1),
          "updates between checkpoints, rounded up to whole device calls; unset: ten minutes, on "
          "accelerators at most a twentieth of the run",
          optional=True, fitted=True, may_change=True),
    Field("train.log_every", count(1),
          "updates between printed lines, rounded up to whole device calls; unset: one line in 5 s "
          "(accelerators: in 1,000 updates)",
          optional=True, may_change=True),
    Field("eval.every", count(1),
          "updates between quick test IWELBOs and pictures, rounded up to whole device calls; "
          "unset: fitted to the machine",
          optional=True, fitted=True, may_change=True),
    Field("eval.samples", count(1), "importance samples in evaluation and study",
          may_change=True),
    Field("eval.split", one_of("test", "train"),
          "the images of --mode=evaluate; train shows how far the model overfits",
          may_change=True, default="test"),
    Field("eval.images", count(1, MOST),
          "evaluate only the first images of a fixed shuffle; unset: all (study: 1,000 at most)",
          optional=True, may_change=True),
    Field("eval.chunk", count(1, 10_000),
          "images that a device evaluates at once; unset: fitted to the machine",
          optional=True, may_change=True),
    Field("eval.precision", one_of("highest", "default"),
          "precision of products on accelerators: \"highest\" is float32; with \"default\" a TPU "
          "multiplies in bfloat16, and a GPU in TF32",
          may_change=True),
)  # fmt: skip
FIELDS = {field.name: field for field in FIELDS}


def kind_of(name):
    """The published model that a model is, or that healing extends."""
    return "nondoubling" if name == "healing" else name


def flatten(config, prefix=""):
    """Nested dicts as one dict: {"train.updates": 100000, …}."""
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, (dict, ConfigDict)) and value  # an empty one is a value
        value = list(value) if isinstance(value, tuple) else value  # as JSON gives it back
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def check_known(name, value=""):
    """Raises VncaError for a field that no config has; `value` is for the message."""
    if name not in FIELDS:
        close = difflib.get_close_matches(name, FIELDS, 1)
        remedy = f"did you mean config.{close[0]}?" if close else "--help lists the fields"
        raise VncaError(f"config.{name}{value}: there is no such field; {remedy}")


def check(config):
    """Raises VncaError for the first field that is unknown, missing or has a wrong value."""
    if not isinstance(config, ConfigDict):
        raise VncaError(
            f"get_config() returned {config!r}: it must return an ml_collections.ConfigDict"
        )
    for name in SECTIONS:
        if name in config and not isinstance(config[name], ConfigDict):
            raise VncaError(f"config.{name}={config[name]!r}: it must be a section, a ConfigDict")
    flat = flatten(config)
    for name in flat:
        if name not in SECTIONS:  # an empty section lacks its first field, which is found below
            check_known(name)
    model = str(flat.get("model.name"))
    for field in FIELDS.values():
        if model in MODELS and model not in field.models:
            if field.name in flat:
                raise VncaError(
                    f"config.{field.name}={flat[field.name]!r}: the model {model} has no such "
                    f"field; leave it out, or use the model {' or '.join(field.models)}"
                )
            continue
        if field.name not in flat:
            raise VncaError(f"config.{field.name} is missing: it must be {field.values.words}")
        check_value(field, flat[field.name])
    if model == "healing":
        check_healing(config)
    is_mnist = config.data.name != "own"  # the size of one's own test set is known once it is read
    if is_mnist and (config.eval.images or 0) > 10_000 and config.eval.split == "test":
        raise VncaError(
            f"config.eval.images={config.eval.images}: the test set has 10,000 images; "
            "eval.split=train has 60,000"
        )


def check_value(field, value):
    """Raises VncaError for a value that the field may not have."""
    if value is None and field.optional:
        return
    kind, test, words = field.values
    # Python counts True as an int, and a whole number may stand for a float.
    right_type = isinstance(value, (int, float) if kind is float else kind)
    if isinstance(value, bool) != (kind is bool) or not right_type or not test(value):
        raise VncaError(f"config.{field.name}={value!r}: it must be {words}")


def check_healing(config):
    """Raises VncaError where cells lack channels, or damage leaves none to inherit from."""
    model = config.model
    position = 4 * model.position_waves
    least = 1 + position + model.latent_size
    if model.channels < least:
        raise VncaError(
            f"config.model.channels={model.channels}: it must be at least {least}, 1 for the "
            f"logit, {position} for the position and {model.latent_size} for z"
        )
    if config.train.damage_size == 32:
        raise VncaError(
            "config.train.damage_size=32: it must leave a cell to inherit from, so at most 31"
        )


def complete(saved):
    """Brings a saved config, a nested dict, up to date in place, and returns it.

    Raises VncaError if this version cannot use it.
    """
    model = saved.get("model", {})
    if model.get("name") == "nondoubling":
        separate_healing(model, saved.get("train", {}))
    for field in FIELDS.values():
        section, _, name = field.name.rpartition(".")
        if field.default is not ABSENT and section in saved and model.get("name") in field.models:
            saved[section].setdefault(name, field.default)
    try:
        data = saved.get("data")
        if not isinstance(data, dict):
            raise VncaError("config.data: it must be a section")
        # The program adds data.sha256 to the config of a run on one's own images.
        if not isinstance(data.get("sha256", ""), str):
            raise VncaError(f"config.data.sha256={data['sha256']!r}: it must be a text")
        given = {name: value for name, value in data.items() if name != "sha256"}
        check(ConfigDict(saved | {"data": given}))
    except VncaError as fault:
        raise VncaError(
            f"this version cannot use its config ({fault}): use the version that made it"
        ) from fault
    return saved


def separate_healing(model, train):
    """Renames a saved nondoubling model with positions, or takes healing's fields from it.

    Older versions had one model for both, and wrote healing's fields with values that changed
    nothing into every nondoubling config. Raises VncaError if one of them has an effect.
    """
    if model.get("position_waves"):
        model["name"] = "healing"
        model["hidden"] = model.get("hidden") or model["channels"]
        return
    latent = model.get("latent_size")
    for section, name, neutral in (
        (model, "channels", latent),
        (model, "hidden", latent),
        (model, "position_waves", 0),
        (train, "pool_from", 1),
        (train, "pool_fresh", train.get("batch_size", 0) // 2),
        (train, "encoder_from", None),
    ):
        value = section.pop(name, None)
        if value not in (None, neutral):
            raise VncaError(
                f"it was saved with {name}={value!r} for the model nondoubling, which only the "
                "model healing has now: use the version that made it"
            )


def adopt(saved, config):
    """The config with the values that the first start of a run chose, from its saved config (nested
    dict, or None): data.name if it is auto, and unset fields that are fitted to the machine."""
    config = config.copy_and_resolve_references()
    for field in FIELDS.values():
        if saved and field.fitted:
            section, name = field.name.split(".")
            brought = name == "name" and config.data.dir  # auto then means larochelle
            if config[section][name] in (None, "auto") and not brought:
                config[section][name] = saved[section][name]
    return config


def differences(saved, config, may_change=False):
    """Words for the fields that differ from a saved config (nested dict): those that a resumed run
    must not change, or with may_change those of config.train that it may. If the models differ,
    only the name."""
    saved, config = flatten(saved), flatten(config)
    if saved["model.name"] != config["model.name"]:
        saved, config = ({"model.name": c["model.name"]} for c in (saved, config))
    free = {field.name for field in FIELDS.values() if field.may_change}
    free_in_training = {name for name in free if name.startswith("train.")}
    return [
        f"config.{name} is {config.get(name)!r}, was {saved.get(name)!r}"
        for name in sorted(free_in_training if may_change else (saved | config).keys() - free)
        if saved.get(name) != config.get(name)
    ]
