"""Layers: each is a pair of pure functions.

`NAME_init(key, …) -> params` makes a dict of float32 arrays; `NAME(params, x, …) -> y` uses it.
Arrays are channels-last: images and grids [B, H, W, C], kernels [k, k, in, out]. A 1×1 convolution
is a linear map of every cell. A layer computes in the dtype of x, float32 or bfloat16, which it
returns; the gradients of its parameters are summed in their own dtype, float32.
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
    return _add_bias(convolve(x, params["kernel"], stride, padding), params["bias"])


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
    size = kernel.shape[0]
    space = tuple((n - 1) * stride - 2 * padding + size + output_padding for n in x.shape[1:3])
    return _add_bias(convolve_transpose(x, kernel, stride, padding, space), params["bias"])


def linear_init(key, inputs, outputs):
    """Kernel [inputs, outputs] and bias [outputs] of a linear map."""
    return uniform_init(key, (inputs, outputs), outputs, inputs)


def linear(params, x):
    """Linear map of the last axis, [..., in] -> [..., out]: on a grid, a 1×1 convolution."""
    return _add_bias(product(x, params["kernel"]), params["bias"])


def _add_bias(y, bias):
    return (y + bias).astype(y.dtype)  # so that the bias's gradient is summed in its own dtype


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


# ---- Products, convolutions and their gradients ----------------------------------------------
#
# Each is linear in its input and in its kernel, so its gradient is two maps of the same kind. They
# are written out rather than left to JAX because XLA's CPU compiler has a fast path for one layout
# alone (of convolutions, the one named in `_lax_conv`; of products, matrices), and rewrites others
# into it only outside of loops (jax issue 12868), or by transposing arrays in memory: in a scan,
# JAX's own gradient of a 3×3 convolution ran at 4 GFLOP/s, this one at 170.


@jax.custom_vjp
def product(x, kernel):
    """x [..., in] with kernel [in, out] -> [..., out], as a product of two matrices."""
    return (_flat(x) @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], -1)


def _product_backward(saved, g):
    x, kernel = saved
    return product(g, kernel.T), _product_of_columns(x, g, kernel.dtype)


product.defvjp(lambda x, w: (product(x, w), (x, w)), _product_backward)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _product_of_columns(x, g, dtype):
    """Σ of x's column times g's row over all cells: x [..., in], g [..., out] -> [in, out]."""
    return jnp.matmul(_flat(x).T, _flat(g), preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x, kernel, stride, padding):
    """x [B, H, W, in] with kernel [k, k, in, out] -> [B, H', W', out], zero-padded."""

    def convolution(x, kernel):
        return _lax_conv(x, kernel, [(padding, padding)] * 2, stride)

    def products(x, kernel):
        return product(_patches(x, size, stride, padding), kernel.reshape(-1, kernel.shape[-1]))

    kernel, size = kernel.astype(x.dtype), kernel.shape[0]
    grid = [(n + 2 * padding - size) // stride + 1 for n in x.shape[1:3]]
    idle = _idle(x.shape[0], *grid, size, x.shape[-1])
    return _fastest(convolution, products, idle, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve_transpose(g, kernel, stride, padding, space):
    """The adjoint of `convolve` in x: g [B, H', W', out] -> [B, H, W, in].

    A convolution of g, its cells spread `stride` apart, with the kernel turned by 180 degrees
    and its channel axes swapped; or each cell's k×k·in products, summed where they overlap.
    `space` is (H, W), which a stride leaves open.
    """
    size, _, inputs, outputs = kernel.shape

    def convolution(g, kernel):
        ends = [
            (size - 1 - padding, n + padding - 1 - (m - 1) * stride)
            for n, m in zip(space, g.shape[1:], strict=False)
        ]
        turned = jnp.flip(kernel, (0, 1)).swapaxes(-1, -2)
        return _lax_conv(g, turned, ends, spread=stride)

    def products(g, kernel):
        image = jax.ShapeDtypeStruct((g.shape[0], *space, inputs), g.dtype)
        scatter = jax.linear_transpose(lambda x: _patches(x, size, stride, padding), image)
        return scatter(product(g, kernel.reshape(-1, outputs).T))[0]

    # Onto one channel, 32×32 cells, batch 32: 51 ms as a convolution, 0.5 as products.
    idle = inputs == 1 or _idle(*g.shape[:3], size, inputs)
    return _fastest(convolution, products, idle, g, kernel.astype(g.dtype))


def kernel_gradient(x, g, stride, padding, size, dtype):
    """The adjoint of `convolve` in its kernel: x [B, H, W, in], g [B, H', W', out] -> kernel.

    A convolution of x with g as its kernel, where the batch is the axis that is summed over:
    the input channels stand where a batch would, and g's cells are spread `stride` apart. Or, for
    each row of the kernel, one product of g with the patches that its taps see.
    """

    def convolution(x, g):
        ends = [
            (padding, size + (m - 1) * stride - n - padding)
            for n, m in zip(x.shape[1:3], g.shape[1:], strict=False)
        ]
        x, g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
        y = _lax_conv(x, g, ends, kernel_spread=stride, dtype=dtype)
        return y.transpose(1, 2, 0, 3)

    def products(x, g):
        windows = _row_patches(x, size, stride, padding)
        rows = [_every(windows, i, g.shape[1], stride, axis=1) for i in range(size)]
        inputs, outputs = x.shape[-1], g.shape[-1]
        if g.size // outputs > size * inputs:  # many cells: then the wider factor is better second
            turned = jnp.stack([_product_of_columns(g, row, dtype) for row in rows])
            return turned.reshape(size, outputs, size, inputs).transpose(0, 2, 3, 1)
        straight = jnp.stack([_product_of_columns(row, g, dtype) for row in rows])
        return straight.reshape(size, size, inputs, outputs)

    # What slides is g. 3×3, 32×32 cells, batch 4: with 32 channels (0.5 MB) at 93 GFLOP/s where
    # products made 52, of a core's 143; with 128 (2 MB) at 55 where products made 95. With 256 on
    # any grid the two are within a fifth.
    large = g.shape[-1] > 128 or 4 * g.size > 1 << 20
    return _fastest(convolution, products, large, x, g)


def _convolve_backward(stride, padding, saved, g):
    x, kernel = saved
    return (
        convolve_transpose(g, kernel, stride, padding, x.shape[1:3]),
        kernel_gradient(x, g, stride, padding, kernel.shape[0], kernel.dtype),
    )


def _convolve_transpose_backward(stride, padding, _, saved, x):
    g, kernel = saved
    return (
        convolve(x, kernel, stride, padding),
        kernel_gradient(x, g, stride, padding, kernel.shape[0], kernel.dtype),
    )


convolve.defvjp(lambda x, w, *static: (convolve(x, w, *static), (x, w)), _convolve_backward)
convolve_transpose.defvjp(
    lambda g, w, *static: (convolve_transpose(g, w, *static), (g, w)), _convolve_transpose_backward
)


def _lax_conv(x, kernel, padding, stride=1, spread=1, kernel_spread=1, dtype=None):
    """The one convolution that everything is made of; channels last in x, kernel and result."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=[stride] * 2,
        padding=padding,
        lhs_dilation=[spread] * 2,
        rhs_dilation=[kernel_spread] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )


def _fastest(convolution, products, use_products, *arrays):
    """On accelerators the convolution; on the CPU the one that ran faster there."""
    on_cpu = products if use_products else convolution
    return lax.platform_dependent(*arrays, cpu=on_cpu, default=convolution)


def _idle(batch, height, width, size, channels):
    """Whether a convolution leaves the CPU idle where products over patches of this shape do not:
    on grids of 4×4 and less (5×5, 256→512, onto 2×2 at batch 32: 287 ms against 2.5), and wherever
    the patches fit into the cache."""
    patches = 4 * batch * height * width * size * size * channels  # bytes
    return min(height, width) <= 4 or patches <= 4 << 20


def _every(x, first, count, stride, axis):
    """count slices of x along the axis: first, first + stride, …"""
    return lax.slice_in_dim(x, first, first + (count - 1) * stride + 1, stride, axis)


def _row_patches(x, size, stride, padding):
    """Every window of `size` columns of x [B, H, W, C], zero-padded, as channels:
    [B, H + 2·padding, W', size·C]."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    w = (x.shape[2] - size) // stride + 1
    return jnp.concatenate([_every(x, j, w, stride, axis=2) for j in range(size)], axis=-1)


def _patches(x, size, stride, padding):
    """Every size×size window of x [B, H, W, C], zero-padded, as channels: [B, H', W', size²·C]."""
    x = _row_patches(x, size, stride, padding)
    h = (x.shape[1] - size) // stride + 1
    return jnp.concatenate([_every(x, i, h, stride, axis=1) for i in range(size)], axis=-1)
