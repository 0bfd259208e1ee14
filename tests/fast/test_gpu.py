"""The models as a GPU runs them: the plain function and gradient, in a program that lowers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import numbers_like

from vnca import training
from vnca.fast import gpu
from vnca.model import make_model
from vnca.pool import init_pool, pool_gradient

CHANNELS = 4
KEY = jax.random.key(1)
INSIDE = np.s_[:, 2:-2, 2:-2]  # of a baseline's border of −10⁴, beside which all else is small
pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def params_of(model, part="decoder"):
    return {part: numbers_like(jax.eval_shape(model.init, jax.random.key(0))[part], 1, 0.2)}


def with_gradient(function, shape):
    """A function of the same arguments: the result, and the gradient of its weighted sum."""
    weights = np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)

    @jax.jit
    def both(params, x, *rest):
        y, pull = jax.vjp(lambda params, x: function(params, x, *rest), params, x)
        return y, pull(weights)

    return both


def assert_equal_to_1e_5(ours, plain):
    for x, y in zip(*map(jax.tree.leaves, jax.device_get((ours, plain))), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.abs(x - y).max() <= 1e-5 * np.abs(y).max()


def plain_and_ours(name, **settings):
    """The Model of these settings and tiny ones, plain and in the form of a GPU."""
    settings = {"latent_size": CHANNELS, "encoder_width": 1} | settings
    config = tiny.config(name, **{f"model__{field}": value for field, value in settings.items()})
    ours = gpu.fast_model(make_model(config.model, gpu), config.model)
    return make_model(config.model), ours


def doubling(steps=1):
    return plain_and_ours("doubling", steps_per_doubling=steps)


def nondoubling(most=3):
    return plain_and_ours("nondoubling", steps=1, train_steps=(1, most))


def baseline():
    return plain_and_ours("baseline", encoder_width=2)


@pytest.mark.slow  # compiles for 4 seconds
def test_the_doubling_model_has_the_plain_gradient(monkeypatch):
    # So few bytes that at this batch the gradients of some grids wait for the end of the backward
    # pass, and those of others do not. 3×3 kernels wait on 2×2 cells, the others on 4×4, too.
    monkeypatch.setattr(gpu, "SMALL", 3 * 6 * 6 * CHANNELS * 4)
    plain, ours = doubling(steps=2)
    params, z = params_of(plain), jax.random.normal(jax.random.key(1), (3, CHANNELS))
    both = (with_gradient(model.decode, (3, 32, 32, 1)) for model in (ours, plain))
    assert_equal_to_1e_5(*(f(params, z) for f in both))


def test_the_nondoubling_model_has_the_plain_gradient_for_any_number_of_steps():
    plain, ours = nondoubling(most=4)
    shape = (2, 32, 32, CHANNELS)
    params, s = params_of(plain), jax.random.normal(jax.random.key(1), shape)
    ours, plain = (with_gradient(model.develop, shape) for model in (ours, plain))
    for steps in range(1, 5):
        steps = jnp.int32(steps)
        assert_equal_to_1e_5(ours(params, s, steps), plain(params, s, steps))


def test_no_step_leaves_the_cells_and_more_than_the_model_is_made_for_are_an_error():
    plain, ours = nondoubling()
    s = jax.random.normal(jax.random.key(1), (2, 32, 32, CHANNELS))
    assert np.array_equal(jax.jit(ours.develop)(params_of(plain), s, jnp.int32(0)), s)
    with pytest.raises(ValueError, match="4 steps: this model develops for 3 at most"):
        ours.develop(params_of(plain), s, 4)


def test_a_model_of_many_steps_stays_a_loop():
    for name, field, few, many in [
        ("doubling", "steps_per_doubling", 25, 26),  # after each of five doublings
        ("nondoubling", "train_steps", (1, 127), (1, 128)),
    ]:
        for steps, is_loop in (few, False), (many, True):
            config = tiny.config(name, **{f"model__{field}": steps}).model
            model = make_model(config, gpu)
            assert (gpu.fast_model(model, config) is model) == is_loop


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_baseline_has_the_plain_gradient(part):
    plain, ours = baseline()
    params = params_of(plain, f"{part}r")
    x = jax.random.normal(jax.random.key(1), (3, 32, 32, 1) if part == "encode" else (3, CHANNELS))

    def run(model):
        def flat(*of):
            found = getattr(model, part)(*of)
            return found[INSIDE] if part == "decode" else jnp.concatenate(found)

        return with_gradient(flat, jax.eval_shape(flat, params, x).shape)(params, x)

    assert_equal_to_1e_5(run(ours), run(plain))


@pytest.mark.slow  # runs without jit, for 7 seconds
@pytest.mark.parametrize("make", [doubling, nondoubling, baseline], ids=lambda f: f.__name__)
def test_parameters_may_be_numpy_arrays_outside_of_jit(make):
    plain, ours = make()
    params = params_of(plain, "encoder") | params_of(plain)
    params, images = jax.tree.map(np.asarray, (params, jax.random.uniform(KEY, (2, 32, 32, 1))))
    functions = {"encode": images, "decode": np.ones((2, CHANNELS), np.float32)}
    if plain.develop:
        functions["develop"] = np.ones((2, 32, 32, CHANNELS), np.float32)
    for name, x in functions.items():
        steps = (2,) * (name == "develop")
        found, wanted = (getattr(model, name)(params, x, *steps) for model in (ours, plain))
        if make is baseline and name == "decode":
            assert (found.at[INSIDE].set(-1e4) == -1e4).all()
            found, wanted = found[INSIDE], wanted[INSIDE]
        assert_equal_to_1e_5(found, wanted)


def test_the_norm_is_that_of_all_arrays():
    tree = {"kernel": jnp.full((5, 3), 2.0), "bias": jnp.ones(4), "one": jnp.zeros((2, 2, 1))}
    assert gpu.global_norm(tree) == pytest.approx(8)


def test_the_sum_over_cells_is_a_sum_of_rows_also_of_odd_numbers_of_cells():
    for shape in (2, 32, 32, 3), (3, 2, 2, 5), (7, 16, 16, 3):
        g = jax.random.normal(jax.random.key(0), shape)
        rows = gpu.cell_sum(g)
        assert len(rows) == (4 if shape[1] == 32 else 1)
        assert_equal_to_1e_5(rows.sum(axis=0), g.sum(axis=(0, 1, 2)))


@pytest.mark.parametrize("name", ["doubling", "nondoubling"])
def test_an_update_lowers_for_a_gpu_with_one_all_reduce_an_array_and_known_loops(name):
    _, model = doubling() if name == "doubling" else nondoubling()
    config = tiny.config(name, train__batch_size=8, train__micro_batch=8)
    learner = training.Learner(model)
    if name == "nondoubling":
        config.train.pool_size = 16
        learner = training.Learner(model, pool_gradient, init_pool)
    shape = jax.ShapeDtypeStruct
    images = shape((32, 128), "uint8")
    state = jax.eval_shape(partial(training.init_state, learner, config), images)
    arrays = len(jax.tree.leaves(state.params))
    state = state._replace(pool=jax.tree.map(lambda x: shape((1, *x.shape), x.dtype), state.pool))
    fresh = 4 if name == "nondoubling" else 8
    call = training.make_update_call(learner, config, jax.devices()[:1])
    arguments = state, images, shape((1, 2, fresh), "int32"), shape((), "int32")
    traced = jax.jit(lambda *of: call(*of)).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # One for each array and the terms of the loss, until XLA makes them one.
    assert text.count("stablehlo.all_reduce") == arrays + 1
    # The loop over updates, and that over micro-batches. The steps of an automaton are no loop.
    assert text.count("stablehlo.while") == 2
    assert "platform_index" not in text
