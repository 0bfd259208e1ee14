"""The layers, plain and in the CPU's fast form: their values, gradients and initial weights."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from jax import lax

from vnca import layers
from vnca.fast import cpu

pytestmark = pytest.mark.usefixtures("quickly_compiled")

# size, stride, padding, height, width
CONVS = [
    (3, 1, 1, 5, 6),
    (3, 2, 0, 9, 7),
    (5, 1, 0, 7, 6),
    (5, 2, 2, 9, 10),
    (5, 2, 2, 4, 4),
]
# size, stride, padding, output padding, height, width
TRANSPOSES = [(5, 2, 2, 1, 2, 3), (5, 1, 4, 0, 6, 7), (3, 2, 0, 0, 3, 2)]
FORMS = {"plain": layers, "convolutions on a CPU": cpu, "products on a CPU": cpu}
every_form = pytest.mark.parametrize("form", FORMS)
every_module = pytest.mark.parametrize("nn", [layers, cpu], ids=["plain", "cpu"])


def draw(*shape, seed=0):
    return np.random.RandomState([seed, *shape]).randn(*shape)


@cache
def computed(form, name, *case):
    """Result and gradients (of x, kernel, bias) of a layer in one of its forms, float64."""
    x, kernel, bias, weights = arguments(name, *case)
    size, stride, padding, *more, height, width = case
    layer = partial(getattr(FORMS[form], name), stride=stride, padding=padding)
    if more:
        layer = partial(layer, output_padding=more[0])
    with pytest.MonkeyPatch.context() as patch, tiny.enable_x64(True):
        tiny.use_products(patch, form == "products on a CPU")

        @jax.jit
        def run(x, kernel, bias, weights):
            y, pull = jax.vjp(
                lambda *a: layer({"kernel": a[1], "bias": a[2]}, a[0]), x, kernel, bias
            )
            return y, *pull(weights)

        return [np.asarray(a) for a in run(x, kernel, bias, weights)]


def arguments(name, size, stride, padding, *rest):
    """x, kernel, bias, and the weights of the sum whose gradient is taken."""
    *more, height, width = rest
    x, kernel, bias = draw(2, height, width, 2), draw(size, size, 2, 3), draw(3)
    if name == "conv_transpose":
        kernel = kernel.swapaxes(2, 3)
    shape = getattr(reference, name)(x, kernel, bias, stride, padding, *more).shape
    return x, kernel, bias, draw(*shape, seed=1)


CASES = [("conv", *case) for case in CONVS] + [("conv_transpose", *case) for case in TRANSPOSES]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_form
@every_case
def test_a_convolution_is_what_loops_over_the_cells_give(case, form):
    name, size, stride, padding, *rest = case
    x, kernel, bias, _ = arguments(*case)
    expected = getattr(reference, name)(x, kernel, bias, stride, padding, *rest[:-2])
    np.testing.assert_allclose(computed(form, *case)[0], expected, rtol=1e-12, atol=1e-12)


@every_form
@every_case
def test_gradients_of_a_convolution_are_its_finite_differences(case, form):
    name, size, stride, padding, *rest = case
    *given, weights = arguments(*case)
    loops = getattr(reference, name)
    for i, slope in enumerate(computed(form, *case)[1:]):

        def weighted_sum(a, i=i):
            x, kernel, bias = given[:i] + [a] + given[i + 1 :]
            return np.sum(weights * loops(x, kernel, bias, stride, padding, *rest[:-2]))

        expected = reference.gradient(weighted_sum, given[i])
        np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-7)


@every_module
def test_a_transposed_convolution_is_the_adjoint_of_the_convolution(nn):
    x, y, kernel = draw(2, 8, 6, 3), draw(2, 4, 3, 2), draw(5, 5, 3, 2)

    @jax.jit
    def run(kernel, x, y):
        params = {"kernel": kernel, "bias": 0.0}
        there = nn.conv(params, x, 2, 2)
        return there, nn.conv_transpose(params, y, 2, 2, output_padding=1)

    with tiny.enable_x64(True):
        there, back = map(np.asarray, run(kernel, x, y))
    assert there.shape == y.shape and back.shape == x.shape
    np.testing.assert_allclose(np.sum(there * y), np.sum(x * back), rtol=1e-12)


@every_module
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4, 5)], ids=str)
def test_a_linear_layer_is_the_same_linear_map_of_every_cell(shape, nn):
    x, kernel, bias = draw(*shape), draw(5, 3), draw(3)
    weights = draw(*shape[:-1], 3, seed=1)
    with tiny.enable_x64(True):

        @jax.jit
        def run(kernel, bias, x, weights):
            y, pull = jax.vjp(
                lambda k, b, x: nn.linear({"kernel": k, "bias": b}, x), kernel, bias, x
            )
            return y, *pull(weights)

        found = [np.asarray(a) for a in run(kernel, bias, x, weights)]
    expected = [
        np.einsum("...i,io->...o", x, kernel) + bias,
        x.reshape(-1, 5).T @ weights.reshape(-1, 3),
        weights.reshape(-1, 3).sum(0),
        np.einsum("...o,io->...i", weights, kernel),
    ]
    for ours, loops in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, loops, rtol=1e-12, atol=1e-12)


@every_module
def test_gradients_inside_a_scan_are_those_of_the_steps_written_out(nn):
    x, kernel, bias, weights = draw(2, 6, 6, 2), draw(3, 3, 2, 2) / 4, draw(2), draw(2, 6, 6, 2)

    def scanned(kernel):
        params = {"kernel": kernel, "bias": bias}
        s, _ = lax.scan(lambda s, _: (nn.elu(nn.conv(params, s, padding=1)), None), x, length=3)
        return jnp.sum(weights * s)

    def loops(kernel):
        s = x
        for _ in range(3):
            s = reference.elu(reference.conv(s, kernel, bias, 1, 1))
        return np.sum(weights * s)

    with tiny.enable_x64(True):
        ours = np.asarray(jax.jit(jax.grad(scanned))(kernel))
    np.testing.assert_allclose(ours, reference.gradient(loops, kernel, 1e-5), rtol=1e-6, atol=1e-6)


INITS = {  # layer and the fan-in of its arrays
    "conv": (lambda key: layers.conv_init(key, 5, 16, 32), 25 * 16),
    "conv_transpose": (lambda key: layers.conv_transpose_init(key, 5, 32, 16), 25 * 32),
    "linear": (lambda key: layers.linear_init(key, 64, 128), 64),
}


@pytest.mark.parametrize("name", INITS)
def test_weights_begin_uniform_within_one_over_the_root_of_fan_in(name):
    init, fan_in = INITS[name]
    params = init(jax.random.key(0))
    for array in params.values():
        assert array.dtype == jnp.float32
        assert np.abs(array).max() <= fan_in**-0.5
        assert len(np.unique(array)) > 0.9 * array.size
    kernel = np.asarray(params["kernel"], np.float64)
    deviation = (3 * fan_in) ** -0.5  # of a uniform number in ±1/√fan_in
    assert np.abs(kernel).max() > 0.99 * fan_in**-0.5
    assert abs(kernel.mean()) < 5 * deviation / kernel.size**0.5
    assert abs(kernel.std() / deviation - 1) < 0.05


@pytest.mark.parametrize("name", INITS)
def test_another_key_gives_other_weights_and_the_same_key_the_same(name):
    init, _ = INITS[name]
    one, same, other = (init(jax.random.key(n)) for n in (0, 0, 1))
    for field in ("kernel", "bias"):
        assert np.array_equal(one[field], same[field])
        assert not np.equal(one[field], other[field]).any()
    assert not np.isin(one["bias"], one["kernel"]).any()  # the two do not share a stream


def test_a_layer_begun_at_zero_maps_everything_to_zero():
    params = layers.zeros_init(3, 4)
    assert {name: a.shape for name, a in params.items()} == {"kernel": (3, 4), "bias": (4,)}
    assert not np.any(layers.linear(params, jnp.ones((2, 3))))


@every_module
def test_elu_is_x_above_zero_and_exp_minus_one_below(nn):
    x = np.array([-200, -30, -2, -1e-3, -1e-6, 0, 1e-6, 0.5, 30, 1e4, 1e30], np.float32)
    expected = reference.elu(x.astype(np.float64))
    np.testing.assert_allclose(nn.elu(x), expected, rtol=1e-6)


@every_module
def test_slope_of_elu_is_one_at_and_above_zero_and_exp_below(nn):
    x = np.array([-200, -30, -2, -1e-3, 0, 0.5, 30, 1e4, 1e30], np.float32)
    expected = np.exp(np.minimum(x, 0).astype(np.float64))
    slope = jax.grad(lambda x: jnp.sum(nn.elu(x)))(x)
    np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-7)
