"""The models: what is published of them, and each decoder against NumPy loops."""

import importlib
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from vnca import layers, models
from vnca.losses import bernoulli_log_likelihood

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LATENT, WIDTH, STEPS = 4, 2, 2
DOUBLING = models.doubling_vnca(LATENT, WIDTH, 5, STEPS)
NONDOUBLING = models.nondoubling_vnca(LATENT, WIDTH, 2, (1, 3))
BASELINE = models.baseline_vae(LATENT, WIDTH)
EVERY = pytest.mark.parametrize(
    "model", [DOUBLING, NONDOUBLING, BASELINE], ids=["doubling", "nondoubling", "baseline"]
)
STEP = jax.jit(partial(models.nca_step, layers))
Z = np.random.RandomState(0).randn(2, LATENT).astype(np.float32)


def random_params(model, scale=0.2):
    """Parameters of which none is zero, so that every array counts."""
    return reference.numbers_like(jax.eval_shape(model.init, jax.random.key(0)), 1, scale)


# ---- What is published -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "latent_size", "published"),
    [
        ("doubling", 256, 6_585_088),
        ("nondoubling", 128, 5_042_432),
        ("nondoubling", 256, 6_058_752),
        ("baseline", 256, 10_282_497),
    ],
)
def test_the_number_of_parameters_is_the_published_one(config, latent_size, published):
    settings = importlib.import_module(f"configs.{config}").get_config().model
    settings.latent_size = latent_size
    params = jax.eval_shape(models.make_model(settings).init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(params)) == published
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("config", ["doubling", "nondoubling", "baseline"])
def test_the_same_sizes_give_the_same_functions_so_nothing_is_compiled_twice(config):
    get_config = importlib.import_module(f"configs.{config}").get_config
    model = models.make_model(get_config().model)
    assert models.make_model(get_config().model) == model
    smaller = get_config().model
    smaller.latent_size = 8
    assert models.make_model(smaller).decode is not model.decode


def test_one_set_of_cell_weights_serves_any_number_of_steps_and_doublings():
    shapes = [
        jax.eval_shape(models.doubling_vnca(LATENT, WIDTH, *sizes).init, jax.random.key(0))
        for sizes in [(5, 1), (5, 8), (7, 3)]
    ]
    assert shapes[0] == shapes[1] == shapes[2]


@EVERY
def test_no_two_draws_of_a_fresh_model_are_from_the_same_key(model, monkeypatch):
    keys, drawn = [], 0

    def record(key, shape, **_):
        nonlocal drawn
        keys.append(tuple(jax.random.key_data(key).tolist()))
        drawn += math.prod(shape)
        return np.ones(shape, np.float32)

    monkeypatch.setattr(jax.random, "uniform", record)
    params = model.init(jax.random.key(0))
    assert len(keys) == len(set(keys))
    assert drawn == sum(np.count_nonzero(a) for a in jax.tree.leaves(params))


# ---- Encoder ---------------------------------------------------------------------------------


def test_the_encoder_gives_a_mean_and_a_log_variance_for_each_image():
    params = jax.eval_shape(DOUBLING.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((3, 32, 32, 1), np.float32)
    mean, logvar = jax.eval_shape(DOUBLING.encode, params, images)
    assert mean.shape == logvar.shape == (3, LATENT)


def test_the_mean_comes_before_the_log_variance():
    params = random_params(DOUBLING)
    params["encoder"]["linear"] = {
        "kernel": np.zeros_like(params["encoder"]["linear"]["kernel"]),
        "bias": np.arange(2 * LATENT, dtype=np.float32),
    }
    mean, logvar = jax.jit(DOUBLING.encode)(params, np.zeros((1, 32, 32, 1), np.float32))
    assert mean.tolist() == [[0, 1, 2, 3]]
    assert logvar.tolist() == [[4, 5, 6, 7]]


@EVERY
def test_an_image_that_is_not_padded_is_refused_in_words(model):
    images = jax.ShapeDtypeStruct((2, 28, 28, 1), np.float32)
    with pytest.raises(AssertionError, match=r"\(2, 28, 28, 1\).*\(2, 32, 32, 1\)"):
        jax.eval_shape(model.encode, random_params(model), images)


@EVERY
@pytest.mark.parametrize("shape", [(2, LATENT + 1), (2, 1, 1, LATENT)], ids=str)
def test_a_latent_of_another_shape_is_refused_in_words(model, shape):
    with pytest.raises(AssertionError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        jax.eval_shape(model.decode, random_params(model), jax.ShapeDtypeStruct(shape, np.float32))


# ---- Cells -----------------------------------------------------------------------------------


def test_doubling_makes_two_by_two_copies_of_each_cell():
    s = np.random.RandomState(0).randn(2, 3, 4, 5).astype(np.float32)
    assert np.array_equal(models.double(s), np.kron(s, np.ones((1, 2, 2, 1), np.float32)))


def test_the_crop_is_the_centre():
    x = np.arange(2 * 8 * 6).reshape(2, 8, 6, 1)
    assert np.array_equal(models.crop(x, 4), x[:, 2:6, 1:5])
    assert np.array_equal(models.crop(x, 6), x[:, 1:7])


@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 32), (33, 33, 32), (34, 31, 32)])
def test_a_grid_that_cannot_be_cropped_is_refused_with_both_sizes(height, width, size):
    with pytest.raises(ValueError, match=f"{height}×{width}.*{size}×{size}"):
        models.crop(np.zeros((1, height, width, 1)), size)


def test_a_step_is_what_loops_over_the_cells_give():
    params = random_params(DOUBLING)["decoder"]
    s = np.random.RandomState(2).randn(2, 5, 6, LATENT).astype(np.float32)
    tiny.close(STEP(params, s), reference.doubling_step(tiny.in_float64(params), s))


def test_a_cell_is_seen_by_its_three_by_three_neighbourhood_alone():
    params = random_params(DOUBLING)["decoder"]
    s = np.random.RandomState(2).randn(1, 7, 7, LATENT).astype(np.float32)
    touched = s.copy()
    touched[0, 3, 2] += 1
    changed = np.any(STEP(params, touched) != STEP(params, s), axis=-1)[0]
    assert np.argwhere(changed).tolist() == [[i, j] for i in (2, 3, 4) for j in (1, 2, 3)]


@pytest.mark.parametrize("model", [DOUBLING, NONDOUBLING], ids=["doubling", "nondoubling"])
def test_a_fresh_model_copies_its_latent_to_every_pixel(model, monkeypatch):
    def draw(key, shape, **_):  # NumPy's numbers: the last layer is zero, so any would do
        return np.random.RandomState(math.prod(shape)).randn(*shape).astype(np.float32)

    monkeypatch.setattr(jax.random, "uniform", draw)
    logits = jax.jit(model.decode)(model.init(jax.random.key(0)), Z)
    assert np.array_equal(logits, np.broadcast_to(Z[:, None, None, :1], (2, 32, 32, 1)))


def test_doubling_and_stepping_in_turn_is_what_loops_give_at_every_stage():
    params = {"decoder": random_params(DOUBLING)["decoder"]}
    weights = tiny.in_float64(params["decoder"])
    stages, logits = jax.jit(lambda p, z: (DOUBLING.grow(p, z), DOUBLING.decode(p, z)))(params, Z)
    s = Z[:, None, None, :].astype(np.float64)
    assert [stage.shape for stage in stages] == [(1 + STEPS, 2, n, n, 1) for n in (2, 4, 8, 16, 32)]
    for stage in stages:
        s = s.repeat(2, axis=1).repeat(2, axis=2)
        tiny.close(stage[0], s[..., :1])
        for after_step in stage[1:]:
            s = reference.doubling_step(weights, s)
            tiny.close(after_step, s[..., :1])
    assert np.array_equal(logits, stages[-1][-1])


def test_a_grid_larger_than_the_image_is_cropped_to_its_centre():
    model = models.doubling_vnca(2, 1, 6, 1)
    params = {"decoder": random_params(model)["decoder"]}
    both = jax.jit(lambda p, z: (model.grow(p, z)[-1][-1], model.decode(p, z)))
    grown, logits = both(params, Z[:, :2])
    assert grown.shape == (2, 64, 64, 1)
    assert np.array_equal(logits, grown[:, 16:48, 16:48])


# ---- Non-doubling ----------------------------------------------------------------------------


def test_the_nondoubling_model_copies_its_latent_to_every_cell():
    cells = np.broadcast_to(Z[:, None, None], (2, 32, 32, 4))
    assert np.array_equal(NONDOUBLING.initial_cells(Z), cells)


def test_the_nondoubling_model_grows_as_loops_over_its_cells_do():
    params = {"decoder": random_params(NONDOUBLING)["decoder"]}
    weights = tiny.in_float64(params["decoder"])
    both = jax.jit(lambda p, z: (NONDOUBLING.grow(p, z), NONDOUBLING.decode(p, z)))
    (stage,), logits = both(params, Z)
    s = np.asarray(NONDOUBLING.initial_cells(Z), np.float64)
    assert stage.shape == (3, 2, 32, 32, 1)
    tiny.close(stage[0], s[..., :1])
    for after_step in stage[1:]:
        s = reference.nondoubling_step(weights, s)
        tiny.close(after_step, s[..., :1])
    assert np.array_equal(logits, stage[-1])


def test_developing_takes_as_many_steps_as_it_is_told():
    params = {"decoder": random_params(NONDOUBLING)["decoder"]}
    weights = tiny.in_float64(params["decoder"])
    cells = np.random.RandomState(3).randn(1, 6, 5, LATENT).astype(np.float32)
    develop, s = jax.jit(NONDOUBLING.develop), cells.astype(np.float64)
    for steps in range(4):  # 3 is the most that the model was made for
        tiny.close(develop(params, cells, steps), s)
        s = reference.nondoubling_step(weights, s)
    for number in (int, np.int64, jnp.int32):
        with pytest.raises(ValueError, match="^4 steps: .* 3 at most"):
            NONDOUBLING.develop(params, cells, number(4))


def test_the_gradient_of_developing_is_that_of_the_steps_taken_alone():
    params = {"decoder": random_params(NONDOUBLING)["decoder"]}
    cells = np.random.RandomState(3).randn(1, 3, 3, LATENT).astype(np.float32)
    weights = np.random.RandomState(4).randn(*cells.shape)

    def two_steps(kernel):
        params["decoder"]["residual"]["kernel"] = kernel
        step = partial(reference.nondoubling_step, params["decoder"])
        return np.sum(weights * step(step(cells)))

    def developed(params):
        return jnp.sum(weights.astype(np.float32) * NONDOUBLING.develop(params, cells, 2))

    found = jax.jit(jax.grad(developed))(params)["decoder"]["residual"]["kernel"]
    kernel = params["decoder"]["residual"]["kernel"].astype(np.float64)
    tiny.close(found, reference.gradient(two_steps, kernel))


# ---- Baseline --------------------------------------------------------------------------------


def test_the_baseline_decodes_as_loops_over_its_cells_do():
    params = {"decoder": random_params(BASELINE)["decoder"]}
    weights = tiny.in_float64(params["decoder"])
    x = reference.linear(weights["linear"], Z).reshape(2, 2, 2, 16 * WIDTH)
    for i in range(4):
        x = reference.elu(
            reference.conv_transpose(
                x, **weights[f"conv_transpose{i}"], stride=2, padding=2, output_padding=1
            )
        )
    x = reference.conv_transpose(
        x, **weights["conv_transpose4"], stride=1, padding=4, output_padding=0
    )
    logits = jax.jit(BASELINE.decode)(params, Z)
    assert x.shape == (2, 28, 28, 1)
    tiny.close(logits[:, 2:30, 2:30], x)


def test_the_border_of_the_baseline_costs_exactly_nothing():
    params = {"decoder": random_params(BASELINE)["decoder"]}
    image = np.pad(np.ones((2, 28, 28, 1), np.float32), ((0, 0), (2, 2), (2, 2), (0, 0)))
    logits = jax.jit(BASELINE.decode)(params, Z)
    each_pixel = (np.reshape(a, (-1, 1, 1, 1)) for a in (logits, image))
    costs = np.reshape(bernoulli_log_likelihood(*each_pixel), (2, 32, 32))
    slopes = jax.grad(lambda l: jnp.sum(bernoulli_log_likelihood(l, image)))(logits)
    slopes = np.reshape(slopes, (2, 32, 32))
    border = np.ones((32, 32), bool)
    border[2:30, 2:30] = False
    assert np.all(costs[:, border] == 0) and np.all(slopes[:, border] == 0)
    assert np.all(costs[:, ~border] < 0) and np.all(slopes[:, ~border] > 0)


# ---- Images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_unpack_is_numpys_unpackbits_in_a_border_of_zeros(batch):
    bits = np.random.RandomState(0).randint(0, 256, (*batch, 98), dtype=np.uint8)
    images = jax.jit(models.unpack)(bits)
    assert images.shape == (*batch, 32, 32, 1) and images.dtype == np.float32
    expected = np.unpackbits(bits, axis=-1).reshape(-1, 28, 28)
    expected = np.pad(expected, [(0, 0), (2, 2), (2, 2)]).reshape(images.shape)
    np.testing.assert_array_equal(images, expected)
