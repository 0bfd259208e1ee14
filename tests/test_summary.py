"""What a model costs: against published numbers, and against what JAX would run and keep."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vnca import layers, losses
from vnca.models import make_model
from vnca.summary import kept_activations, operations, summary, update_flops

PUBLISHED = {"doubling": 6_585_088, "nondoubling": 5_042_432, "baseline": 10_282_497}
CELL_STEPS = 10_912  # of the doubling model, an image: 8 steps each of 4, 16, 64, 256, 1024 cells


def config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def part(counts, name):
    return sum(count for operation, count in counts.items() if operation.startswith(name))


def multiply_adds(jaxpr):
    """Of all convolutions in a jaxpr: each of the result's numbers sums over a window's inputs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += equation.outvars[0].aval.size * math.prod(kernel) // outputs
        times = equation.params.get("length", 1)  # of a scan
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * multiply_adds(inner)
    return total


def test_a_cell_of_the_doubling_model_costs_what_is_published():
    counts = operations(config("doubling").model)
    assert part(counts, "decoder/perceive") == CELL_STEPS * 9 * 256**2
    assert part(counts, "decoder/") == CELL_STEPS * 1_179_648
    assert round(part(counts, "decoder/") / 1e9, 1) == 12.9


def test_a_step_of_the_nondoubling_model_costs_what_is_published():
    model = config("nondoubling").model
    steps = {n: part(operations(model, n), "decoder/") for n in (1, 48)}
    assert round(steps[1] / 1e6) == 168
    assert round(steps[48] / 1e9, 1) == 8.1
    assert part(operations(model), "decoder/") == 36 * steps[1]


@pytest.mark.parametrize(("name", "tera"), [("doubling", 2.5), ("nondoubling", 6.2)])
def test_an_update_costs_what_is_published(name, tera):
    assert round(update_flops(config(name)) / 1e12, 1) == tera


def test_the_baseline_costs_what_is_published():
    assert round(sum(operations(config("baseline").model).values()) / 1e6) == 108
    assert round(update_flops(config("baseline")) / 1e9) == 21


@pytest.mark.parametrize("name", ["doubling", "nondoubling", "baseline", "quickstart"])
def test_the_count_by_hand_is_that_of_the_program(name, monkeypatch):
    # As patches, a transposed convolution multiplies each input once with each tap, as counted;
    # as a convolution with spread input it multiplies the zeros between, too.
    monkeypatch.setattr(layers, "_gather", lambda size: True)
    settings = config(name).model
    model = make_model(settings)
    params = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, 32, 32, 1), np.float32)
    z = jax.ShapeDtypeStruct((1, settings.latent_size), np.float32)
    encode = jax.make_jaxpr(lambda p, x: tuple(model.encode(p, x)))(params, image)
    decode = jax.make_jaxpr(lambda p, z: model.decode(p, z))(params, z)
    counts = operations(settings)
    assert multiply_adds(encode.jaxpr) == part(counts, "encoder/")
    assert multiply_adds(decode.jaxpr) == part(counts, "decoder/")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_memory_by_hand_is_what_the_gradient_keeps_of_an_image(name, monkeypatch):
    monkeypatch.setattr(layers, "_gather", lambda size: False)
    settings = config(name)
    model = make_model(settings.model)

    def kept(images):
        """Numbers that JAX keeps between the loss and its gradient, parameters among them."""

        def loss(params, x, noise):
            if not model.develop:
                log_px, kl = losses.elbo(model, params, x, noise)
                return jnp.sum(log_px - kl)
            mean, logvar = model.encode(params, x)
            s = model.seed(mean + jnp.exp(0.5 * logvar) * noise)
            s = model.develop(params, s, settings.model.steps)
            kl = losses.gaussian_kl(mean, logvar)
            return jnp.sum(losses.bernoulli_log_likelihood(s[..., :1], x) - kl)

        params = jax.eval_shape(model.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((images, 32, 32, 1), np.float32)
        noise = jax.ShapeDtypeStruct((images, settings.model.latent_size), np.float32)
        pull = jax.eval_shape(lambda p, *a: jax.vjp(lambda p: loss(p, *a), p)[1], params, x, noise)
        return sum(a.size for a in jax.tree.leaves(pull) if a.dtype == np.float32)

    assert kept_activations(settings) == pytest.approx(kept(2) - kept(1), rel=0.05)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_summary_lists_every_array_with_the_range_that_it_begins_in(name, monkeypatch):
    lines = []
    summary(config(name), None, lines.append)

    def largest(key, shape, *, minval, maxval):
        assert minval == -maxval
        return np.full(shape, maxval, np.float32)

    monkeypatch.setattr(jax.random, "uniform", largest)
    words = {line.split()[0]: line.split() for line in lines if "/" in line.split()[0]}
    params = make_model(config(name).model).init(jax.random.key(0))
    for path, array in jax.tree.leaves_with_path(params):
        found = words[jax.tree_util.keystr(path, simple=True, separator="/")]
        assert found[1] == "×".join(map(str, array.shape))
        assert found[2] == f"{array.size:,}"
        assert float(found[-1]) == pytest.approx(float(np.ravel(array)[0]), abs=1e-5)
    total = next(line for line in lines if line.startswith("total"))
    assert total.split()[1] == f"{PUBLISHED[name]:,}"
    assert f"published: {PUBLISHED[name]:,}" in total


def test_a_summary_of_other_sizes_claims_no_published_count():
    lines, settings = [], config("doubling")
    settings.model.encoder_width = 16
    summary(settings, None, lines.append)
    assert not [line for line in lines if "published" in line]
