"""The CPU's layers: equal to the plain ones, and in the one layout that is fast in a loop."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax
from reference import equations, multiply_adds, numbers_like
from test_layers import FORMS, computed, every_case

from vnca import layers, training
from vnca.fast import cpu, gpu, tpu
from vnca.model import make_model
from vnca.models import doubling
from vnca.pool import Pool, fresh_images
from vnca.program import arithmetic
from vnca.program.data import noise
from vnca.program.learner import make_learner

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ON_CPU = [form for form, nn in FORMS.items() if nn is cpu]


# ---- Agreement with the plain layers ---------------------------------------------------------


@every_case
@pytest.mark.parametrize("form", ON_CPU)
def test_convolutions_of_a_cpu_agree_with_the_plain_ones_in_values_and_gradients(case, form):
    for fast, plain in zip(computed(form, *case), computed("plain", *case), strict=True):
        np.testing.assert_allclose(fast, plain, rtol=1e-11, atol=1e-11)


def test_elu_of_a_cpu_is_right_to_a_millionth_of_its_value():
    magnitudes = np.logspace(-37, 2, 100_001)
    ends = [0, np.inf, -np.inf, -87, -np.log(2) / 2, np.finfo(np.float32).min]
    x = np.float32(np.concatenate([magnitudes, -magnitudes, np.linspace(-20, 0, 100_001), ends]))
    exact = np.where(x > 0, x, np.expm1(np.minimum(x, 0, dtype=np.float64)))
    np.testing.assert_allclose(jax.jit(cpu.elu)(x), exact, rtol=1e-6, atol=0)
    slopes = jax.vmap(jax.grad(cpu.elu))(x)
    np.testing.assert_allclose(slopes, np.where(x > 0, 1, np.exp(np.minimum(x, 0))), atol=1e-6)
    assert np.isnan(cpu.elu(np.float32(np.nan)))
    assert cpu.elu(jnp.bfloat16(-1)).dtype == jnp.bfloat16


def config_and_learner(name, nn):
    model = name.removesuffix(" in colour")
    if model == "healing":
        config = tiny.committed("small_healing")
        config.model.update(
            latent_size=3, encoder_width=1, steps=2, train_steps=(2, 3), channels=9, hidden=4,
            position_waves=1,
        )  # fmt: skip
        config.train.update(batch_size=8, pool_size=16, pool_from=1, encoder_from=None)
    else:
        config = tiny.config(model, train__batch_size=8)
    if model != name:
        config.model.update(size=16, colours=3, levels=16)
        config.model.update({"doubling": {"doublings": 4}, "healing": {"channels": 11}}[model])
        config.train.damage_size = 8
    config.seed = 5  # so that no form passes that draws with the default, 0
    return config, make_learner(config, plain=nn is layers, platform="cpu")


@cache
def gradient(name, nn):
    return gradient_of(*config_and_learner(name, nn))


def gradient_of(config, learner, compute=lambda f, *args: jax.device_get(jax.jit(f)(*args))):
    """The gradient and the loss terms of a tiny model whose parameters are all random."""
    config, pool = config.copy_and_resolve_references(), ()
    config.train.micro_batch = config.train.batch_size // 2
    shapes = jax.eval_shape(learner.model.init, jax.random.key(0))
    params = numbers_like(shapes, 1, 0.1)
    if learner.model.develop:
        random = np.random.RandomState(2)
        z = jax.ShapeDtypeStruct((config.train.pool_size, learner.model.latent_size), np.float32)
        cells = random.randn(*jax.eval_shape(learner.model.initial_cells, z).shape)
        pool = Pool(np.float32(cells)[None], np.arange(len(cells), dtype=np.int32)[None])
    state = training.State(params, None, None, np.int32(config.seed), pool)

    def run(state, images, indices):
        return learner.gradient(learner.model, config, state, 1, images, indices)[:2]

    fresh = np.arange(fresh_images(config), dtype=np.int32)
    axes = training.State(None, None, None, None, 0)
    across = jax.vmap(run, (axes, None, 0), axis_name="devices")
    return compute(across, state, noise(learner.model.likelihood, 64), fresh[None])


@pytest.mark.parametrize(
    "products",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["products", "convolutions"],
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "healing"))
        for name in (*tiny.OF_MODELS, "healing", "doubling in colour", "healing in colour")
    ],
)
def test_a_model_has_the_plain_loss_and_gradients_on_a_cpus_layers(name, products, monkeypatch):
    tiny.use_products(monkeypatch, products)
    gradient_on_cpu = gradient.__wrapped__  # not from the cache: it may be of the other form
    fast, plain = gradient_on_cpu(name, cpu), gradient(name, layers)
    pairs = zip(jax.tree.leaves_with_path(fast), jax.tree.leaves(plain), strict=True)
    layers_of = {}  # a bias of one number can be a sum that nearly cancels, so: kernel and bias
    for (path, a), b in pairs:
        assert np.abs(b).max() > 0, path
        layers_of.setdefault(path[:-1], []).append((np.abs(a - b).max(), np.abs(b).max()))
    for path, found in layers_of.items():
        differences, sizes = zip(*found, strict=True)
        assert max(differences) <= 1e-5 * max(sizes), path


# ---- DoublingVNCA ----------------------------------------------------------------------------


def with_sizes(learner):
    """The learner, and a list to which its encoder adds how many images it is given at once."""
    sizes = []

    def encode(params, x):
        sizes.append(len(x))
        return learner.model.encode(params, x)

    return learner._replace(model=learner.model._replace(encode=encode)), sizes


def test_an_encoder_that_runs_once_has_the_gradient_of_micro_batches():
    # Of a baseline, which compiles faster than the doubling models that take this form.
    config, learner = config_and_learner("baseline", layers)
    learner, sizes = with_sizes(learner)
    fours = gradient_of(config, learner)
    assert set(sizes) == {4}
    sizes.clear()
    at_once = gradient_of(config, learner._replace(gradient=cpu.batch_gradient))
    assert set(sizes) == {8}
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(fours))
    chex.assert_trees_all_close(at_once, fours, rtol=1e-5, atol=1e-6)


def test_an_encoder_whose_batch_is_large_takes_micro_batches(monkeypatch):
    monkeypatch.setattr(cpu, "MOST_ENCODED", 7)
    config = tiny.config(train__batch_size=8)
    learner, sizes = with_sizes(make_learner(config, platform="cpu"))
    gradient_of(config, learner, compute=jax.eval_shape)
    assert set(sizes) == {4}


@pytest.mark.parametrize(
    "name, channels, plain, platform, expected",
    [
        ("doubling", 64, False, "cpu", 8),
        ("doubling", 65, False, "cpu", 4),
        pytest.param("doubling", 64, True, "cpu", 4, marks=pytest.mark.slow),
        pytest.param("doubling", 64, False, "gpu", 4, marks=pytest.mark.slow),
        pytest.param("baseline", 64, False, "cpu", 4, marks=pytest.mark.slow),
    ],
)
def test_the_encoder_of_narrow_doubling_models_runs_once_on_a_cpu(
    name, channels, plain, platform, expected
):
    config = tiny.config(name, train__batch_size=8, model__latent_size=channels)
    learner, sizes = with_sizes(make_learner(config, plain, platform, device_kind="H100"))
    gradient_of(config, learner, compute=jax.eval_shape)
    assert set(sizes) == {expected}


@pytest.mark.parametrize(
    "name, field, has_channels",
    [
        ("doubling", "latent_size", True),
        ("nondoubling", "latent_size", True),
        ("healing", "channels", True),
        ("baseline", "latent_size", False),
    ],
)
def test_cells_of_64_channels_are_few_and_a_model_without_cells_has_none(name, field, has_channels):
    for channels in 64, 65:
        model = make_model(tiny.config(name, **{f"model__{field}": channels}).model)
        assert cpu.has_few_channels(model) == (has_channels and channels == 64)


def fast_and_given(**fields):
    config = tiny.config("doubling", **fields)
    model = tiny.learner_of(config, cpu).model
    return cpu.fast_model(model, config.model), model


@pytest.mark.parametrize("size", [1, 3, 5])
def test_channels_first_layers_agree_with_the_plain_ones_in_values_and_gradients(size):
    side, inputs, outputs = 4, 3, 2
    random = np.random.RandomState(0)
    first = {"kernel": random.randn(size, size, inputs, outputs), "bias": random.randn(outputs)}
    second = {"kernel": random.randn(outputs, inputs), "bias": random.randn(inputs)}
    x, weights = random.randn(2, 2, side, side, inputs)

    def plain(first, second, x):
        return layers.linear(second, layers.elu(layers.conv(first, x, padding=size // 2)))

    def fast(first, second, x):
        nn = cpu.channels_first(side)
        s = nn.conv(first, x.reshape(-1, inputs).T, padding=size // 2)
        return nn.linear(second, nn.elu(s)).T.reshape(x.shape)

    found = []
    with tiny.enable_x64(True):
        for form in (plain, fast):
            y, pull = jax.vjp(jax.jit(form), first, second, x)
            found.append(jax.device_get((y, pull(weights))))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), *found)


def test_channels_first_layers_compute_in_the_dtype_of_the_cells_and_sum_gradients_in_float32():
    params, s = layers.conv_init(jax.random.key(0), 3, 2, 2), jnp.ones((2, 16), jnp.bfloat16)
    loss = jax.value_and_grad(lambda p, s: cpu.channels_first(4).conv(p, s, padding=1).sum())
    jaxpr = jax.make_jaxpr(loss)(params, s)
    assert [v.aval.dtype for v in jaxpr.jaxpr.outvars] == [jnp.bfloat16, jnp.float32, jnp.float32]
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert {str(v.aval.dtype) for e in products for v in e.invars} == {"bfloat16"}
    results = sorted(str(e.outvars[0].aval.dtype) for e in products)
    assert results == ["bfloat16", "bfloat16", "float32"]  # the last is the kernel's gradient


def test_logits_of_channels_first_steps_are_those_of_the_model():
    fast, model = fast_and_given(model__steps_per_doubling=2)
    params = numbers_like(jax.eval_shape(model.init, jax.random.key(0)), 1, 0.1)
    z = np.float32(np.random.RandomState(2).randn(3, model.latent_size))
    logits = jax.jit(model.decode)(params, z)
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(jax.jit(fast.decode)(params, z), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # traces two models, for 3 seconds
def test_a_narrow_model_stacks_no_arrays_of_large_grids():
    largest = []
    for model in fast_and_given(model__steps_per_doubling=2):
        params = jax.eval_shape(model.init, jax.random.key(0))
        z = jax.ShapeDtypeStruct((3, model.latent_size), np.float32)
        loss = jax.grad(lambda params, z, model=model: model.decode(params, z).sum())
        scans = [
            e for e in equations(jax.make_jaxpr(loss)(params, z)) if e.primitive.name == "scan"
        ]
        stacks = [v.aval.size for e in scans for v in e.outvars if len(v.aval.shape) > 2]
        largest.append(max(stacks) / (2 * 3 * model.latent_size))  # steps, images, channels
    assert largest == [16 * 16, 32 * 32]  # cells of a grid


@pytest.mark.parametrize("field", ["latent_size", "steps_per_doubling"])
def test_a_wide_or_long_model_stays_as_it_is(field):
    fast, model = fast_and_given(**{f"model__{field}": 65})
    assert fast is model


# ---- HealingVNCA -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, changing", [("healing", 2), ("healing in colour", 4)])
def test_the_model_that_heals_decodes_with_one_convolution_of_what_no_step_changes(name, changing):
    (_, plain), (_, fast) = (config_and_learner(name, nn) for nn in (layers, cpu))
    params = numbers_like(jax.eval_shape(plain.model.init, jax.random.key(0)), 1, 0.5)
    z = np.float32(np.random.RandomState(2).randn(2, 3))
    logits = jax.jit(plain.model.decode)(params, z)
    assert np.ptp(logits) > 0.1
    found = jax.jit(fast.model.decode)(params, z)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)

    def kernel_sizes(jaxpr):
        linear = ("conv_general_dilated", "dot_general")
        return [e.invars[1].aval.size for e in equations(jaxpr) if e.primitive.name in linear]

    decode = jax.make_jaxpr(fast.model.decode)(params, z)
    (steps,) = [e for e in equations(decode) if e.primitive.name == "scan"]
    of_steps = [3 * 3 * changing * 4, 4 * changing]
    assert kernel_sizes(steps.params["jaxpr"]) == of_steps
    assert kernel_sizes(decode) == [3 * 3 * 7 * 4, *of_steps]  # the other 7 channels, once


@pytest.mark.parametrize("name, changing", [("healing", 2), ("healing in colour", 4)])
def test_lost_cells_inherit_and_grow_again_as_in_the_plain_method(name, changing):
    (_, plain), (_, fast) = (config_and_learner(name, nn) for nn in (layers, cpu))
    params = numbers_like(jax.eval_shape(plain.model.init, jax.random.key(0)), 1, 0.1)
    random = np.random.RandomState(2)
    cells = np.array(plain.model.initial_cells(np.float32(random.randn(2, 3))))
    cells[..., :changing] = random.randn(*cells[..., :changing].shape)
    cells[0, 5:9, 7:12] = 0  # of the first image: two steps fill it
    grown = [jax.jit(m.model.develop)(params, cells, np.int32(3)) for m in (plain, fast)]
    assert np.abs(grown[0][0, 5:9, 7:12, changing:]).min() > 0
    np.testing.assert_allclose(grown[1], grown[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lost, heals", [(0, 0), (1, 1), (3, 2)])  # the side of a square; steps
def test_the_model_that_heals_convolves_what_cells_keep_at_first_and_where_one_is_lost(
    lost, heals, monkeypatch
):
    convolve, channels = cpu._convolve_cells, []

    def counted(s, kernel, side):
        channels.append(len(s))
        return convolve(s, kernel, side)

    monkeypatch.setattr(cpu, "_convolve_cells", counted)
    _, learner = config_and_learner("healing", cpu)
    params = numbers_like(jax.eval_shape(learner.model.init, jax.random.key(0)), 1, 0.1)
    cells = np.ones((1, 32, 32, 9), np.float32)
    cells[:, 9 : 9 + lost, 9 : 9 + lost] = 0
    with jax.disable_jit():  # so that of two branches the one that is taken is counted
        learner.model.develop(params, cells, 2)
    assert channels.count(2) == 2  # what steps change; the third step, the most, is skipped
    assert channels.count(7) == 1 + heals and len(channels) == 3 + heals  # position and z
    with pytest.raises(ValueError, match="for 3 at most"):
        learner.model.develop(params, cells, 4)


# ---- The program -----------------------------------------------------------------------------


@pytest.mark.parametrize("products", [True, False], ids=["products", "convolutions"])
def test_values_and_gradients_are_in_the_one_layout_that_is_fast_in_a_loop(products, monkeypatch):
    tiny.use_products(monkeypatch, products)

    def loss(params, x):
        x = cpu.elu(cpu.conv(params["big"], x, 2, 2))
        x, _ = lax.scan(lambda x, _: (cpu.conv(params["same"], x, padding=1), None), x, length=2)
        x = cpu.linear(params["linear"], x)
        return jnp.sum(cpu.conv_transpose(params["up"], x, 2, 2, 1) ** 2)

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "big": layers.conv_init(keys[0], 5, 1, 2),
        "same": layers.conv_init(keys[1], 3, 2, 2),
        "linear": layers.linear_init(keys[2], 2, 2),
        "up": layers.conv_transpose_init(keys[3], 5, 2, 1),
    }
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, jnp.ones((1, 12, 12, 1)))
    found = {"conv_general_dilated": [], "dot_general": []}
    for e in equations(jaxpr):
        found.get(e.primitive.name, []).append(e)
    # Batch, channels, space of x and result; outputs, inputs, space of the kernel.
    layout = (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)
    for e in found["conv_general_dilated"]:
        assert tuple(e.params["dimension_numbers"]) == layout
    for e in found["dot_general"]:  # of matrices: more axes would be transposed in memory
        assert [v.aval.ndim for v in e.invars] == [2, 2]
    # Of each of four layers: the value, and the gradients in x and kernel. For many cells, the last
    # is a product in a loop over the kernel's rows.
    expected = (0, 12) if products else (9, 3)
    assert tuple(map(len, found.values())) == expected


def form_of(function, *shapes):
    """Whether a function of arrays of these shapes is a product or a convolution."""
    names = {"dot_general": "product", "conv_general_dilated": "convolution"}
    jaxpr = jax.make_jaxpr(function)(*map(jnp.ones, shapes))
    [e] = [e for e in equations(jaxpr) if e.primitive.name in names]
    return "dilated " * (e.params.get("lhs_dilation") == (2, 2)) + names[e.primitive.name]


@pytest.mark.parametrize(
    "side, inputs, stride, expected",
    [
        (32, 1, 1, "product"),
        (16, 24, 2, "convolution"),
        (8, 48, 2, "convolution"),
        (4, 96, 2, "product"),
    ],
)
def test_the_shape_chooses_the_form_of_a_convolution(side, inputs, stride, expected):
    def layer(x, kernel):
        return cpu.convolve(x, kernel, stride, 2)

    assert form_of(layer, (16, side, side, inputs), (5, 5, inputs, 2 * inputs)) == expected


@pytest.mark.parametrize(
    "side, outputs, expected",
    [(16, 32, "dilated convolution"), (16, 12, "convolution"), (8, 24, "product")],
)
def test_the_shape_chooses_the_form_of_a_transposed_convolution(side, outputs, expected):
    def layer(x, kernel):
        return cpu.convolve_transpose(x, kernel, 2, 2, 1)

    assert form_of(layer, (16, side, side, 2 * outputs), (5, 5, outputs, 2 * outputs)) == expected


@pytest.mark.parametrize("side, expected", [(32, "convolution"), (28, "product")])
def test_the_shape_chooses_the_form_of_a_gradient_of_one_channels_kernel(side, expected):
    def gradient(x, g):
        return cpu._kernel_gradient(x, g, 1, 2 + (32 - side) // 2, 5, jnp.float32)

    assert form_of(gradient, (16, side, side, 1), (16, 32, 32, 12)) == expected


@pytest.mark.parametrize("name", [pytest.param("doubling", marks=pytest.mark.slow), "baseline"])
def test_the_work_of_a_device_is_its_share_of_the_batch(name, monkeypatch):
    # As products over patches: a convolution would also count the zeros between spread inputs.
    tiny.use_products(monkeypatch)
    work = {}
    for devices in (1, 2, 8):
        config = tiny.config(name, train__micro_batch=2)
        if name == "baseline":  # products compute all that it draws, also what a border covers
            config.model.drawn_size = 32
        learner = make_learner(config, platform="cpu")
        state = jax.eval_shape(lambda m=learner, c=config: training.init_state(m, c, None))
        images = noise(tiny.DIGITS, 64)
        order = np.zeros((devices, 3, config.train.batch_size // devices), np.int32)
        call = training.make_update_call(learner, config)
        program = jax.make_jaxpr(call)(state, images, order, np.int32(3))
        work[devices] = multiply_adds(program.jaxpr)  # of one of the updates
    assert work[1] == 2 * work[2] == 8 * work[8]
    forward = config.train.batch_size * sum(arithmetic.forward(make_model(config.model)))
    assert work[1] == 3 * forward  # the gradient costs twice the value


# ---- Shapes ----------------------------------------------------------------------------------


@cache
def logits_in_colour(platform, device_kind):
    """The logits of a tiny doubling model of 16×16 pixels in colour, in the form of a platform or,
    if that is None, the plain one; and the gradient of their weighted sum."""
    config = tiny.config(
        model__size=16, model__colours=3, model__levels=16, model__doublings=4,
        model__steps_per_doubling=2,
    )  # fmt: skip
    model = make_learner(config, platform is None, platform, device_kind).model
    params = numbers_like(jax.eval_shape(model.init, jax.random.key(0)), 1, 0.1)
    z = np.float32(np.random.RandomState(2).randn(2, model.latent_size))
    weights = np.float32(np.random.RandomState(3).randn(2, 16, 16, 3))

    @jax.jit
    def run(decoder, z):
        logits, pull = jax.vjp(lambda d, z: model.decode({"decoder": d}, z), decoder, z)
        return logits, pull(weights)

    with jax.default_matmul_precision("highest"):  # else a TPU's form rounds cells to bfloat16
        return jax.device_get(run(params["decoder"], z))


@pytest.mark.parametrize(
    "platform, device_kind",
    [
        pytest.param("cpu", None, marks=pytest.mark.slow),  # compiles for 6 seconds
        ("gpu", None),
        *(pytest.param("tpu", f"TPU {v}", marks=pytest.mark.slow) for v in ("v3", "v5 lite")),
    ],
)
def test_a_doubling_model_in_colour_has_the_plain_logits_and_gradient(platform, device_kind):
    plain = logits_in_colour(None, None)
    assert plain[0].shape == (2, 16, 16, 3) and np.ptp(plain[0], axis=(0, 1, 2)).min() > 0.1
    fast = logits_in_colour(platform, device_kind)
    for ours, expected in zip(*map(jax.tree.leaves, (fast, plain)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "module, platform", [(doubling, None), (cpu, "cpu"), (gpu, "gpu"), (tpu, "tpu")]
)
def test_a_grid_that_does_not_double_is_noticed(monkeypatch, module, platform):
    config = tiny.config("doubling", model__latent_size=5)
    kinds = {"platform": platform, "device_kind": "TPU v3"}
    model = make_learner(config, plain=platform is None, **kinds).model
    params = jax.eval_shape(model.init, jax.random.key(0))
    z = jax.ShapeDtypeStruct((2, 5), jnp.float32)
    assert jax.eval_shape(model.decode, params, z).shape == (2, 32, 32, 1)
    monkeypatch.setattr(module, "double", lambda s: s)
    with pytest.raises(AssertionError):
        jax.eval_shape(lambda *given: model.decode(*given), params, z)
