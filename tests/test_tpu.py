"""The automata as a TPU runs them: the same function and gradient, in a program that holds them."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax
from jax.extend.core import Literal

from vnca import tpu, training
from vnca.models import double, make_model, nca_step
from vnca.program.evaluate import estimator

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def with_gradient(function):
    """A function of weights, *arguments: the result, and the gradient of its sum with weights."""

    def both(weights, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(weights)

    return both


def assert_equal_to_1e_5(fast, plain, *arguments):
    """Both give the same result and gradient where the operands of products are as they are, and
    where they are rounded to bfloat16, as a TPU rounds them by default."""
    shape = jax.eval_shape(plain, *arguments).shape
    arguments = np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape), *arguments
    with jax.default_matmul_precision("highest"):
        assert_close(*(jax.jit(with_gradient(f))(*arguments) for f in (fast, plain)))
    # In float64 the order of a sum does not decide how it is rounded to bfloat16 after.
    with tiny.enable_x64(True):
        arguments = jax.tree.map(jnp.float64, arguments)
        assert_close(*(rounded(with_gradient(f), *arguments) for f in (fast, plain)))


def assert_close(ours, plain):
    for x, y in zip(*map(jax.tree.leaves, jax.device_get((ours, plain))), strict=True):
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= 1e-5 * np.abs(y).max()


def rounded(function, *arguments):
    """function(*arguments) in float64, with the operands of products of default precision rounded
    to bfloat16: leaves."""
    traced = jax.make_jaxpr(function)(*arguments)
    return jax.jit(partial(evaluate, traced.jaxpr, traced.consts))(*jax.tree.leaves(arguments))


def evaluate(jaxpr, consts, *given):
    """The results of a jaxpr, its products rounded, and those of the loops and calls in it."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *given), strict=True))
    for eqn in jaxpr.eqns:
        name, settings = eqn.primitive.name, dict(eqn.params)
        of = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        of = [x.astype(np.float64) if x.dtype == np.float32 else x for x in map(jnp.asarray, of)]
        inner = settings.get("jaxpr") or settings.get("call_jaxpr")
        if settings.get("new_dtype") == jnp.bfloat16:
            of = [lax.reduce_precision(x, 8, 7) for x in of]  # at once, not by way of float32
        if name == "while":
            results = evaluate_loop(settings, of)
        elif inner is not None:
            results = evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), *of)
        else:
            if settings.get("new_dtype") == np.float32:
                settings["new_dtype"] = np.dtype(np.float64)
            if name in ("dot_general", "conv_general_dilated"):
                if settings["precision"] in (None, (lax.Precision.DEFAULT,) * 2):
                    of = [lax.reduce_precision(x, 8, 7) for x in of]
                settings["preferred_element_type"] = np.dtype(np.float64)
            results = eqn.primitive.bind(*of, **settings)
            results = results if eqn.primitive.multiple_results else [results]
        values.update(zip(eqn.outvars, results, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def evaluate_loop(settings, of):
    """As `evaluate`, of a `while`."""
    ends = settings["cond_nconsts"], settings["cond_nconsts"] + settings["body_nconsts"]
    of_cond, of_body, carry = of[: ends[0]], of[ends[0] : ends[1]], of[ends[1] :]
    cond, body = settings["cond_jaxpr"], settings["body_jaxpr"]
    return lax.while_loop(
        lambda carry: evaluate(cond.jaxpr, cond.consts, *of_cond, *carry)[0],
        lambda carry: evaluate(body.jaxpr, body.consts, *of_body, *carry),
        carry,
    )


def random_like(tree, key=0):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    fresh = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, fresh)


# A batch of 8 is one tile and a convolution, one of 3 nine products. A step is the same on every
# grid, so there are two.
@pytest.mark.parametrize("batch", [3, 8])
def test_the_doubling_model_has_the_plain_gradient(batch, monkeypatch):
    sizes = {"model__latent_size": 8, "model__steps_per_doubling": 2, "model__doublings": 2}
    model = make_model(tiny.config(**sizes).model)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0)))
    z = jax.random.normal(jax.random.key(1), (batch, 8))

    def plain(params, z):
        s = z[:, None, None]
        for _ in range(2):
            s = double(s)
            for _ in range(2):
                s = nca_step(params["decoder"], s)
        return s[..., :1]

    tiny.shut_door(monkeypatch)
    assert_equal_to_1e_5(partial(tpu.grown, 2, 2, None), plain, params, z)


@pytest.mark.parametrize("batch, steps", [(3, 0), (3, 2), (3, 3), (8, 3)])
def test_the_nondoubling_model_has_the_plain_gradient(batch, steps, monkeypatch):
    model = make_model(tiny.config("nondoubling", model__latent_size=8, model__hidden=16).model)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0)))
    s = jax.random.normal(jax.random.key(1), (batch, 32, 32, 8))

    def plain(params, s):
        for _ in range(steps):
            s = model.step(params, s)
        return s

    tiny.shut_door(monkeypatch)
    fast = lambda params, s: tpu.developed(3, params, s, jnp.int32(steps))  # noqa: E731
    assert_equal_to_1e_5(fast, plain, params, s)


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_baseline_has_the_plain_gradient(part, monkeypatch):
    model = make_model(tiny.config("baseline", model__encoder_width=3).model)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0)))
    given = jax.random.normal(jax.random.key(1), (3, 32, 32, 1) if part == "encode" else (3, 4))

    def on(way):
        def run(params, given):
            ways = {"fast": 0, "plain": 1}
            monkeypatch.setattr(tpu, "by_platform", lambda *given: given[ways[way]](*given[2:]))
            return jnp.concatenate(jax.tree.leaves(getattr(model, part)(params, given)))

        return run

    tiny.shut_door(monkeypatch)
    assert_equal_to_1e_5(on("fast"), on("plain"), params, given)


@pytest.mark.parametrize("shape", [(5, 5, 64, 96), (700, 200), (200, 700), (90, 3), (7,)])
def test_the_norm_of_a_gradient_is_exact_to_1e_5_where_its_numbers_are_rounded_or_not(shape):
    kernel = jax.random.normal(jax.random.key(0), shape)
    exact = np.sum(np.float64(kernel) ** 2) + 5
    for x in (kernel, jax.lax.reduce_precision(kernel, 8, 7)):  # as a TPU's product rounds it
        ours = tpu.global_norm({"kernel": x, "bias": jnp.ones(5)}) ** 2
        large = kernel.size >= tpu.LARGE
        assert abs(ours / exact - 1) < 1e-5 or not (large or x is kernel)


def lowered(traced, platform):
    """The program for a platform, with the names of its functions."""
    return traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)


def assert_is_of(platform, text, has_steps):
    assert "_patches" not in text  # the CPU's way
    assert ('"_steps"' in text) == (platform == "tpu" and has_steps)
    assert ('"_blocked"' in text) == (platform == "tpu")


@cache
def published_update(name):
    """The update call of a published config for eight devices, and the shapes of its arguments."""
    config, shape = tiny.published(name), jax.ShapeDtypeStruct
    model = make_model(config.model)
    images = shape((60_000, 98), "uint8")
    state = jax.eval_shape(partial(training.init_state, model, config), images)
    fresh = config.train.batch_size // 8
    if "pool" in state:
        fresh //= 2
        state["pool"] = {
            name: shape((8, len(x) // 8, *x.shape[1:]), x.dtype)
            for name, x in state["pool"].items()
        }
    arguments = state, images, shape((8, 125, fresh), "int32"), shape((), "int32")
    return training.make_update_call(model, config), arguments


@cache
def update(name):
    """The published update of eight devices, traced, and the arrays that it trains."""
    call, arguments = published_update(name)
    return jax.jit(lambda *a: call(*a)).trace(*arguments), jax.tree.leaves(arguments[0]["params"])


@pytest.mark.parametrize("name", tiny.OF_MODELS)
def test_an_update_writes_its_state_where_it_was(name):
    call, arguments = published_update(name)
    given = re.findall(r"tf.aliasing_output|jax.buffer_donor", call.lower(*arguments).as_text())
    assert len(given) == len(jax.tree.leaves(arguments[0]))


@cache
def evaluation(name):
    """The published evaluation on eight devices, traced."""
    model, shape = make_model(tiny.published(name).model), jax.ShapeDtypeStruct
    params, number = jax.eval_shape(model.init, jax.random.key(0)), shape((), "int32")
    arguments = params, shape((8, 32, 98), "uint8"), shape((8, 32), "int32"), number, number
    return jax.jit(estimator(model)).trace(*arguments)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", tiny.OF_MODELS)
def test_the_published_updates_lower_for_accelerators(name, platform):
    traced, arrays = update(name)
    text = lowered(traced, platform)
    assert_is_of(platform, text, name != "baseline")
    # One for each array until XLA makes them one: the gradient and the terms of the loss.
    assert text.count("stablehlo.all_reduce") == len(arrays) + 1


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", tiny.OF_MODELS)
def test_the_published_evaluations_lower_for_accelerators(name, platform):
    assert_is_of(platform, lowered(evaluation(name), platform), name == "doubling")


@pytest.mark.parametrize("waves", [0, 1])
def test_cells_that_inherit_are_computed_as_the_method_says(waves):
    fields = {"model__latent_size": 3, "model__channels": 8, "model__position_waves": waves}
    model, shape = make_model(tiny.config("nondoubling", **fields).model), jax.ShapeDtypeStruct
    params = jax.eval_shape(model.init, jax.random.key(0))
    traced = jax.jit(model.develop).trace(params, shape((1, 32, 32, 8), "float32"), jnp.int32(2))
    assert ('"_steps"' in lowered(traced, "tpu")) == (waves == 0)
