"""Layers: each is a pair of pure functions.

`NAME_init(key, …) -> params` makes a dict of float32 arrays; `NAME(params, x, …) -> y` uses it.
Arrays are channels-last: images and grids [B, H, W, C], kernels [k, k, in, out]. A 1×1 convolution
is a linear map of every cell. A layer computes in the dtype of x, float32 or bfloat16, and returns
it; parameters and their gradients stay float32.
"""

from math import prod, sqrt

import jax
import jax.numpy as jnp
from jax import lax

from vnca import cpu


def uniform_init(key, shape, outputs, fan_in):
    """Kernel of this shape and bias [outputs], uniform in ±1/√fan_in, as PyTorch and Equinox do."""
    bound, size = 1 / sqrt(fan_in), prod(shape)  # one draw: each costs 0.1 s of compile time
    numbers = jax.random.uniform(key, (size + outputs,), minval=-bound, maxval=bound)
    return {"kernel": numbers[:size].reshape(shape), "bias": numbers[size:]}


def conv_init(key, size, inputs, outputs):
    """Kernel [size, size, inputs, outputs] and bias [outputs] of a convolution."""
    return uniform_init(key, (size, size, inputs, outputs), outputs, size * size * inputs)


def conv(params, x, stride=1, padding=0):
    """Convolution: x [B, H, W, in] -> [B, H', W', out], H' = (H + 2·padding − k) // stride + 1."""
    return _add_bias(convolve(x, params["kernel"], stride, padding), params["bias"])


def conv_transpose_init(key, size, inputs, outputs):
    """Kernel [size, size, outputs, inputs], that of the convolution whose adjoint the layer is, and
    bias [outputs]. fan_in counts the inputs, as in the reproduction; PyTorch counts the outputs."""
    return uniform_init(key, (size, size, outputs, inputs), outputs, size * size * inputs)


def conv_transpose(params, x, stride, padding, output_padding=0):
    """Transposed convolution: x [B, H, W, in] -> [B, H', W', out], the adjoint of a convolution.

    H' = (H − 1)·stride − 2·padding + k + output_padding. A convolution of that stride maps several
    sizes to H; output_padding names the one meant, by rows and columns added at the end only.
    """
    y = convolve_transpose(x, params["kernel"], stride, padding, output_padding)
    return _add_bias(y, params["bias"])


def linear_init(key, inputs, outputs):
    """Kernel [inputs, outputs] and bias [outputs] of a linear map."""
    return uniform_init(key, (inputs, outputs), outputs, inputs)


def zeros_init(inputs, outputs):
    """Zeros, shaped as in `linear_init`: what is added to cells by such a map is 0 at first."""
    return {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}


def linear(params, x):
    """Linear map of the last axis, [..., in] -> [..., out]: on a grid, a 1×1 convolution."""
    return _add_bias(product(x, params["kernel"]), params["bias"])


def _add_bias(y, bias):
    return (y + bias).astype(y.dtype)  # a float32 sum, so that the bias's gradient is one, too


@cpu.gradient_of_result(lambda y, g: jnp.where(y > 0, g, g * (y + 1)))  # as exp(x) = elu(x) + 1
def elu(x):
    """x where it is positive, exp(x) − 1 elsewhere."""
    return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))


# What the layers are made of. `cpu.door`: on a CPU, the same sum as XLA's CPU compiler runs it
# fast, and its gradient too; elsewhere what stands here, and JAX's own gradient (but for `elu`'s).

LAYOUT = "NHWC", "HWIO", "NHWC"  # of x, kernel and result


@cpu.door(cpu.product, cpu.product_gradient)
def product(x, kernel):
    """x [..., in] with kernel [in, out] -> [..., out]."""
    return x @ kernel.astype(x.dtype)


@cpu.door(cpu.convolve, cpu.convolve_gradient)
def convolve(x, kernel, stride, padding):
    """x [B, H, W, in] with kernel [k, k, in, out] -> [B, H', W', out], zero-padded.

    y[i, j] = Σ x[si + k − p, sj + l − p]·kernel[k, l] over k, l: the kernel is not flipped.
    """
    kernel, ends = kernel.astype(x.dtype), [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, [stride] * 2, ends, dimension_numbers=LAYOUT)


@cpu.door(cpu.convolve_transpose, cpu.convolve_transpose_gradient)
def convolve_transpose(x, kernel, stride, padding, output_padding):
    """The adjoint of `convolve`: x [B, H, W, in] with kernel [k, k, out, in] -> [B, H', W', out].

    A convolution of x, its cells spread `stride` apart, with the kernel turned by 180 degrees and
    its channel axes swapped.
    """
    kernel = lax.rev(kernel, (0, 1)).swapaxes(2, 3).astype(x.dtype)
    start = len(kernel) - 1 - padding
    ends, spread = [(start, start + output_padding)] * 2, [stride] * 2
    return lax.conv_general_dilated(x, kernel, [1, 1], ends, spread, dimension_numbers=LAYOUT)
