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

from vnca import layers
from vnca.fast import cpu
from vnca.likelihoods import logistic_mixture
from vnca.model import SettingError, make_likelihood, make_model
from vnca.models import baseline, clipped, doubling, nondoubling
from vnca.program.data import noise
from vnca.program.learner import make_learner
from vnca.program.order import deal
from vnca.training import init_state, make_update_call

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LATENT, WIDTH, STEPS = 4, 2, 2
DOUBLING = doubling.make(layers, tiny.DIGITS, LATENT, WIDTH, 5, STEPS)
NONDOUBLING = nondoubling.make(layers, tiny.DIGITS, LATENT, WIDTH, 2, (1, 3))
BASELINE = baseline.make(layers, tiny.DIGITS, LATENT, WIDTH, 28)
EVERY = pytest.mark.parametrize(
    "model", [DOUBLING, NONDOUBLING, BASELINE], ids=["doubling", "nondoubling", "baseline"]
)
NAMES = [*tiny.OF_MODELS, "healing"]
STEP = jax.jit(partial(doubling.nca_step, layers))
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
        ("celeba", 256, 9_732_416),
    ],
)
def test_the_number_of_parameters_is_the_published_one(config, latent_size, published):
    settings = importlib.import_module(f"configs.{config}").get_config().model
    settings.latent_size = latent_size
    params = jax.eval_shape(make_model(settings).init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(params)) == published
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("config", ["doubling", "nondoubling", "baseline"])
def test_the_same_sizes_give_the_same_functions_so_nothing_is_compiled_twice(config):
    get_config = importlib.import_module(f"configs.{config}").get_config
    model = make_model(get_config().model)
    assert make_model(get_config().model) == model
    smaller = get_config().model
    smaller.latent_size = 8
    assert make_model(smaller).decode is not model.decode


@pytest.mark.parametrize("name", NAMES)
def test_equal_settings_give_the_same_object_however_they_are_written(name):
    config = tiny.config(name).model
    model = make_model(config)
    fields = config.to_dict()
    as_in_json = {f: list(v) if isinstance(v, tuple) else v for f, v in fields.items()}
    for settings in (fields, as_in_json, dict(reversed(fields.items()))):
        same = make_model(settings)
        assert same == model and same.decode is model.decode
        assert make_likelihood(settings) is model.likelihood
    assert make_model(fields, cpu) != model


def test_one_set_of_cell_weights_serves_any_number_of_steps_and_doublings():
    models = [
        doubling.make(layers, tiny.DIGITS, LATENT, WIDTH, *sizes)
        for sizes in [(5, 1), (5, 8), (7, 3)]
    ]
    shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in models]
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


# ---- Images of other sizes, in colour --------------------------------------------------------


def of_size(name, size, colours, levels=16, **fields):
    """The tiny model of these images."""
    own = {"doubling": {"doublings": (size - 1).bit_length()}, "baseline": {"drawn_size": size}}
    if name == "healing":
        fields = {"channels": 16} | fields
    settings = tiny.config(name).model.to_dict() | own.get(name, {}) | fields
    return make_model(settings | {"size": size, "colours": colours, "levels": levels})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "colours"), [(16, 3), (64, 1), (128, 3)])
def test_a_model_of_any_size_encodes_its_images_and_decodes_as_many_logits(name, size, colours):
    model = of_size(name, size, colours)
    params = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((3, size, size, colours), np.float32)
    z = jax.ShapeDtypeStruct((3, model.latent_size), np.float32)
    assert params["encoder"]["conv0"]["kernel"].shape[2] == colours
    cells = (size // 16) ** 2  # of 16 channels, with the tiny width of 1
    assert params["encoder"]["linear"]["kernel"].shape == (16 * cells, 2 * model.latent_size)
    mean, logvar = jax.eval_shape(model.encode, params, x)
    assert mean.shape == logvar.shape == z.shape
    assert jax.eval_shape(model.decode, params, z).shape == x.shape
    assert jax.eval_shape(model.likelihood.log_prob, x, x).shape == (3,)
    if model.grow:
        stages = jax.eval_shape(model.grow, params, z)
        assert stages[-1].shape[1:] == x.shape
        sides = [stage.shape[2] for stage in stages]
        assert sides == ([2, 4, 8, 16, 32, 64, 128][: len(sides)] if name == "doubling" else [size])


@pytest.mark.parametrize("name", ["doubling", "nondoubling"])
def test_the_first_channels_of_a_cell_are_its_logits(name):
    model = of_size(name, 16, 3)
    cells = np.broadcast_to(Z[:, None, None], (2, 16, 16, LATENT))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)  # steps change nothing
    assert np.array_equal(jax.jit(model.decode)(params, Z), cells[..., :3])


REFUSED = [  # a model, images of which size and colours, its settings, and what it says of them
    ("doubling", 32, 1, {"doublings": 4}, "doublings=4: it must be 5 to 8 for images of 32×32"),
    ("doubling", 32, 1, {"doublings": 9}, "doublings=9: it must be 5 to 8 for images of 32×32"),
    ("doubling", 16, 1, {"doublings": 3}, "doublings=3: it must be 4 to 7 for images of 16×16"),
    ("doubling", 32, 3, {"latent_size": 2}, "latent_size=2: it must be at least 3, the logits"),
    ("nondoubling", 32, 3, {"latent_size": 2}, "latent_size=2: it must be at least 3, the logits"),
    ("baseline", 32, 1, {"drawn_size": 27}, "drawn_size=27: it must be 28, 30 or 32"),
    ("baseline", 64, 1, {"drawn_size": 28}, "drawn_size=28: it must be 60, 62 or 64"),
    (
        "healing", 16, 1, {"position_waves": 5, "channels": 40},
        "position_waves=5: it must be at most 4 for 16 rows",
    ),
    (
        "healing", 32, 3, {"channels": 10},
        "channels=10: it must be at least 11: the logits, the position and z",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "colours", "fields", "words"), REFUSED,
    ids=[f"{name}-{words.partition(':')[0]}" for name, *_, words in REFUSED],
)  # fmt: skip
def test_a_setting_that_a_model_cannot_have_is_refused_in_words(name, size, colours, fields, words):
    with pytest.raises(SettingError) as fault:
        of_size(name, size, colours, **fields)
    assert str(fault.value) == words


@pytest.mark.parametrize(
    ("name", "size", "colours", "fields"),
    [
        ("doubling", 32, 1, {"doublings": 5}),
        ("doubling", 32, 1, {"doublings": 8}),
        ("doubling", 32, 3, {"latent_size": 3}),
        ("nondoubling", 32, 3, {"latent_size": 3}),
        *(("baseline", 32, 1, {"drawn_size": side}) for side in (28, 30, 32)),
        ("healing", 16, 1, {"position_waves": 4, "channels": 40}),
        ("healing", 32, 3, {"channels": 11}),
    ],
)
def test_a_setting_at_its_limit_decodes_to_an_image(name, size, colours, fields):
    model = of_size(name, size, colours, **fields)
    params = jax.eval_shape(model.init, jax.random.key(0))
    z = jax.ShapeDtypeStruct((1, model.latent_size), np.float32)
    assert jax.eval_shape(model.decode, params, z).shape == (1, size, size, colours)


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


@pytest.mark.parametrize("kind", ["uint8", "int32", "bool"])
@pytest.mark.parametrize("platform", [None, "cpu", "gpu", "tpu"])
def test_images_and_latents_that_are_not_floats_are_refused_with_what_makes_them_so(platform, kind):
    words = f"^images and latents must be floats, not {kind}: .*as_floats"
    for name in "doubling", "nondoubling", "baseline":
        config = tiny.config(name)
        model = make_learner(config, platform is None, platform, "TPU v5 lite").model
        for function, shape in (model.encode, (2, 32, 32, 1)), (model.decode, (2, LATENT)):
            with pytest.raises(TypeError, match=words):
                jax.eval_shape(function, random_params(model), jax.ShapeDtypeStruct(shape, kind))


@EVERY
@pytest.mark.parametrize("shape", [(2, LATENT + 1), (2, 1, 1, LATENT)], ids=str)
def test_a_latent_of_another_shape_is_refused_in_words(model, shape):
    with pytest.raises(AssertionError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        jax.eval_shape(model.decode, random_params(model), jax.ShapeDtypeStruct(shape, np.float32))


# ---- Cells -----------------------------------------------------------------------------------


def test_doubling_makes_two_by_two_copies_of_each_cell():
    s = np.random.RandomState(0).randn(2, 3, 4, 5).astype(np.float32)
    assert np.array_equal(doubling.double(s), np.kron(s, np.ones((1, 2, 2, 1), np.float32)))


def test_the_crop_is_the_centre():
    x = np.arange(2 * 8 * 6).reshape(2, 8, 6, 1)
    assert np.array_equal(doubling.crop(x, 4), x[:, 2:6, 1:5])
    assert np.array_equal(doubling.crop(x, 6), x[:, 1:7])


@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 32), (33, 33, 32), (34, 31, 32)])
def test_a_grid_that_cannot_be_cropped_is_refused_with_both_sizes(height, width, size):
    with pytest.raises(ValueError, match=f"{height}×{width}.*{size}×{size}"):
        doubling.crop(np.zeros((1, height, width, 1)), size)


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
    model = doubling.make(layers, tiny.DIGITS, 2, 1, 6, 1)
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
    costs = np.reshape(tiny.DIGITS.log_prob(*each_pixel), (2, 32, 32))
    slopes = jax.grad(lambda l: jnp.sum(tiny.DIGITS.log_prob(l, image)))(logits)
    slopes = np.reshape(slopes, (2, 32, 32))
    border = np.ones((32, 32), bool)
    border[2:30, 2:30] = False
    assert np.all(costs[:, border] == 0) and np.all(slopes[:, border] == 0)
    assert np.all(costs[:, ~border] < 0) and np.all(slopes[:, ~border] > 0)


# ---- The models of CelebA ------------------------------------------------------------------------


def test_the_clipped_model_is_doubling_but_for_the_limits_of_its_code():
    sizes = layers, logistic_mixture(64, 3, 1), 16, 2, 6, 1
    plain, model = doubling.make(*sizes), clipped.make(*sizes)
    params = plain.init(jax.random.key(0))
    x = np.random.RandomState(0).rand(3, 64, 64, 3).astype(np.float32)
    small = params["encoder"]["linear"]
    z = x[:, 0, :16, 0]
    np.testing.assert_array_equal(model.decode(params, z), plain.decode(params, z))
    for scale in (1.0, 1e5):
        params["encoder"]["linear"] = jax.tree.map(lambda w, scale=scale: scale * w, small)
        mean, logvar = plain.encode(params, x)
        found = model.encode(params, x)
        np.testing.assert_array_equal(found[0], np.clip(mean, -100, 100))
        np.testing.assert_array_equal(found[1], np.clip(logvar, -14, 14))
        assert (np.abs(found[0]).max() == 100) == (scale > 1)


@pytest.mark.slow  # 48 steps of 256 channels, for 20 seconds
def test_an_update_of_celeba_as_published_is_finite():
    config = tiny.committed("celeba")
    config.train.batch_size = config.train.micro_batch = 2
    learner = make_learner(config)
    images = noise(learner.model.likelihood, 4)
    state = init_state(learner, config, images)
    before = jax.device_get(state.params)
    update = make_update_call(learner, config, jax.local_devices()[:1])
    state, metrics = update(state, images, deal(config, 1, len(images), 1), 1)
    loss, reconstruction, kl, norm = np.asarray(metrics[0])
    assert np.isfinite([loss, reconstruction, kl, norm]).all() and 0 < kl < 100
    assert 5 < loss / (64 * 64 * 3 * np.log(2)) < 20  # bits per dimension of noise
    moved = jax.tree.map(lambda x, y: np.any(x != y), jax.device_get(state.params), before)
    assert sum(jax.tree.leaves(moved)) > 0
