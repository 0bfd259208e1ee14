"""The models in a TPU's fast form: the plain values and gradients, and programs that hold them."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax
from jax.extend.core import Literal
from reference import equations, numbers_like

from vnca import layers, training
from vnca.fast import tpu
from vnca.model import make_model
from vnca.models.doubling import double, nca_step
from vnca.program.evaluate import estimator
from vnca.program.learner import make_learner

pytestmark = pytest.mark.usefixtures("quickly_compiled")

V5 = "TPU v5 lite"


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


# A batch of 8 is one tile and a convolution, one of 3 nine products. A step is the same on every
# grid, so there are two.
@pytest.mark.parametrize(
    "batch, grow",
    [
        (3, tpu.grow_on_chip),
        pytest.param(8, tpu.grow_on_chip, marks=pytest.mark.slow),
        pytest.param(3, tpu.grow_off_chip, marks=pytest.mark.slow),
        pytest.param(8, tpu.grow_off_chip, marks=pytest.mark.slow),
    ],
)
def test_the_doubling_model_has_the_plain_gradient(batch, grow):
    model = make_model(tiny.config(model__latent_size=8).model)
    params = numbers_like(jax.eval_shape(model.init, jax.random.key(0)), 1, 0.2)
    z = jax.random.normal(jax.random.key(1), (batch, 8))

    def plain(params, z):
        s = z[:, None, None]
        for _ in range(2):
            s = double(s)
            for _ in range(2):
                s = nca_step(layers, params["decoder"], s)
        return s[:, 1:3, 1:3, :3]  # images of 2×2 pixels in colour

    decoder = {"decoder": params["decoder"]}
    assert_equal_to_1e_5(tpu.decode_doubling(grow, 2, 2, 2, 3), plain, decoder, z)


@pytest.mark.parametrize(
    "batch, steps",
    [(3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 0), (3, 3), (8, 3)))],
)
def test_the_nondoubling_model_has_the_plain_gradient(batch, steps):
    model = make_model(tiny.config("nondoubling", model__latent_size=8).model)
    params = numbers_like(jax.eval_shape(model.init, jax.random.key(0)), 1, 0.2)
    s = jax.random.normal(jax.random.key(1), (batch, 32, 32, 8))

    def plain(params, s):
        for _ in range(steps):
            s = model.step(params, s)
        return s

    fast = lambda params, s: tpu.develop_at_most(3)(params, s, jnp.int32(steps))  # noqa: E731
    assert_equal_to_1e_5(fast, plain, params, s)
    with pytest.raises(ValueError, match="4 steps: this model develops for 3 at most"):
        tpu.develop_at_most(3)(params, s, 4)


@pytest.mark.slow  # each compiles for 3 seconds
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_baseline_has_the_plain_gradient(part):
    config = tiny.config("baseline", model__encoder_width=3)
    plain = make_model(config.model)
    fast = tpu.fast_model(plain, config.model, V5)
    params = numbers_like(jax.eval_shape(plain.init, jax.random.key(0)), 1, 0.2)
    given = jax.random.normal(jax.random.key(1), (3, 32, 32, 1) if part == "encode" else (3, 4))

    def of(model):
        def run(params, given):
            found = getattr(model, part)(params, given)
            # Beside a border of −10⁴, any deviation inside would be small.
            return found[:, 2:-2, 2:-2] if part == "decode" else jnp.concatenate(found)

        return run

    assert_equal_to_1e_5(of(fast), of(plain), params, given)
    if part == "decode":
        border = jax.jit(fast.decode)(params, given).at[:, 2:-2, 2:-2].set(-1e4)
        assert (border == -1e4).all()


@pytest.mark.parametrize(
    "kind, steps, is_loop",
    [(V5, 2, True), ("TPU v3", 2, False), ("TPU v2", 2, False), ("TPU v3", 26, True)],
)
def test_a_chip_that_holds_its_arrays_runs_steps_in_a_loop_and_others_unroll_a_few(
    kind, steps, is_loop
):
    config = tiny.config(model__steps_per_doubling=steps)
    model = tpu.fast_model(make_model(config.model), config.model, kind)
    params = jax.eval_shape(model.init, jax.random.key(0))
    jaxpr = jax.make_jaxpr(model.decode)(params, jnp.zeros((8, 4)))
    assert is_loop == any(e.primitive.name == "while" for e in equations(jaxpr))


@pytest.mark.parametrize("shape", [(5, 5, 64, 96), (700, 200), (200, 700), (90, 3), (7,)])
def test_the_norm_of_a_gradient_is_exact_to_1e_5_where_its_numbers_are_rounded_or_not(shape):
    kernel = jax.random.normal(jax.random.key(0), shape)
    for x in (kernel, jax.lax.reduce_precision(kernel, 8, 7)):  # as a TPU's product rounds it
        ours = tpu.global_norm({"kernel": x, "bias": jnp.ones(5)}) ** 2
        # Of large arrays the rounding averages out. Small ones are summed as they are.
        exact = np.sum(np.float64(kernel if kernel.size >= tpu.LARGE else x) ** 2) + 5
        assert abs(ours / exact - 1) < 1e-5


# ---- Programs for accelerators -------------------------------------------------------------------


def learner_for(platform, config):
    return make_learner(config, platform=platform, device_kind=V5)


def lowered(traced, platform):
    """The program for a platform, with the names of its functions."""
    return traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)


def assert_is_of(platform, text, has_steps):
    assert "_patches" not in text  # of a CPU
    assert ('"_steps"' in text) == (platform == "tpu" and has_steps)
    assert ("cellwise" in text) == (platform == "cuda" and has_steps)
    assert ('"_blocked"' in text) == (platform == "tpu")


@cache
def published_update(platform, name):
    """The update call of a published config for eight devices, and the shapes of its arguments."""
    config, shape = tiny.published(name), jax.ShapeDtypeStruct
    learner = learner_for(platform, config)
    images = shape((60_000, 128), "uint8")
    state = jax.eval_shape(partial(training.init_state, learner, config), images)
    fresh = config.train.batch_size // 8
    if learner.model.develop:
        fresh //= 2
    pool = jax.tree.map(lambda x: shape((8, len(x) // 8, *x.shape[1:]), x.dtype), state.pool)
    arguments = state._replace(pool=pool), images, shape((8, 125, fresh), "int32")
    return training.make_update_call(learner, config), (*arguments, shape((), "int32"))


every_platform = pytest.mark.parametrize("platform", ["tpu", "cuda"])
every_model = pytest.mark.parametrize("name", tiny.OF_MODELS)


@pytest.mark.slow  # traces all published updates, for 7 seconds
@every_platform
@every_model
def test_the_published_updates_lower_for_accelerators(name, platform):
    call, arguments = published_update(platform, name)
    text = lowered(jax.jit(lambda *a: call(*a)).trace(*arguments), platform)
    assert_is_of(platform, text, name != "baseline")
    # One for each array until XLA makes them one: the gradient and the terms of the loss.
    arrays = jax.tree.leaves(arguments[0].params)
    assert text.count("stablehlo.all_reduce") == len(arrays) + 1


@every_model
def test_an_update_writes_its_state_where_it_was(name):
    call, arguments = published_update("tpu", name)
    given = re.findall(r"tf.aliasing_output|jax.buffer_donor", call.lower(*arguments).as_text())
    assert len(given) == len(jax.tree.leaves(arguments[0]))


@every_platform
@every_model
def test_the_published_evaluations_lower_for_accelerators(name, platform):
    model, shape = learner_for(platform, tiny.published(name)).model, jax.ShapeDtypeStruct
    params, number = jax.eval_shape(model.init, jax.random.key(0)), shape((), "int32")
    arguments = params, shape((8, 32, 128), "uint8"), shape((8, 32), "int32"), number, number
    traced = jax.jit(estimator(model)).trace(*arguments)
    assert_is_of(platform, lowered(traced, platform), name == "doubling")


def test_the_healing_model_has_the_encoder_of_a_tpu_and_cells_as_the_method_says():
    config = tiny.committed("small_healing").model
    plain = make_model(config)
    fast = tpu.fast_model(plain, config, V5)
    assert fast.encode is tpu.encode and fast == plain._replace(encode=tpu.encode)


def test_a_tpu_keeps_an_encoder_that_is_not_the_published_one():
    config = tiny.config("doubling").model
    mine = make_model(config)._replace(encode=lambda params, x: (x, x))
    assert tpu.fast_model(mine, config, V5).encode is mine.encode


@pytest.mark.parametrize(
    "name, fields, fast_parts",
    [
        ("baseline", {}, {"encode", "decode"}),
        ("baseline", {"levels": 255}, {"encode", "decode"}),
        ("baseline", {"drawn_size": 32}, {"encode"}),
        ("baseline", {"colours": 3}, set()),
        ("baseline", {"size": 64, "drawn_size": 64}, set()),
        ("doubling", {"colours": 3}, {"decode"}),
        ("nondoubling", {"size": 16}, {"develop"}),
    ],
)
def test_a_tpu_has_an_encoder_and_a_baseline_for_grey_images_of_32_pixels_alone(
    name, fields, fast_parts
):
    config = tiny.config(name, **{f"model__{field}": value for field, value in fields.items()})
    plain = make_model(config.model)
    fast = tpu.fast_model(plain, config.model, V5)
    assert {part for part in fast._fields if getattr(fast, part) != getattr(plain, part)} == (
        fast_parts
    )
