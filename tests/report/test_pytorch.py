"""PyTorch's layout: the arrays compute the same when they are used the way PyTorch uses them."""

import jax
import numpy as np
import pytest
import reference

from vnca import models
from vnca.report import pytorch

MODELS = {
    "doubling": models.doubling_vnca(3, 2, 5, 1),
    "nondoubling": models.nondoubling_vnca(3, 2, 1, (1, 1)),
    "baseline": models.baseline_vae(3, 2),
}


def shapes(name):
    return jax.eval_shape(MODELS[name].init, jax.random.key(0))


def params(name):
    return reference.numbers_like(shapes(name), 1, 0.2)


def conv2d(x, weight, bias, stride, padding):
    """Conv2d: x [B, in, H, W], weight [out, in, k, k], one output cell at a time."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    k = weight.shape[2]
    h, w = ((n - k) // stride + 1 for n in x.shape[2:])
    y = np.empty((len(x), len(weight), h, w))
    for i in range(h):
        for j in range(w):
            window = x[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            y[:, :, i, j] = np.tensordot(window, weight, ([1, 2, 3], [1, 2, 3])) + bias
    return y


def conv_transpose2d(x, weight, bias, stride, padding, output_padding):
    """ConvTranspose2d: x [B, in, H, W], weight [in, out, k, k], one input cell at a time."""
    k = weight.shape[2]
    h, w = ((n - 1) * stride + k + output_padding for n in x.shape[2:])
    y = np.zeros((len(x), weight.shape[1], h, w))
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            stamp = np.tensordot(x[:, :, i, j], weight, 1)
            y[:, :, i * stride : i * stride + k, j * stride : j * stride + k] += stamp
    return y[:, :, padding : h - padding, padding : w - padding] + bias[:, None, None]


def of(arrays, layer):
    return {kind: arrays[f"{layer}.{kind}"].astype(np.float64) for kind in ("weight", "bias")}


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_for_pytorch_comes_back_bit_for_bit(name):
    there = pytorch.to_torch(params(name))
    here = pytorch.from_torch(there, shapes(name))
    assert jax.tree.structure(here) == jax.tree.structure(params(name))
    assert jax.tree.all(jax.tree.map(np.array_equal, here, params(name)))
    assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in there.values())


def test_names_and_shapes_are_those_of_the_table():
    found = {name: a.shape for name, a in pytorch.to_torch(params("doubling")).items()}
    assert found["encoder.conv1.weight"] == (4, 2, 5, 5)
    assert found["encoder.conv1.bias"] == (4,)
    assert found["encoder.linear.weight"] == (6, 128)
    assert found["decoder.perceive.weight"] == (3, 3, 3, 3)
    assert found["decoder.blocks.3.linear1.weight"] == (3, 3, 1, 1)
    assert found["decoder.update.bias"] == (3,)
    found = {name: a.shape for name, a in pytorch.to_torch(params("baseline")).items()}
    assert found["decoder.linear.weight"] == (128, 3)
    assert found["decoder.linear.bias"] == (128,)
    assert found["decoder.conv_transpose0.weight"] == (32, 16, 5, 5)
    assert found["decoder.conv_transpose4.weight"] == (2, 1, 5, 5)


def test_a_channels_first_encoder_computes_the_same_from_these_arrays():
    ours, arrays = params("doubling"), pytorch.to_torch(params("doubling"))
    images = (np.random.RandomState(0).rand(2, 1, 32, 32) < 0.3).astype(np.float32)
    x = images.astype(np.float64)
    for i in range(5):
        x = reference.elu(
            conv2d(x, **of(arrays, f"encoder.conv{i}"), stride=1 + (i > 0), padding=2)
        )
    linear = of(arrays, "encoder.linear")
    expected = x.reshape(2, -1) @ linear["weight"].T + linear["bias"]
    mean, logvar = jax.jit(models.encode)(ours, images.transpose(0, 2, 3, 1))
    close(np.concatenate([mean, logvar], axis=1), expected)


def test_channels_first_cells_compute_the_same_from_these_arrays():
    ours, arrays = params("doubling"), pytorch.to_torch(params("doubling"))
    s = np.random.RandomState(0).randn(2, 3, 4, 5).astype(np.float32)
    h = conv2d(s, **of(arrays, "decoder.perceive"), stride=1, padding=1)
    for i in range(4):
        names = [f"decoder.blocks.{i}.linear{j}" for j in range(2)]
        inner = reference.elu(conv2d(h, **of(arrays, names[0]), stride=1, padding=0))
        h = h + conv2d(inner, **of(arrays, names[1]), stride=1, padding=0)
    expected = s + conv2d(h, **of(arrays, "decoder.update"), stride=1, padding=0)
    found = jax.jit(models.nca_step)(ours["decoder"], s.transpose(0, 2, 3, 1))
    close(found.transpose(0, 3, 1, 2), expected)


def test_a_channels_first_baseline_computes_the_same_from_these_arrays():
    ours, arrays = params("baseline"), pytorch.to_torch(params("baseline"))
    z = np.random.RandomState(0).randn(2, 3).astype(np.float32)
    linear = of(arrays, "decoder.linear")
    x = (z @ linear["weight"].T + linear["bias"]).reshape(2, 32, 2, 2)
    for i in range(4):
        x = reference.elu(
            conv_transpose2d(
                x, **of(arrays, f"decoder.conv_transpose{i}"), stride=2, padding=2, output_padding=1
            )
        )
    x = conv_transpose2d(
        x, **of(arrays, "decoder.conv_transpose4"), stride=1, padding=4, output_padding=0
    )
    found = jax.jit(MODELS["baseline"].decode)(ours, z)[:, 2:30, 2:30]
    close(found.transpose(0, 3, 1, 2), x)


def test_an_array_that_is_missing_unknown_or_misshapen_is_named():
    arrays = pytorch.to_torch(params("doubling"))
    name = "decoder.perceive.weight"
    with pytest.raises(ValueError, match=f"{name} is missing"):
        pytorch.from_torch({k: a for k, a in arrays.items() if k != name}, shapes("doubling"))
    with pytest.raises(ValueError, match="decoder.extra.bias does not belong to this model"):
        pytorch.from_torch(arrays | {"decoder.extra.bias": np.zeros(3)}, shapes("doubling"))
    with pytest.raises(ValueError, match=rf"{name} has shape \[3, 3, 3\], not \[3, 3, 3, 3\]"):
        pytorch.from_torch(arrays | {name: np.zeros((3, 3, 3))}, shapes("doubling"))
