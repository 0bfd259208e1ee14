"""The functions that the program runs: those of the plain method, or of its fast form here."""

import jax

from vnca import healing, models
from vnca.fast import cpu, gpu, tpu
from vnca.pool import init_pool, pool_gradient
from vnca.training import Method


def make_model(model_config, *nn):
    """The Model for a config's `model` section: with the plain layers, or with those of `nn`."""
    maker = healing if model_config.name == "healing" else models
    return maker.make_model(model_config, *nn)


def param_shapes(model):
    """The shapes and dtypes of a Model's parameters, as a pytree. Nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0))


def has_few_channels(model):
    """Whether an automaton has so few channels that `cpu` computes it in another form. model:
    config.model."""
    return (model.get("channels") or model.latent_size) <= cpu.MOST_CHANNELS


def is_plain(model, config):
    """Whether a Model of a config has the form that `vnca/*.py` states."""
    return model == make_method(config, plain=True).model


def make_method(config, plain=False, platform=None, device_kind=None):
    """The Method of a config: plain, as `vnca/*.py` states it, or in the fast form of a platform.

    platform ("cpu", "tpu", …) and device_kind are JAX's names; None: those of this machine.
    """
    forms = {"cpu": cpu, "gpu": gpu, "cuda": gpu, "tpu": tpu}  # lowering calls a GPU cuda
    fast = None if plain else forms.get(platform or jax.default_backend())
    if fast is tpu:
        device_kind = device_kind or jax.devices()[0].device_kind
        model = tpu.fast_model(make_model(config.model), config.model, device_kind)
    elif fast:
        model = fast.fast_model(make_model(config.model, fast), config.model)
    else:
        model = make_model(config.model)
    method = Method(model)
    if model.develop:
        is_healing = config.model.name == "healing"
        gradient = healing.healing_gradient if is_healing else pool_gradient
        method = method._replace(gradient=gradient, init_pool=init_pool)
    elif fast is cpu and config.model.name == "doubling" and has_few_channels(config.model):
        method = method._replace(gradient=cpu.batch_gradient)
    if fast in (gpu, tpu):
        method = method._replace(global_norm=fast.global_norm)
    return method
