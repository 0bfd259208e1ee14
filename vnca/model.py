"""What a model is, its encoder, and how automata take steps.

Each model is a file of vnca/models/, whose name `config.model.name` gives. The published ones are
doubling.py, nondoubling.py and baseline.py. A file has a function

    make(nn, likelihood, **settings) -> Model

Its arguments after `likelihood` are the model's own fields in the config's `model` section,
annotated with their types. If a setting cannot work, `make` raises SettingError.

Parameters are always made by `vnca.layers`. A model computes with `nn`, which is `vnca.layers` or a
faster module with its functions `conv`, `conv_transpose`, `linear` and `elu`.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import signature
from itertools import pairwise
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from vnca import layers, likelihoods
from vnca.likelihoods import Likelihood


class Model(NamedTuple):
    """A VAE as pure functions. `params` is {"encoder": …, "decoder": …}, a pytree of float32.

    latent_size: the size of z
    likelihood: p(x|z) of images x [B, H, W, colours], given their logits [B, H, W, outputs]
    init:   key -> params
    encode: params, x -> mean, logvar of q(z|x), each [B, latent]
    decode: params, z [B, latent] -> logits
    grow:   params, z, channels=outputs -> the grids of all steps, as a list with one array for
            each grid size n: [1 + k, B, n, n, channels] if k steps are taken at that size. It has
            the first `channels` channels of each cell (None: all), and these begin with the logits.
            The baseline has no `grow`.

    Only models on a grid of fixed size have the other fields:

    steps:         the number of steps that `decode` takes
    train_steps:   the least and the largest number of steps in training
    max_steps:     the largest number of steps that `develop` can take
    initial_cells: z -> cells [B, H, W, C] before the first step
    step:          params, cells -> cells after one step
    develop:       params, cells, T -> cells after T steps, differentiable. T is at most max_steps.
                   A larger T raises ValueError if it is known at trace time; if it is traced,
                   max_steps steps are taken.
    """

    latent_size: int
    likelihood: Likelihood
    init: Callable
    encode: Callable
    decode: Callable
    grow: Callable | None = None
    steps: int | None = None
    train_steps: tuple | None = None
    max_steps: int | None = None
    initial_cells: Callable | None = None
    step: Callable | None = None
    develop: Callable | None = None


class SettingError(ValueError):
    """A setting that a model cannot have. Its message begins with "NAME=VALUE: "."""


def settings_of(function):
    """The settings that a likelihood, or `make` of a model, takes: {name: its type}."""
    parameters = signature(function).parameters
    return {
        name: parameter.annotation
        for name, parameter in parameters.items()
        if name not in ("nn", "likelihood")
    }


def make_likelihood(settings):
    """The Likelihood of a config's `model` section."""
    make = getattr(likelihoods, settings["likelihood"])
    return make(*(settings[name] for name in settings_of(make)))


def make_model(settings, nn=layers):
    """The Model of a config's `model` section: what `make` of its file returns. Raises SettingError
    for a setting that the model cannot have."""
    make = import_module(f"vnca.models.{settings['name']}").make
    # In the order of `make`'s arguments, so that its `lru_cache` returns the same object for equal
    # settings.
    own = [settings[name] for name in settings_of(make)]
    own = [tuple(value) if isinstance(value, list) else value for value in own]
    return make(nn, make_likelihood(settings), *own)


# ---- Encoder ------------------------------------------------------------------------------------


def encoder_init(key, likelihood, width, latent_size):
    """Five 5×5 convolutions with colours→width→…→16·width channels reduce rows and columns to a
    16th: 32×32 pixels become 2×2 cells. A linear map turns these into 2·latent numbers. As
    published, width is 32."""
    *conv_keys, linear_key = jax.random.split(key, 6)
    channels = [likelihood.colours, *(width * 2**i for i in range(5))]
    cells = (likelihood.size // 16) ** 2
    params = {"linear": layers.linear_init(linear_key, cells * channels[-1], 2 * latent_size)}
    for i, (inputs, outputs) in enumerate(pairwise(channels)):
        params[f"conv{i}"] = layers.conv_init(conv_keys[i], 5, inputs, outputs)
    return params


def encode(nn, likelihood, params, x):
    """q(z|x): images x [B, H, W, colours] -> mean and logvar, each [B, latent]. As in the
    reproduction, logvar is log σ². (The paper's encoder gives log σ.) params: those of the whole
    model. Raises TypeError for images that are not floats."""
    params = params["encoder"]
    batch, size = len(x), likelihood.size
    chex.assert_shape(x, (batch, size, size, likelihood.colours))
    for i in range(5):
        x = nn.elu(nn.conv(params[f"conv{i}"], x, stride=1 if i == 0 else 2, padding=2))
    chex.assert_shape(x, (batch, size // 16, size // 16, None))
    mean, logvar = jnp.split(nn.linear(params["linear"], x.reshape(batch, -1)), 2, axis=-1)
    return mean, logvar


# ---- Steps of an automaton ----------------------------------------------------------------------


def take_steps(step, s, steps, channels):
    """Takes `steps` steps from cells s [B, n, n, C]. Returns the cells after the last step, and the
    first `channels` channels (None: all) of the cells before the first step and after every step,
    [1 + steps, B, n, n, channels]."""

    def body(s, _):
        s = step(s)
        return s, s[..., :channels]

    last, stepped = lax.scan(body, s, length=steps)
    return last, jnp.concatenate([s[None, ..., :channels], stepped])


def take_at_most(max_steps, step, s, steps):
    """Takes `steps` steps from cells s, but at most `max_steps`. Differentiable even if `steps` is
    traced.

    A loop of unknown length has no reverse-mode gradient. This loop has a known length, max_steps,
    and does nothing after `steps` steps. Raises ValueError if `steps` is known and larger.
    """
    if not isinstance(steps, jax.core.Tracer) and steps > max_steps:
        raise ValueError(f"{steps} steps: this model develops for {max_steps} at most")

    def body(s, t):
        return lax.cond(t < steps, step, lambda s: s, s), None

    last, _ = lax.scan(body, s, jnp.arange(max_steps))
    return last


def fixed_grid_model(nn, likelihood, latent_size, init, initial_cells, step, steps, train_steps):
    """The Model on a grid of fixed size, from its init, initial_cells and step. Its encoder is
    `encode`. `decode` takes `steps` steps. In training, `develop` takes at least the first and at
    most the second number in `train_steps`."""
    max_steps = max(steps, *train_steps)

    def grow(params, z, channels=likelihood.outputs):
        _, stage = take_steps(partial(step, params), initial_cells(z), steps, channels)
        return [stage]

    def decode(params, z):
        return grow(params, z)[0][-1]

    def develop(params, s, steps):
        return take_at_most(max_steps, partial(step, params), s, steps)

    return Model(
        latent_size=latent_size,
        likelihood=likelihood,
        init=init,
        encode=partial(encode, nn, likelihood),
        decode=decode,
        grow=grow,
        steps=steps,
        train_steps=train_steps,
        max_steps=max_steps,
        initial_cells=initial_cells,
        step=step,
        develop=develop,
    )
