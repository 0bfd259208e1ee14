"""Layers. Each layer except `elu` is a pair of pure functions:

`NAME_init(key, …) -> params` makes a dict of float32 arrays, and `NAME(params, x, …) -> y` uses it.
(`zeros_init` also makes parameters for `linear`; it needs no key.)

Arrays are channels-last: images and grids [B, H, W, C], convolution kernels [k, k, in, out]. A 1×1
convolution is a linear map of every cell. A layer computes in the dtype of x, float32 or bfloat16,
and returns that dtype. Parameters and their gradients are float32.
"""

from math import prod, sqrt

import jax
import jax.numpy as jnp
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")  # the axes of a convolution's input, kernel and output


def uniform_init(key, shape, outputs, fan_in):
    """A kernel of this shape and a bias [outputs], uniform in ±1/√fan_in, as in PyTorch and
    Equinox."""
    bound = 1 / sqrt(fan_in)
    size = prod(shape)
    # Both come from one draw, because each draw adds 0.1 s to the compile time.
    values = jax.random.uniform(key, (size + outputs,), minval=-bound, maxval=bound)
    return {"kernel": values[:size].reshape(shape), "bias": values[size:]}


def conv_init(key, size, inputs, outputs):
    """Kernel [size, size, inputs, outputs] and bias [outputs] of a convolution."""
    return uniform_init(key, (size, size, inputs, outputs), outputs, size * size * inputs)


def conv(params, x, stride=1, padding=0):
    """Convolution, zero-padded: x [B, H, W, in] -> [B, H', W', out].

    y[i, j] = bias + Σ x[s·i + k − p, s·j + l − p]·kernel[k, l] over k and l, with stride s and
    padding p. The kernel is not flipped. For a K×K kernel, H' = (H + 2·padding − K) // stride + 1,
    and W' likewise.
    """
    kernel = params["kernel"].astype(x.dtype)
    y = lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=LAYOUT
    )
    return add_bias(params, y)


def conv_transpose_init(key, size, inputs, outputs):
    """Kernel [size, size, outputs, inputs] and bias [outputs] of a transposed convolution.

    fan_in counts the input channels, as in the reproduction by Aillet & Sondén (2022), whose
    settings this package has; PyTorch counts the output channels.
    """
    return uniform_init(key, (size, size, outputs, inputs), outputs, size * size * inputs)


def conv_transpose(params, x, stride, padding, output_padding=0):
    """Transposed convolution: x [B, H, W, in] -> [B, H', W', out].

    It is the adjoint of a `conv` without bias, plus a bias of its own.

    It puts stride − 1 zeros between neighbouring cells of x, and K − 1 − padding around them (for a
    K×K kernel). Then it convolves with the kernel rotated by 180 degrees, its channel axes swapped.
    H' = (H − 1)·stride − 2·padding + K + output_padding, and W' likewise. output_padding is the
    number of extra zeros at the end. It selects H', because a strided `conv` turns several sizes H'
    into the same H.
    """
    kernel = params["kernel"].astype(x.dtype)
    rotated = lax.rev(kernel, (0, 1)).swapaxes(2, 3)
    start = len(kernel) - 1 - padding
    ends = [(start, start + output_padding)] * 2
    y = lax.conv_general_dilated(
        x, rotated, (1, 1), ends, lhs_dilation=(stride, stride), dimension_numbers=LAYOUT
    )
    return add_bias(params, y)


def linear_init(key, inputs, outputs):
    """Kernel [inputs, outputs] and bias [outputs] of a linear map."""
    return uniform_init(key, (inputs, outputs), outputs, inputs)


def zeros_init(inputs, outputs):
    """Like `linear_init`, but all zeros, so that the map's output is 0 at first."""
    return {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}


def linear(params, x):
    """Linear map of the last axis: x [..., in] -> [..., out]."""
    return add_bias(params, x @ params["kernel"].astype(x.dtype))


def add_bias(params, y):
    """y + bias. Adding in float32 makes the gradient of the bias accumulate in float32."""
    return (y + params["bias"]).astype(y.dtype)


def elu(x):
    """x where x is positive, exp(x) − 1 elsewhere."""
    # Without the inner `where`, exp could overflow in the branch that is not taken, and the
    # gradient would be 0·∞ = NaN.
    return jnp.where(x > 0, x, jnp.expm1(jnp.where(x > 0, 0, x)))
