"""The arithmetic of a model and of a training update, counted in the programs that JAX traces.

A convolution or a product costs a multiply-add for each kernel tap, on padding as well, but not on
the zeros that a dilation puts between cells. Biases and ELUs do not count. The backward pass costs
as much as the tangents of forward-mode differentiation, of which it is the transpose: of each
product one for each of its two operands, and none behind a `stop_gradient`.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import jax

from vnca.program.learner import make_model, param_shapes


class Arithmetic(NamedTuple):
    """The multiply-adds of one image in each function of a Model."""

    encode: int
    decode: int
    step: int  # 0 without cells on a grid of fixed size


def forward(model):
    """The Arithmetic of a Model's forward pass."""
    return _arithmetic(model, multiply_adds_of)


def gradient(model):
    """The Arithmetic of a Model's forward and backward pass."""
    return _arithmetic(model, multiply_adds_of_gradient)


@lru_cache
def _arithmetic(model, count):
    size, colours = model.likelihood.size, model.likelihood.colours
    params = param_shapes(model)
    x = jax.ShapeDtypeStruct((1, size, size, colours), "float32")
    z = jax.ShapeDtypeStruct((1, model.latent_size), "float32")
    return Arithmetic(
        encode=count(model.encode, params, x),
        decode=count(model.decode, params, z),
        step=count(model.step, params, jax.eval_shape(model.initial_cells, z)) if model.step else 0,
    )


def mean_steps(model):
    """The mean number of steps in training, rounded up; 0 for a Model without `train_steps`."""
    return (sum(model.train_steps) + 1) // 2 if model.train_steps else 0


def update_flops(config):
    """The FLOP of one training update, at the mean number of steps. A multiply-add is 2 FLOP."""
    model = make_model(config.model)
    training = gradient(model)
    encoder = (forward(model) if config.train.encoder_from else training).encode
    # Without a pool, an update decodes, which takes `steps` steps.
    decoder = mean_steps(model) * training.step if config.train.pool_size else training.decode
    return 2 * config.train.batch_size * (encoder + decoder)


def evaluation_flops(config, images, samples):
    """The FLOP of the IWELBO of so many images with so many samples each. An image is encoded once,
    and decoded for every sample."""
    counts = forward(make_model(config.model))
    return 2 * images * (counts.encode + samples * counts.decode)


# ---- In a jaxpr ----------------------------------------------------------------------------------


def multiply_adds_of(function, *arguments):
    """The multiply-adds of a call with arguments of these shapes."""
    return work(jax.make_jaxpr(function)(*arguments).jaxpr)


def multiply_adds_of_gradient(function, *arguments):
    """The multiply-adds of a call and of its tangents, with respect to all of its arguments."""

    def with_tangents(*arguments):
        # `linearize` and not `jvp`, which keeps tangents that nothing needs.
        _, tangents = jax.linearize(function, *arguments)
        return tangents(*arguments)

    return multiply_adds_of(with_tangents, *arguments)


def work(jaxpr, on_zeros=False):
    """The multiply-adds of a jaxpr. Of the branches of a condition the one with the most counts,
    and of a loop of unknown length one turn. on_zeros: count those between spread cells as well."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [work(body, on_zeros) for body in inner_jaxprs(equation)]
        total += multiply_adds(equation, on_zeros)
        total += equation.params.get("length", 1) * max(inner, default=0)
    return total


def inner_jaxprs(equation):
    """The jaxprs of a call or of the body of a loop, or those of all branches of a condition."""
    params = equation.params
    bodies = [params[name] for name in ("jaxpr", "call_jaxpr", "body_jaxpr") if name in params]
    return [getattr(closed, "jaxpr", closed) for closed in params.get("branches", bodies)]


def multiply_adds(equation, on_zeros=False):
    """The multiply-adds of one execution: each number of the result is a sum of so many terms."""
    name, axes = equation.primitive.name, equation.params.get("dimension_numbers")
    if name not in ("conv_general_dilated", "dot_general"):
        return 0
    x, kernel = (operand.aval for operand in equation.invars)
    result = equation.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = axes
        return result.size * prod(x.shape[axis] for axis in contracted)
    taps = kernel.size // kernel.shape[axes.rhs_spec[0]]
    spread = 1 if on_zeros else prod(equation.params["lhs_dilation"])
    return result.size * taps // spread
