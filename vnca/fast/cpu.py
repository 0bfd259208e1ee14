"""The layers of `vnca.layers`, the decoder of narrow doubling models, and the inheritance of the
model that heals, in the forms that XLA's CPU compiler turns into fast code.

Each layer computes the same sum as the plain layer of its name, up to rounding, and has a gradient
of its own. XLA's CPU compiler has fast code for one layout only: for convolutions the one
in `_lax_conv`, for products that of matrices. It rewrites other layouts outside of loops only (JAX
issue 12868), or it transposes arrays in memory. In a scan, JAX's own gradient of a 3×3 convolution
ran at 4 GFLOP/s, the gradient below at 170.

Model makers take this module as their argument `nn`.
"""

import sys
from functools import lru_cache, partial
from math import factorial, log

import chex
import jax
import jax.numpy as jnp
from jax import lax

from vnca import healing
from vnca.images import IMAGE_SIZE
from vnca.layers import LAYOUT, add_bias
from vnca.models import crop, double, nca_step

MOST_CHANNELS = 64  # with unrolled steps: 32 and 48 were faster, 256 were not
MOST_STEPS = 16  # unrolled: the time to compile grows with them
# Whether a convolution is the fast form of a 3×3 kernel's gradient: see `_products_are_faster`.
CONVOLUTIONS_ARE_FAST = jax.__version_info__[:2] == (0, 10)


def fast_model(model, config):
    """The Model of `config`, the `model` section of a config, in the form that a CPU runs fast.

    `model` has the layers of this file. All but narrow doubling models and the model that heals
    stay as they are.
    """
    if config.name == "healing":
        return healing.make_model(config, sys.modules[__name__], inherit_if_lost)
    narrow = model.latent_size <= MOST_CHANNELS
    if config.name == "doubling" and narrow and config.steps_per_doubling <= MOST_STEPS:
        return model._replace(decode=decode_doubling(config.doublings, config.steps_per_doubling))
    return model


@lru_cache  # so that equal models have equal functions, and their programs are compiled once
def decode_doubling(doublings, steps):
    """Makes `decode` of a doubling model: params, z [B, latent] -> logits [B, 32, 32, 1].

    It unrolls the steps on grids of 32×32 cells and more. A scan copies each array that the
    backward pass needs into a stack and out of it: without it, an update with 32 channels took 9%
    less, and 11% less if steps at 16×16 were unrolled, too. With 256 channels it took no less, and
    temporaries grew by half.
    """
    nn = sys.modules[__name__]  # the layers of this file

    def decode(params, z):
        chex.assert_shape(z, (None, len(params["decoder"]["residual"]["bias"])))
        step = partial(nca_step, nn, params["decoder"])
        s = z[:, None, None]
        for k in range(1, doublings + 1):
            s = double(s)
            chex.assert_shape(s, (len(z), 2**k, 2**k, None))
            if 2**k < IMAGE_SIZE:
                s, _ = lax.scan(lambda s, _: (step(s), None), s, length=steps)
            else:
                for _ in range(steps):
                    s = step(s)
        return crop(s[..., :1], IMAGE_SIZE)

    return decode


def inherit_if_lost(nn, kept, waves):
    """As `vnca.healing.inherit`, with zeros for what cells would inherit where no cell is lost.

    The convolution took 10% of an update of the model that heals, and most steps need none of it.
    """
    alive = healing.living(kept, waves)

    def inherited(kept):
        return healing.inherit(nn, kept, waves)[0]

    kept = lax.stop_gradient(kept)
    return lax.cond(jnp.all(alive == 1), jnp.zeros_like, inherited, kept), alive


# ---- Layers -------------------------------------------------------------------------------------


def conv(params, x, stride=1, padding=0):
    """As `vnca.layers.conv`."""
    return add_bias(params, convolve(x, params["kernel"], stride, padding))


def conv_transpose(params, x, stride, padding, output_padding=0):
    """As `vnca.layers.conv_transpose`."""
    y = convolve_transpose(x, params["kernel"], stride, padding, output_padding)
    return add_bias(params, y)


def linear(params, x):
    """As `vnca.layers.linear`."""
    return add_bias(params, product(x, params["kernel"]))


@jax.custom_vjp
def elu(x):
    """As `vnca.layers.elu`, with a gradient that needs only the result.

    The next layer keeps the result anyway, so that one array fewer is written, kept and read for
    each activation.
    """
    if x.dtype == jnp.float64:  # more precise than the series
        return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))
    y = x.astype(jnp.float32)
    return (jnp.maximum(y, 0) + _expm1(jnp.minimum(y, 0))).astype(x.dtype)


def _expm1(x):
    """exp(x) − 1 for x ≤ 0, float32 of any shape, with a relative error of at most 2e-7.

    x = k·ln 2 + f with an integer k and |f| ≤ ½·ln 2, so
    exp(x) − 1 = 2ᵏ·(exp(f) − 1) + (2ᵏ − 1). A short power series gives exp(f) − 1 without
    cancellation near 0. This took as long as copying the array (4,096 cells, 32 channels). XLA's
    own expm1 took 1.7 times as long, more than a product with a 32×32 kernel.
    """
    x = jnp.maximum(x, -87)  # below that the result is −1, and 2ᵏ would not be a normal number
    k = jnp.round(x * (1 / log(2)))
    f = x - k * log(2)
    series = 1 / factorial(7)
    for n in range(6, 0, -1):
        series = series * f + 1 / factorial(n)
    exponent_bits = (k.astype(jnp.int32) + 127) << 23
    power = lax.bitcast_convert_type(exponent_bits, jnp.float32)  # 2ᵏ
    return power * (series * f) + (power - 1)


def _elu_forward(x):
    y = elu(x)
    return y, y


def _elu_backward(y, g):
    return (jnp.where(y > 0, g, g * (y + 1)),)  # because exp(x) = elu(x) + 1


elu.defvjp(_elu_forward, _elu_backward)

# ---- Products -----------------------------------------------------------------------------------
#
# Linear maps are products of two matrices everywhere. A convolution without spatial axes ran at the
# speed of a product in JAX 0.10, but inside a loop at 1% of it in JAX 0.12.


@jax.custom_vjp
def product(x, kernel):
    """x [..., in] times kernel [in, out] -> [..., out]."""
    return (_flat(x) @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], -1)


def _product_forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _product_backward(saved, g):
    x, kernel = saved
    return product(g, kernel.T), _product_of_columns(x, g, kernel.dtype)


product.defvjp(_product_forward, _product_backward)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _product_of_columns(x, g, dtype):
    """Σ over all cells of x's column times g's row: x [..., in], g [..., out] -> [in, out]."""
    return jnp.matmul(_flat(x).T, _flat(g), preferred_element_type=dtype)


# ---- Convolutions -------------------------------------------------------------------------------
#
# A convolution is linear in its input and in its kernel, so its gradient consists of two maps of
# the same kind. Each of the three is written twice, as a convolution in the fast layout and as
# products of matrices over patches. The shapes decide which one runs, by what was measured.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x, kernel, stride, padding):
    """The convolution of `vnca.layers.conv`: x [B, H, W, in], kernel [k, k, in, out] ->
    [B, H', W', out]."""
    kernel = kernel.astype(x.dtype)
    size = len(kernel)
    grid = [(n + 2 * padding - size) // stride + 1 for n in x.shape[1:3]]
    if _patches_are_faster(x.shape[0], *grid, size, x.shape[-1]):
        patches = _patches(x, size, stride, padding)
        return product(patches, kernel.reshape(-1, kernel.shape[-1]))
    return _lax_conv(x, kernel, [(padding, padding)] * 2, stride)


def _convolve_forward(x, kernel, stride, padding):
    return convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(stride, padding, saved, g):
    x, kernel = saved
    return (
        _adjoint(g, kernel, stride, padding, x.shape[1:3]),
        _kernel_gradient(x, g, stride, padding, len(kernel), kernel.dtype),
    )


convolve.defvjp(_convolve_forward, _convolve_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve_transpose(x, kernel, stride, padding, output_padding):
    """The sum of `vnca.layers.conv_transpose`, the adjoint of `convolve`: x [B, H, W, in], kernel
    [k, k, out, in] -> [B, H', W', out]."""
    size = len(kernel)
    space = [(n - 1) * stride - 2 * padding + size + output_padding for n in x.shape[1:3]]
    return _adjoint(x, kernel, stride, padding, space)


def _convolve_transpose_forward(x, kernel, *sizes):
    return convolve_transpose(x, kernel, *sizes), (x, kernel)


def _convolve_transpose_backward(stride, padding, output_padding, saved, g):
    x, kernel = saved
    return (  # a convolution, and the kernel's gradient with x and g in each other's roles
        convolve(g, kernel, stride, padding),
        _kernel_gradient(g, x, stride, padding, len(kernel), kernel.dtype),
    )


convolve_transpose.defvjp(_convolve_transpose_forward, _convolve_transpose_backward)


def _adjoint(g, kernel, stride, padding, space):
    """The adjoint of `convolve` in x: g [B, H', W', out] -> [B, H, W, in].

    It is a convolution of g, dilated by the stride, with the kernel rotated by 180 degrees and its
    channel axes swapped; or, as products, the k×k·in values of each cell, summed where they
    overlap. `space` is (H, W), which the shape of g does not determine if there is a stride.
    """
    size, _, inputs, outputs = kernel.shape
    kernel = kernel.astype(g.dtype)
    if _patches_are_faster(*g.shape[:3], size, inputs):
        image = jax.ShapeDtypeStruct((g.shape[0], *space, inputs), g.dtype)
        scatter = jax.linear_transpose(lambda x: _patches(x, size, stride, padding), image)
        return scatter(product(g, kernel.reshape(-1, outputs).T))[0]
    ends = [
        (size - 1 - padding, n + padding - 1 - (m - 1) * stride)
        for n, m in zip(space, g.shape[1:], strict=False)
    ]
    rotated = jnp.flip(kernel, (0, 1)).swapaxes(-1, -2)
    return _lax_conv(g, rotated, ends, x_dilation=stride)


def _kernel_gradient(x, g, stride, padding, size, dtype):
    """The adjoint of `convolve` in its kernel: x [B, H, W, in], g [B, H', W', out] -> kernel.

    It is a convolution of x with g as its kernel, dilated by the stride. The batch is the axis that
    is summed over, so the input channels take the place of a batch axis.

    As products it has two forms. For few cells, or with a stride, it is one product of the patches
    and g. For many cells, it is one product for each row of the kernel, of g and the patches that
    the row sees.
    """
    inputs, outputs = x.shape[-1], g.shape[-1]
    if _products_are_faster(g, inputs, size):
        if stride > 1 or inputs == 1 or g.size // outputs <= size * inputs:
            patches = _patches(x, size, stride, padding)
            return _product_of_columns(patches, g, dtype).reshape(size, size, inputs, outputs)
        windows = _row_patches(x, size, stride, padding)

        def row(i):
            seen = lax.dynamic_slice_in_dim(windows, i, g.shape[1], axis=1)
            return _product_of_columns(g, seen, dtype)

        products = lax.map(row, jnp.arange(size))  # in a loop, so that one slice is kept at a time
        return products.reshape(size, outputs, size, inputs).transpose(0, 2, 3, 1)
    ends = [
        (padding, size + (m - 1) * stride - n - padding)
        for n, m in zip(x.shape[1:3], g.shape[1:], strict=False)
    ]
    x, g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    return _lax_conv(x, g, ends, kernel_dilation=stride, dtype=dtype).transpose(1, 2, 0, 3)


def _lax_conv(x, kernel, padding, stride=1, x_dilation=1, kernel_dilation=1, dtype=None):
    """A convolution in the layout that runs fast: channels last in x, kernel and result."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=[stride] * 2,
        padding=padding,
        lhs_dilation=[x_dilation] * 2,
        rhs_dilation=[kernel_dilation] * 2,
        dimension_numbers=LAYOUT,
        preferred_element_type=dtype,
    )


def _patches_are_faster(batch, height, width, size, channels):
    """Whether products over patches are faster than a convolution onto this grid.

    They are on grids of 4×4 and less (5×5, 256→512, onto 2×2 at batch 32: 2.5 ms against 287), for
    one channel (its adjoint, 32×32 cells, batch 32: 0.5 ms against 51), and if the patches fit into
    the cache. Even then, a 3×3 convolution with 128 channels or fewer is the faster form: with 32
    channels on 16×16 cells, batch 4, it took 0.19 ms, and products took 0.34 ms.
    """
    patches = 4 * batch * height * width * size * size * channels  # bytes
    fit = patches <= 4 << 20 and (size > 3 or channels > 128)
    return min(height, width) <= 4 or channels == 1 or fit


def _products_are_faster(g, inputs, size):
    """Whether the gradient of a kernel is faster as products than as a convolution.

    Measured on one core, in GFLOP/s, convolution and products:

    - 3×3, 32×32 cells, batch 4, JAX 0.10.2: 92 and 73 with 48 channels, 101 and 69 from 40 to 96,
      49 and 95 with 128 (g has 2 MB). JAX 0.12 lost the convolution's speed (40 and 78, 34 and 81,
      31 and 94), and JAX 0.7.2 did not have it with 48 channels (61 and 81).
    - With 256 channels, 105 and 97 onto 16×16 cells, and 79 and 92 onto 8×8 (JAX 0.10.2).
    - 5×5, stride 2: 123 and 85 onto 256 cells (128 to 256 channels), 58 and 67 onto 64.
    - 5×5 from one channel, batch 16, onto 32×32 cells: 32 and 38.

    Either way it is a long sum with a small result. In the automata, it reached 51 to 58% (3×3) and
    60 to 69% (1×1) of a large product's rate, where a forward step reached 87%. The layers of the
    baseline took 104 ms of an update of 120 ms, of which their arithmetic accounts for 48 ms: they
    also read kernels of 13 MB for products with few rows.
    """
    outputs = g.shape[-1]
    few = g.size // outputs < 128 or inputs == 1
    large = 4 * g.size >= 2 << 20  # bytes
    return few or large or (size == 3 and (outputs > 128 or not CONVOLUTIONS_ARE_FAST))


def _every(x, first, count, stride, axis):
    """`count` slices of x along the axis: first, first + stride, …"""
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
