"""The functions that the program runs: those of the plain method, or of its fast form here."""

import jax

from vnca import healing, layers, models
from vnca.fast import cpu, gpu, tpu
from vnca.optimizer import global_norm
from vnca.pool import init_pool, pool_gradient
from vnca.training import Method


def make_model(model_config, nn=layers):
    """The Model for a config's `model` section, with the plain layers unless `nn` has others."""
    maker = healing if model_config.name == "healing" else models
    return maker.make_model(model_config, nn)


def param_shapes(model):
    """The shapes and dtypes of a Model's parameters, of which nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0))


def is_plain(model, config):
    """Whether a Model of a config has the form that `vnca/*.py` states."""
    return model == make_method(config, plain=True).model


def make_method(config, plain=False, platform=None, device_kind=None):
    """The Method of a config: plain, as `vnca/*.py` states it, or in the fast form of a platform.

    platform ("cpu", "tpu", …) and device_kind are JAX's names; None: those of this machine.
    """
    platform = None if plain else platform or jax.default_backend()
    platform = "gpu" if platform == "cuda" else platform  # "cuda": in lowering
    model = make_model(config.model, {"cpu": cpu, "gpu": gpu}.get(platform, layers))
    norm = {"gpu": gpu.global_norm, "tpu": tpu.global_norm}.get(platform, global_norm)
    if platform == "cpu":
        model = cpu.fast_model(model, config.model)
    if platform == "gpu":
        model = gpu.fast_model(model, config.model)
    if platform == "tpu":
        kind = device_kind or jax.devices()[0].device_kind
        model = tpu.fast_model(model, config.model, kind)
    if config.model.name == "nondoubling":
        return Method(model, pool_gradient, init_pool, norm)
    if config.model.name == "healing":
        return Method(model, healing.healing_gradient, init_pool, norm)
    if platform == "cpu" and cpu.is_narrow_doubling(config.model):
        return Method(model, cpu.batch_gradient, global_norm=norm)
    return Method(model, global_norm=norm)
