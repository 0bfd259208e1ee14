"""The Learner that the program runs: the plain functions of the method, or fast ones, as a platform
needs them."""

import hashlib
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import numpy as np

from vnca import likelihoods
from vnca.fast import cpu, gpu, tpu
from vnca.likelihoods import Likelihood
from vnca.model import SettingError, make_likelihood, make_model, settings_of
from vnca.pool import fresh_images, init_pool, pool_gradient
from vnca.program import VncaError
from vnca.program.config import FIELDS, OF_TYPE, validate_value
from vnca.training import Learner, computed_in, init_state


def listed_likelihoods():
    """The names of the likelihoods: of the functions in vnca/likelihoods.py that return one."""
    return [
        name
        for name, value in vars(likelihoods).items()
        if getattr(value, "__annotations__", {}).get("return") is Likelihood
    ]


def own_fields(model):
    """The fields of a config that a model does not share with all others, which are arguments of
    its `make`: {name: their Values, or None if their type is none that the program knows}."""
    make = import_module(f"vnca.models.{model}").make
    return {f"model.{name}": OF_TYPE.get(kind) for name, kind in settings_of(make).items()}


def validate_model(config):
    """Raises VncaError for the first field of a config's `model` section that its model does not
    have, lacks or refuses, and for a pool that its model cannot have.

    The model's file has to be imported to know its fields. What is wrong in the file itself keeps
    its traceback, for the file's author.
    """
    settings = config.model
    if settings.likelihood not in listed_likelihoods():
        raise VncaError(
            f"config.model.likelihood={settings.likelihood!r}: it must be one of "
            f"{', '.join(listed_likelihoods())}"
        )
    shared = [f"model.{name}" for name in settings_of(getattr(likelihoods, settings.likelihood))]
    own = own_fields(settings.name)
    flat = {f"model.{name}": value for name, value in settings.items()}
    for name, value in flat.items():
        if name not in {"model.name", "model.likelihood", *shared, *own}:
            raise VncaError(
                f"config.{name}={value!r}: the model {settings.name} has no such field; its own "
                f"are {', '.join(own)}"
            )
    for name in (*shared, *own):
        if name not in flat:
            values = (FIELDS | own).get(name)
            words = f", and it must be {values.words}" if values else ""
            raise VncaError(f"config.{name} is missing: the model {settings.name} has it{words}")
    for name, values in own.items():
        if values:
            validate_value(name, flat[name], values)
    try:
        model = make_model(settings)
        z = jax.ShapeDtypeStruct((1, model.latent_size), np.float32)
        # What a model refuses in training, for example a dtype. Nothing is computed.
        jax.eval_shape(computed_in(model, config.train.dtype).decode, param_shapes(model), z)
    except SettingError as fault:
        needs = ""
        if "mixtures" in settings:
            outputs = make_likelihood(settings).outputs
            needs = f" (model.mixtures={settings.mixtures} needs {outputs} of them)"
        raise VncaError(f"config.model.{fault}{needs}") from fault
    if config.train.pool_size and not model.develop:
        raise VncaError(
            f"config.train.pool_size={config.train.pool_size}: it must be 0, since the model "
            f"{settings.name} has no grid of fixed size"
        )


def source_sha256(name):
    """The SHA-256 of a model's file in vnca/models/, as 64 hexadecimal digits."""
    path = import_module(f"vnca.models.{name}").__file__
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def method_sha256():
    """The SHA-256 of all files that a model's numbers may depend on, those of the method and its
    fast forms, as 64 hexadecimal digits."""
    folder, digest = Path(likelihoods.__file__).parent, hashlib.sha256()
    for pattern in ("*.py", "models/*.py", "fast/*.py"):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def param_shapes(model):
    """The shapes and dtypes of a Model's parameters, as a pytree. Nothing is computed."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0)))


def stored_shapes(model, *counts):
    """The shape and dtype of so many images, as they are stored: uint8 [*counts, stored_bytes]."""
    return jax.ShapeDtypeStruct((*counts, model.likelihood.stored_bytes), np.uint8)


def update_shapes(learner, config, images, devices):
    """The shapes and dtypes of the arguments of `training.one_update` on each device: the state
    with the device's share of the pool, so many training images, and the indices of its fresh
    ones."""
    shape = jax.ShapeDtypeStruct
    stored = stored_shapes(learner.model, images)
    state = jax.eval_shape(partial(init_state, learner, config), stored)
    pool = jax.tree.map(lambda x: shape((len(x) // devices, *x.shape[1:]), x.dtype), state.pool)
    indices = shape((fresh_images(config) // devices,), np.int32)
    return state._replace(pool=pool), stored, indices


def is_plain(model, config):
    """Whether a Model of a config has the form that the files of the method state."""
    return model == make_model(config.model)


def make_learner(config, plain=False, platform=None, device_kind=None):
    """The Learner of a config: plain, as the files of the method state it, or in the fast form of a
    platform.

    platform ("cpu", "tpu", …) and device_kind are JAX's names; None: those of this machine.
    """
    settings = config.model
    forms = {"cpu": cpu, "gpu": gpu, "cuda": gpu, "tpu": tpu}  # lowering calls a GPU cuda
    fast = None if plain else forms.get(platform or jax.default_backend())
    if fast is tpu:
        device_kind = device_kind or jax.devices()[0].device_kind
        model = tpu.fast_model(make_model(settings), settings, device_kind)
    elif fast:
        model = fast.fast_model(make_model(settings, fast), settings)
    else:
        model = make_model(settings)
    learner = Learner(model)
    if config.train.pool_size:
        learner = learner._replace(gradient=pool_gradient, init_pool=init_pool)
    elif fast is cpu and settings.name == "doubling" and cpu.has_few_channels(model):
        learner = learner._replace(gradient=cpu.batch_gradient)
    if fast in (gpu, tpu):
        learner = learner._replace(global_norm=fast.global_norm)
    return learner
