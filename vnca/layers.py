"""Layers: each is a pair of pure functions.

`NAME_init(key, …) -> params` makes a dict of float32 arrays; `NAME(params, x, …) -> y` uses it.
Arrays are channels-last: images and grids [B, H, W, C], kernels [kh, kw, in, out]. A 1×1
convolution is a linear map of every cell, which is a convolution with no spatial axes at all.
"""

from functools import partial
from math import prod, sqrt

import jax
import jax.numpy as jnp
from jax import lax


def uniform_init(key, shape, outputs, fan_in):
    """Kernel of this shape and bias [outputs], uniform in ±1/√fan_in, as PyTorch and Equinox do.

    One draw for both: each draw costs a tenth of a second of compile time.
    """
    bound, size = 1 / sqrt(fan_in), prod(shape)
    numbers = jax.random.uniform(key, (size + outputs,), minval=-bound, maxval=bound)
    return {"kernel": numbers[:size].reshape(shape), "bias": numbers[size:]}


def conv_init(key, size, inputs, outputs):
    """Kernel [size, size, inputs, outputs] and bias [outputs] of a convolution."""
    return uniform_init(key, (size, size, inputs, outputs), outputs, size * size * inputs)


def conv(params, x, stride=1, padding=0):
    """Convolution: x [B, H, W, in] -> [B, H', W', out], H' = (H + 2·padding − k) // stride + 1."""
    kernel = params["kernel"]
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if _gather(x.shape[1] // stride):
        y = convolve(_patches(x, size, stride, padding), kernel.reshape(-1, outputs))
    else:
        y = convolve(x, kernel, stride, padding)
    return y + params["bias"]


def conv_transpose_init(key, size, inputs, outputs):
    """Kernel [size, size, outputs, inputs] and bias [outputs]: the kernel is laid out as that of
    the convolution, from outputs to inputs, whose adjoint the layer is. fan_in counts the inputs,
    as in the reproduction; PyTorch would count the outputs."""
    return uniform_init(key, (size, size, outputs, inputs), outputs, size * size * inputs)


def conv_transpose(params, x, stride, padding, output_padding=0):
    """Transposed convolution: x [B, H, W, in] -> [B, H', W', out], the adjoint of a convolution.

    H' = (H − 1)·stride − 2·padding + k + output_padding. A convolution of that stride maps several
    sizes to H; output_padding names the one meant, by rows and columns added at the end only.
    """
    kernel = params["kernel"]
    size, inputs = kernel.shape[0], kernel.shape[-1]
    space = tuple((n - 1) * stride - 2 * padding + size + output_padding for n in x.shape[1:3])
    if _gather(x.shape[1]):
        like = jax.ShapeDtypeStruct((x.shape[0], *space, kernel.shape[-2]), x.dtype)
        patches = convolve(x, kernel.reshape(-1, inputs).T)
        scatter = jax.linear_transpose(lambda y: _patches(y, size, stride, padding), like)
        y = scatter(patches)[0]
    else:
        y = convolve_transpose(x, kernel, stride, padding, space)
    return y + params["bias"]


def linear_init(key, inputs, outputs):
    """Kernel [inputs, outputs] and bias [outputs] of a linear map."""
    return uniform_init(key, (inputs, outputs), outputs, inputs)


def linear(params, x):
    """Linear map of the last axis, [..., in] -> [..., out]: on a grid, a 1×1 convolution."""
    return convolve(x, params["kernel"]) + params["bias"]


def zeros_init(_, inputs, outputs):
    """`linear_init` with zeros: a residual branch that ends in it starts as the identity."""
    return {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}


@jax.custom_vjp
def elu(x):
    """x where it is positive, exp(x) − 1 elsewhere."""
    return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))


# The slope is 1 or exp(x) = elu(x) + 1: the output alone, which the next layer keeps anyway, is
# enough for the gradient, and one array fewer is written, kept and read for each activation.
elu.defvjp(lambda x: (elu(x),) * 2, lambda y, g: (jnp.where(y > 0, g, g * (y + 1)),))


# ---- The convolution and its gradient --------------------------------------------------------
#
# A convolution is linear in its input and in its kernel, so its gradient is two convolutions.
# They are written out rather than left to JAX because XLA's CPU compiler has a fast path for one
# layout alone (the one named in `_lax_conv`), and rewrites others into it only outside of loops
# (jax issue 12868): in a scan, JAX's own gradient of a 3×3 convolution ran at 4 GFLOP/s, this
# one at 170. All hold for any number of spatial axes: two in images, none in `linear`.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x, kernel, stride=1, padding=0):
    """x [B, *space, in] with kernel [*size, in, out] -> [B, *space', out], zero-padded.

    A kernel without spatial axes [in, out] maps the last axis of any x [..., in].
    """
    if kernel.ndim == 2:
        return _lax_conv(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)
    return _lax_conv(x, kernel, padding=[(padding, padding)] * (x.ndim - 2), stride=stride)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve_transpose(g, kernel, stride, padding, space):
    """The adjoint of `convolve` in x: g [B, *space', out] -> [B, *space, in].

    A convolution of g, its cells spread `stride` apart, with the kernel turned by 180 degrees
    and its channel axes swapped. `space` is the result's size, which a stride leaves open.
    """
    axes = tuple(range(kernel.ndim - 2))
    turned = jnp.flip(kernel, axes).swapaxes(-1, -2)
    if not axes:
        return convolve(g, turned)
    ends = [
        (k - 1 - padding, n + padding - 1 - (m - 1) * stride)
        for k, n, m in zip(kernel.shape, space, g.shape[1:], strict=False)
    ]
    return _lax_conv(g, turned, padding=ends, spread=stride)


def kernel_gradient(x, g, stride, padding, size):
    """The adjoint of `convolve` in its kernel: x [B, *space, in], g [B, *space', out] -> kernel.

    A convolution of x with g as its kernel, where the batch is the axis that is summed over:
    the input channels stand where a batch would, and g's cells are spread `stride` apart.
    """
    if not size:
        return _lax_conv(x.reshape(-1, x.shape[-1]).T, g.reshape(-1, g.shape[-1]))
    ends = [
        (padding, k + (m - 1) * stride - n - padding)
        for k, n, m in zip(size, x.shape[1:], g.shape[1:], strict=False)
    ]
    space = range(1, x.ndim - 1)
    y = _lax_conv(
        x.transpose(-1, *space, 0), g.transpose(*space, 0, -1), ends, kernel_spread=stride
    )
    return jnp.moveaxis(y, 0, -2)


def _convolve_backward(stride, padding, saved, g):
    x, kernel = saved
    return (
        convolve_transpose(g, kernel, stride, padding, x.shape[1:-1]),
        kernel_gradient(x, g, stride, padding, kernel.shape[:-2]),
    )


def _convolve_transpose_backward(stride, padding, _, saved, x):
    g, kernel = saved
    return (
        convolve(x, kernel, stride, padding),
        kernel_gradient(x, g, stride, padding, kernel.shape[:-2]),
    )


convolve.defvjp(lambda x, w, *static: (convolve(x, w, *static), (x, w)), _convolve_backward)
convolve_transpose.defvjp(
    lambda g, w, *static: (convolve_transpose(g, w, *static), (g, w)), _convolve_transpose_backward
)


def _lax_conv(x, kernel, padding=(), stride=1, spread=1, kernel_spread=1):
    """The one convolution that everything is made of; channels last in x, kernel and result."""
    n = x.ndim - 2
    image = (0, n + 1, *range(1, n + 1))
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=[stride] * n,
        padding=padding,
        lhs_dilation=[spread] * n,
        rhs_dilation=[kernel_spread] * n,
        dimension_numbers=lax.ConvDimensionNumbers(image, (n + 1, n, *range(n)), image),
    )


def _gather(size):
    """Whether a convolution to a size×size grid runs faster as one matrix product over patches.

    On the CPU a grid of 4×4 or less leaves the convolution's fast path idle: 5×5, 256→512, onto
    2×2 at batch 32 took 287 ms as a convolution and 2.5 ms as patches; above it they draw level.
    """
    return size <= 4 and jax.default_backend() == "cpu"


def _patches(x, size, stride, padding):
    """Every size×size window of x [B, H, W, C], zero-padded, as channels: [B, H', W', size²·C]."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    h, w = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
    windows = [
        x[:, i : i + h : stride, j : j + w : stride] for i in range(size) for j in range(size)
    ]
    return jnp.concatenate(windows, axis=-1)
