"""What `jax.make_jaxpr` shows of a loss or an update is what the files of the method say."""

import re
from collections import Counter
from functools import cache, partial

import jax
import pytest
import tiny
from reference import equations

from vnca import losses, training
from vnca.pool import fresh_images

NAMES = [*tiny.OF_MODELS, "healing"]
# Layers that are run: convolutions and matrix products, of the encoder and of the decoder.
ENCODER = (5, 1)
DECODERS = {
    "doubling": (40 * 1, 40 * 9),  # 5 × 8 steps: one 3×3 convolution, four blocks of two, the last
    "nondoubling": (36 * 1, 36 * 1),
    "baseline": (5, 1),  # five transposed convolutions
    "healing": (12 * 2, 12 * 1),  # another convolution for what lost cells inherit
}
# In training the cells of a grid of fixed size have a loop of max(train_steps), 63 and 16.
DEVELOPED = {"nondoubling": (63 * 1, 63 * 1), "healing": (16 * 2, 16 * 1)}
SHAPES = jax.ShapeDtypeStruct
# Primitives that stand for a rule, a platform, a host or a layout that one does not read there.
HIDDEN = re.compile("custom|platform|callback|ffi|pallas|layout|sharding|barrier|remat|checkpoint")
SOFTPLUS = {"custom_jvp_call": 1}  # of jax.nn.softplus, whose derivative JAX writes out by itself


@cache
def published(name):
    """The config and the plain Learner."""
    config = tiny.published(tiny.FILES.get(name, name))
    return config, tiny.learner_of(config)


def run(jaxpr, name):
    """How often a primitive is run: in a scan once for each step, of branches in the longest."""
    total = 0
    for e in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        assert e.primitive.name != "while"
        total += e.primitive.name == name
        if e.primitive.name == "cond":
            total += max(run(branch, name) for branch in e.params["branches"])
            continue
        for value in e.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    total += e.params.get("length", 1) * run(inner, name)
    return total


def layers_run(jaxpr):
    return run(jaxpr, "conv_general_dilated"), run(jaxpr, "dot_general")


def hidden(jaxpr):
    """How often each primitive that hides something is in a jaxpr."""
    names = (e.primitive.name for e in equations(jaxpr))
    return Counter(name for name in names if HIDDEN.search(name))


@cache
def update(name):
    """The jaxpr of `one_update` on one device."""
    config, learner = published(name)
    images = SHAPES((60_000, 128), "uint8")
    state = jax.eval_shape(partial(training.init_state, learner, config), images)
    one = partial(training.one_update, learner, config)
    make = jax.make_jaxpr(one, axis_env=[("devices", 1)])
    return make(state, images, SHAPES((fresh_images(config),), "int32"))


@cache
def bound(name, function):
    """The jaxpr of a loss or an IWELBO of two images."""
    config, learner = published(name)
    params = jax.eval_shape(learner.model.init, jax.random.key(0))
    x, noise = SHAPES((2, 32, 32, 1), "float32"), SHAPES((2, config.model.latent_size), "float32")
    return jax.make_jaxpr(partial(function, learner.model))(params, x, noise)


@pytest.mark.parametrize("name", NAMES)
def test_the_jaxpr_of_a_loss_has_the_layers_that_the_files_say_and_nothing_hidden(name):
    jaxpr = bound(name, training.loss)
    assert layers_run(jaxpr) == tuple(map(sum, zip(ENCODER, DECODERS[name], strict=True)))
    assert hidden(jaxpr) == SOFTPLUS


@pytest.mark.parametrize("name", NAMES)
def test_the_jaxpr_of_an_update_has_the_layers_and_their_gradients_and_nothing_hidden(name):
    jaxpr, grids = update(name), DECODERS | DEVELOPED
    # A layer is a convolution or product and, in the gradient, one for its input and one for its
    # kernel. The images have no gradient.
    expected = [3 * (a + b) for a, b in zip(ENCODER, grids[name], strict=True)]
    expected[0] -= 1
    if name == "healing":
        # Its encoder is given, and so are what cells inherit: both have values only.
        steps = 16
        expected = [ENCODER[0] + (3 + 1) * steps, ENCODER[1] + 3 * steps]
    assert layers_run(jaxpr) == tuple(expected)
    assert hidden(jaxpr) == SOFTPLUS


def test_the_jaxpr_of_an_iwelbo_hides_no_more_than_two_derivatives_of_jax():
    def iwelbo(model, params, x, noise):
        return losses.iwelbo(model, params, x, lambda s: noise, 3)

    # Those of `jax.nn.softplus`, and of `jnp.logaddexp` in the sum over samples.
    assert hidden(bound("baseline", iwelbo)) == {"custom_jvp_call": 2}
