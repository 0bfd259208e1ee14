"""What a model costs: against published numbers, and against what JAX would run and keep."""

import importlib
from functools import cache

import jax
import numpy as np
import pytest

from vnca.fast import cpu
from vnca.program.arithmetic import (
    cell_channels,
    hidden_channels,
    inherited_channels,
    operations,
    update_flops,
)
from vnca.program.method import make_method, make_model
from vnca.report.summary import kept_activations, summary, training_memory

PUBLISHED = {"doubling": 6_585_088, "nondoubling": 5_042_432, "baseline": 10_282_497}
CELL_STEPS = 10_912  # of the doubling model, an image: 8 steps each of 4, 16, 64, 256, 1024 cells


def config(name):
    if name != "inheriting":
        return importlib.import_module(f"configs.{name}").get_config()
    made = config("small_nondoubling")
    made.model.update(latent_size=16, channels=40, hidden=96, position_waves=3, steps=12)
    return made


def part(counts, name):
    return sum(count for operation, count in counts.items() if operation.startswith(name))


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


def test_what_is_inherited_is_computed_once_as_it_has_no_gradient():
    settings = config("inheriting")
    inherited = 12 * 1024 * 9 * (16 + 4 * 3 + 1) ** 2  # at T = 12, of z, a position and a count
    others = sum(operations(settings.model, 12).values()) - inherited
    assert update_flops(settings) == 2 * 16 * (3 * others + inherited)


def test_the_baseline_costs_what_is_published():
    assert round(sum(operations(config("baseline").model).values()) / 1e6) == 108
    assert round(update_flops(config("baseline")) / 1e9) == 21


@cache
def flops_by_xla(size, kernel, stride, transposed):
    """XLA's count of one bare convolution of one image onto (transposed: from) a size×size grid.

    XLA leaves out the taps on padding and on the zeros between spread cells, so the input is padded
    beforehand; a transposed convolution at padding k − 1 has each input meet every tap.
    """
    *window, inputs, _ = kernel
    layout, strides, options = ("NHWC", "HWIO", "NHWC"), (stride, stride), {"padding": "VALID"}
    if not window:  # a linear map of each cell
        x, layout, strides = (size * size, inputs), ("NC", "IO", "NC"), ()
    elif transposed:
        x, strides = (1, size, size, inputs), (1, 1)
        options = {"padding": [(4, 4)] * 2, "lhs_dilation": (stride, stride)}
    else:
        x = (1, *((size - 1) * stride + k for k in window), inputs)
    program = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, strides, dimension_numbers=layout, **options
        )
    )
    shapes = (jax.ShapeDtypeStruct(shape, np.float32) for shape in (x, kernel))
    return program.lower(*shapes).cost_analysis()["flops"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_layer_costs_what_xla_says_of_the_bare_convolution(name):
    settings = config(name).model
    grids = {"doubling": [2, 4, 8, 16, 32] * 8, "nondoubling": [32] * 36}.get(name)
    params = jax.eval_shape(make_model(settings).init, jax.random.key(0))
    kernels = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): array.shape
        for path, array in jax.tree.leaves_with_path(params)
        if array.ndim > 1
    }
    counts = operations(settings)
    assert counts.keys() == kernels.keys()
    for layer, kernel in kernels.items():
        part, last = layer.split("/")[0], layer[-1]
        if "transpose" in layer:
            kernel = (*kernel[:2], kernel[3], kernel[2])
            calls = [(2 << int(last), kernel, 1 if last == "4" else 2, True)]
        elif part == "encoder" and "conv" in layer:
            calls = [(32 >> int(last), kernel, 1 if last == "0" else 2, False)]
        elif grids and part == "decoder":
            calls = [(size, kernel, 1, False) for size in grids]
        else:
            calls = [(1, kernel, 1, False)]
        by_xla = sum(flops_by_xla(*call) for call in calls)
        assert 2 * counts[layer] == pytest.approx(by_xla, rel=0.01), layer


def kept_by_hand(config):
    """How many values the gradient keeps for one image: the inputs and outputs that the gradient of
    each layer needs, counted by hand.

    The count is that of a CPU's layers, whose ELU needs only its output for the gradient.
    """
    model = config.model
    width, latent = model.encoder_width, model.latent_size
    encoder = 1024 + sum((1024 >> 2 * i) * (width << i) for i in range(5)) + 3 * latent
    if model.name == "baseline":
        return encoder + latent + sum((4 << 2 * i) * (width << 4 - i) for i in range(5)) + 28 * 28
    if model.name in ("nondoubling", "healing"):
        # In each step: its input, its activation, and zeros that JAX keeps as the gradient of the
        # inherited channels.
        widths = cell_channels(model) + hidden_channels(model) + inherited_channels(model)
        return encoder + max(model.steps, *model.train_steps) * widths * 1024
    cells = model.steps_per_doubling * sum(4**k for k in range(1, model.doublings + 1))
    # In each step: its input, the input and the ELU of four blocks, and the last input.
    return encoder + cells * 10 * latent


@pytest.mark.parametrize("name", [*PUBLISHED, "inheriting"])
def test_the_memory_is_what_the_gradient_keeps_of_an_image(name):
    settings = config(name)
    kept = kept_activations(settings, make_model(settings.model, cpu))
    assert kept_by_hand(settings) == pytest.approx(kept, rel=0.05)


def test_the_memory_is_that_of_the_method_in_use():
    fast, plain = (
        kept_activations(config("quickstart"), make_method(config("quickstart"), plain=p).model)
        for p in (False, True)
    )
    assert 1.5 * fast < plain < 2 * fast  # the plain ELU keeps its input, too


def test_an_encoder_that_runs_once_keeps_its_activations_of_all_images():
    settings = config("quickstart")
    once, plain = (
        training_memory(settings, make_method(settings, plain=p, platform="cpu"), devices=2)
        for p in (False, True)
    )
    elus = [(32 >> k) ** 2 * (8 << k) for k in range(5)]
    of_image = 32 * 32 + sum(elus) + elus[-1]  # the image; the last ELU also as a flat vector
    assert once["activations of the encoder, all 8 images"] == 8 * of_image
    part = "activations for the gradient, micro-batch of 2 of 8 images"
    model = make_method(settings, platform="cpu").model
    assert once[part] == 2 * (kept_activations(settings, model) - of_image)
    assert part in plain and not any("encoder" in name for name in plain)


def test_the_pool_is_split_and_its_rows_are_whole_on_each_device():
    settings = config("nondoubling")  # 128 images, of which 64 are fresh; 1,024 rows of 512 KiB
    memory = training_memory(settings, make_method(settings, platform="cpu"), devices=8)
    grid = 32 * 32 * 128
    assert memory["pool, split over 8 devices"] == 1024 * grid // 8
    assert memory["cells taken from the pool, and cells put back"] == (192 + 24 + 8) * grid


def test_the_micro_batch_is_that_of_training_where_it_does_not_divide_the_batch():
    settings = config("small_baseline")
    settings.train.batch_size, settings.train.micro_batch = 20, 4
    names = training_memory(settings, make_method(settings, platform="cpu"), devices=2)
    assert "activations for the gradient, micro-batch of 2 of 10 images" in names


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


def test_the_totals_of_the_summary_are_those_of_its_parts():
    lines, settings = [], config("nondoubling")
    summary(settings, None, lines.append)

    def number(label):
        found = [line for line in lines if line.startswith(label) and "published" not in line]
        assert len(found) == 1, label
        return float(found[0].removesuffix(" GFLOP").split()[-1].replace(",", ""))

    counts = operations(settings.model, 36)
    assert number(f"{'total':44}") == sum(counts.values())
    steps = 48  # of T = 32…63 the mean, rounded
    assert number(f"total at T = {steps}, ") == sum(operations(settings.model, steps).values())
    shares = [float(line.split()[-1].removesuffix("%")) for line in lines if line.endswith("%")]
    wanted = [100 * macs / sum(counts.values()) for macs in counts.values()]
    np.testing.assert_allclose(shares, wanted, atol=0.006)
    assert number("update, forward and backward") == round(update_flops(settings) / 1e9, 1)
    memory = training_memory(settings, make_method(settings), jax.device_count())
    for name, count in memory.items():
        assert number(f"{name:76}") == pytest.approx(4 * count / 2**20, abs=0.051)
    packed = number("training images, packed bits")
    assert packed == pytest.approx(60_000 * 98 / 2**20, abs=0.051)
    assert memory["optimizer (Adam's two moments)"] == 2 * PUBLISHED["nondoubling"]
    decoder = 10 * 128**2 + 2 * 128
    assert memory["kernels that lax.cond keeps for the gradient of 63 steps"] == 63 * decoder


def test_a_summary_of_other_sizes_claims_no_published_count():
    lines, settings = [], config("doubling")
    settings.model.encoder_width = 16
    summary(settings, None, lines.append)
    assert not [line for line in lines if "published" in line]
