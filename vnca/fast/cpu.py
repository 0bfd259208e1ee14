"""Fast forms for XLA's CPU compiler: the layers of `vnca.layers`; the decoder and the gradient of
narrow doubling models; the decoder and the steps of HealingVNCA.

Each layer computes the same sum as the plain layer of its name, up to rounding, and has a gradient
of its own. The compiler has fast code for one layout of convolutions, that of `_lax_conv`, and for
products of two matrices. It rewrites other layouts only outside of loops (JAX issue 12868), or it
transposes arrays in memory. In a scan, JAX's own gradient of a 3×3 convolution ran at 4 GFLOP/s,
the gradient below at 170.

A model's `make` takes this module as its argument `nn`.
"""

import sys
from functools import lru_cache, partial
from math import factorial, log
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vnca import training
from vnca.devices import places
from vnca.layers import LAYOUT, add_bias, check_floats, kernel_for
from vnca.likelihoods import as_floats
from vnca.losses import objective, reparametrize
from vnca.model import take_at_most
from vnca.models import healing
from vnca.models.doubling import crop, double, nca_step
from vnca.training import accumulate, normal, stream

MOST_CHANNELS = 64  # channels-first: 32 and 48 were faster, 256 were not
MOST_STEPS = 16  # unrolled: the time to compile grows with them
UNROLLED_ROWS = 32  # on grids of as many rows or more, steps are unrolled
MOST_ENCODED = 512  # images at once: the first layer's patches take 102 KB for each


def has_few_channels(model):
    """Whether the cells of a Model have few enough channels to be computed channels-first. A model
    without cells has none."""
    if not model.grow:
        return False
    params = jax.eval_shape(model.init, jax.random.key(0))
    z = jax.ShapeDtypeStruct((1, model.latent_size), jnp.float32)
    stages = jax.eval_shape(lambda params, z: model.grow(params, z, None), params, z)
    return stages[-1].shape[-1] <= MOST_CHANNELS


def fast_model(model, settings):
    """The Model of a config's `model` section, `settings`, in the form that a CPU runs fast.

    `model` has the layers of this file. Narrow doubling models of few steps become channels-first,
    and so does the training of HealingVNCA. For these, micro-batches of 2 images are faster than of
    4. With channels-first cells and such micro-batches, an update on one core took 0.77 times as
    long with JAX 0.10.2 and 0.73 with 0.12 (32 channels), 0.88 and 0.73 (48 channels), and 0.92 and
    0.83 (small_healing). With 128 and 256 channels it took 0.94 to 1, and evaluations
    took up to 1.4 times as long.
    """
    size, outputs = model.likelihood.size, model.likelihood.outputs
    if settings.name == "healing":
        waves = settings.position_waves
        changing = settings.channels - 4 * waves - settings.latent_size
        return model._replace(
            decode=decode_healing(model.initial_cells, changing, model.steps, outputs),
            develop=develop_healing(size, changing, waves, model.max_steps),
        )
    if settings.name == "doubling" and has_few_channels(model):
        steps = settings.steps_per_doubling
        if steps <= MOST_STEPS:
            decode = decode_doubling(settings.doublings, steps, size, outputs)
            return model._replace(decode=decode)
    return model


@lru_cache  # so that equal models have equal functions, and their programs are compiled once
def decode_doubling(doublings, steps, size, outputs):
    """Makes `decode` of a doubling model: params, z [B, latent] -> logits [B, size, size, outputs].

    Its cells are channels-first. It unrolls the steps on grids of UNROLLED_ROWS and more: a scan
    copies each array that the backward pass needs into a stack and out of it. Without the scan, an
    update with 32 channels took 9% less. With 256 it took no less, and temporaries grew by half.
    """

    def decode(params, z):
        params = params["decoder"]
        chex.assert_shape(z, (None, len(params["residual"]["bias"])))
        check_floats(z)
        s = z.T  # one cell for each image
        for side in (2**k for k in range(1, doublings + 1)):
            s = double(s.reshape(-1, side // 2, side // 2, 1)).reshape(len(s), -1)
            chex.assert_shape(s, (z.shape[1], len(z) * side**2))
            step = partial(nca_step, channels_first(side), params)
            if side < UNROLLED_ROWS:
                s, _ = lax.scan(lambda s, _, step=step: (step(s), None), s, length=steps)
            else:
                for _ in range(steps):
                    s = step(s)
        return crop(s[:outputs].T.reshape(-1, side, side, outputs), size)

    return decode


@lru_cache
def decode_healing(initial_cells, changing, steps, outputs):
    """Makes `decode` of HealingVNCA: params, z [B, latent] -> logits [B, H, W, outputs].

    No cell is lost, so the channels after the first `changing` stay the same in all steps. So does
    their part of the convolution, 70% of it in the packaged model, and it is computed once. An
    evaluation on one core took 0.46 times as long with JAX 0.10.2 and 0.51 with 0.12.
    """

    def decode(params, z):
        params = params["decoder"]
        kernel, bias = params["perceive"]["kernel"], params["perceive"]["bias"]
        cells = initial_cells(z)
        kept = {"kernel": kernel[:, :, changing:], "bias": bias}
        seen = conv(kept, cells[..., changing:], padding=1)  # of the channels that stay the same

        def step(s, _):
            h = elu(convolve(s, kernel[:, :, :changing], 1, 1) + seen)
            return s + linear(params["residual"], h), None

        s, _ = lax.scan(step, cells[..., :changing], length=steps)
        return s[..., :outputs]

    return decode


@lru_cache
def develop_healing(size, changing, waves, max_steps):
    """Makes `develop` of HealingVNCA, for up to `max_steps` steps: params, s [B, size, size, C],
    steps -> cells like s.

    Its cells are channels-first between the first step and the last. The position and z of cells
    change in a step only if one is lost, so only then are they inherited and convolved. On two
    devices, an update of small_healing took 0.56 to 0.74 times as long before damage begins.
    With damage it took 0.85 times as long with JAX 0.10.2, and 0.89 with 0.12.
    """
    nn = channels_first(size)

    def to_channels_first(s):
        return s.reshape(-1, s.shape[-1]).T

    def to_grid(s):
        return s.T.reshape(-1, size, size, len(s))

    def see(params, kept):
        """What position and z contribute to the hidden layer, [hidden, cells], before its ELU."""
        perceive = params["perceive"]
        return nn.conv(perceive | {"kernel": perceive["kernel"][:, :, changing:]}, kept, padding=1)

    def step(params, state):
        s, kept, seen = state  # what steps change, position and z, `see` of them: [channels, cells]
        hidden = _convolve_cells(s, params["perceive"]["kernel"][:, :, :changing], size)
        change = nn.linear(params["residual"], nn.elu(hidden + seen))

        def heal(kept, seen):
            inherited, alive = healing.inherit(sys.modules[__name__], to_grid(kept), waves)
            kept = kept + to_channels_first((1 - alive) * inherited)
            return kept, see(params, kept)

        alive = to_channels_first(healing.living(to_grid(kept), waves))
        healed = lax.cond(jnp.all(alive == 1), lambda *same: same, heal, kept, seen)
        return s + alive * change, *healed

    def develop(params, s, steps):
        params = params["decoder"]
        chex.assert_shape(s, (None, size, size, params["perceive"]["kernel"].shape[2]))
        s, kept = jnp.split(to_channels_first(s), [changing])
        state = s, kept, see(params, kept)
        s, kept, _ = take_at_most(max_steps, partial(step, params), state, steps)
        return to_grid(jnp.concatenate([s, kept]))

    return develop


def batch_gradient(model, config, state, t, images, indices):
    """As `vnca.training.batch_gradient`, but the encoder runs once, on all images of a device.

    Micro-batches are then of the decoder alone. Each takes its images' mean and logvar as
    parameters, and the gradients with respect to these, of all images, go through one backward pass
    of the encoder. Up to rounding, the result is the same. The encoder's memory grows with B/D.
    Above MOST_ENCODED images, each micro-batch therefore encodes its own.

    Within micro-batches, the encoder would read all its kernels, and add to all their gradients,
    for only two images. An update on one core took 0.93 to 0.95 times as long with JAX 0.10.2 and
    0.86 to 0.94 with 0.12 (32 channels), and 0.97 and 0.93 (48 channels).
    """
    count = len(indices)
    if count > MOST_ENCODED:
        return training.batch_gradient(model, config, state, t, images, indices)
    x = as_floats(model.likelihood, images[indices])
    noise = normal(stream(state.seed, "posterior", t), places(count), model.latent_size)
    posterior, pull_back = jax.vjp(
        lambda encoder: model.encode({"encoder": encoder}, x), state.params["encoder"]
    )

    def gradient(decoder, x, mean, logvar, noise):
        def loss_of(decoder, mean, logvar):
            logits = model.decode({"decoder": decoder}, reparametrize(mean, logvar, noise))
            return objective(model.likelihood, mean, logvar, logits, x, config.train.kl_weight)

        of_each = jax.grad(loss_of, (0, 1, 2), has_aux=True)
        (grads, *of_posterior), terms = of_each(decoder, mean, logvar)
        # The loss is a mean over the micro-batch here, and over all images in the end.
        return grads, (terms, tuple(len(x) / count * g for g in of_posterior))

    grads, terms, of_posterior = accumulate(
        config.train.micro_batch, gradient, state.params["decoder"], x, *posterior, noise
    )
    return {"encoder": pull_back(of_posterior)[0], "decoder": grads}, terms, state.pool


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
    return (_flat(x) @ kernel_for(kernel, x)).reshape(*x.shape[:-1], -1)


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
    kernel = kernel_for(kernel, x)
    size = len(kernel)
    grid = [(n + 2 * padding - size) // stride + 1 for n in x.shape[1:3]]
    if _patches_are_faster(x.shape[0], *grid, size, x.shape[-1], stride):
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
    doubles = tuple(space) == (2 * g.shape[1], 2 * g.shape[2])
    if (size, stride, padding) == (5, 2, 2) and doubles and inputs <= 16:
        return _adjoint_by_phases(g, kernel)
    ends = [
        (size - 1 - padding, n + padding - 1 - (m - 1) * stride)
        for n, m in zip(space, g.shape[1:], strict=False)
    ]
    rotated = jnp.flip(kernel, (0, 1)).swapaxes(-1, -2)
    return _lax_conv(g, rotated, ends, x_dilation=stride)


def _adjoint_by_phases(g, kernel):
    """`_adjoint` with stride 2 and padding 2 onto a grid of twice the size, without a dilation:
    g [B, H', W', out], kernel [5, 5, in, out] -> [B, 2·H', 2·W', in].

    In each row and column of the result, even cells are sums over the kernel's elements 0, 2 and 4,
    and odd cells over 1 and 3. One 3×3 convolution gives all 2×2 cells that take the place of a
    cell of g. It does 1.44 times the arithmetic, but XLA's dilated convolution ran at 50 GFLOP/s.
    Onto 32×32 cells of 12 channels, batch 16, that took 1.17 ms, and this takes 0.84 ms (EPYC, JAX
    0.10.2; 1.19 and 1.07 with 0.12).
    """
    batch, height, width, outputs = g.shape
    inputs = kernel.shape[2]
    phases = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))  # the sixth element is 0
    phases = phases.reshape(3, 2, 3, 2, inputs, outputs)  # element 2·i + phase of a row or column
    phases = jnp.flip(phases, (0, 2)).transpose(0, 2, 5, 1, 3, 4)
    y = _lax_conv(g, phases.reshape(3, 3, outputs, 4 * inputs), [(1, 1)] * 2)
    y = y.reshape(batch, height, width, 2, 2, inputs).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, 2 * height, 2 * width, inputs)


def _kernel_gradient(x, g, stride, padding, size, dtype):
    """The adjoint of `convolve` in its kernel: x [B, H, W, in], g [B, H', W', out] -> kernel.

    It is a convolution of x with g as its kernel, dilated by the stride. The batch is the axis that
    is summed over, so the input channels take the place of a batch axis.

    As products it has two forms. For few cells, one input channel, or with a stride, it is one
    product of the patches and g. For many cells, it is one product for each row of the kernel, of g
    and the patches that the row sees.
    """
    inputs, outputs = x.shape[-1], g.shape[-1]
    if _products_are_faster(g, inputs, size, x.shape[1:3]):
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


def _patches_are_faster(batch, height, width, size, channels, stride=1):
    """Whether products over patches are faster than a convolution onto this grid.

    They are on grids of 4×4 and less (5×5, 256→512, onto 2×2 at batch 32: 2.5 ms against 287), for
    one channel (its adjoint, 32×32 cells, batch 32: 0.5 ms against 51), and if the patches fit into
    the cache. Even then, a 3×3 convolution with 128 channels or fewer is the faster form: with 32
    channels on 16×16 cells, batch 4, it took 0.19 ms, and products took 0.34 ms.

    With a stride, the convolution is also faster on all grids of 4×4 and more. On an EPYC, it took
    0.50 ms (5×5, 32→64, onto 8×8, batch 8), and products took 0.66 ms (JAX 0.10.2; 0.68 and 0.78
    with 0.12). The exception is 4×4 cells with 128 channels or more. On a Xeon, the convolution
    took 3.2 ms (128→256, batch 16) with JAX 0.10.2, but 7.5 ms with 0.12. Products took 3.8 ms with
    both. An adjoint counts as a convolution without a stride: it has a dilation instead.
    """
    if stride > 1 and channels > 1:
        return min(height, width) < (5 if channels >= 128 else 4)
    patches = 4 * batch * height * width * size * size * channels  # bytes
    fit = patches <= 4 << 20 and (size > 3 or channels > 128)
    return min(height, width) <= 4 or channels == 1 or fit


def _products_are_faster(g, inputs, size, space):
    """Whether the gradient of a kernel is faster as products than as a convolution.

    g: [B, H', W', out], the gradient of the convolution's result; inputs: the number of its input
    channels; size: that of the kernel; space: (H, W), the grid of its input.

    Measured on one core, in GFLOP/s, convolution and products:

    - 3×3, 32×32 cells, batch 4: with 128 channels, 49 and 95 (JAX 0.10.2), 31 and 94 (0.12). With
      256 channels, 105 and 97 onto 16×16 cells, and 79 and 92 onto 8×8 (0.10.2).
    - 5×5, stride 2: 123 and 85 onto 256 cells (128 to 256 channels), 58 and 67 onto 64.
    - 5×5 from one channel, batch 16: from 32×32 cells onto 32×32, 30 and 18 with 12 output channels
      (EPYC), 32 and 38 with 32 (Xeon). From 28×28 onto 32×32, 2 and 18 with 12 (EPYC).

    Either way it is a long sum with a small result. In the automata, it reached 51 to 58% (3×3) and
    60 to 69% (1×1) of a large product's rate, where a forward step reached 87%. The layers of the
    baseline took 104 ms of an update of 120 ms, of which their arithmetic accounts for 48 ms: they
    also read kernels of 13 MB for products with few rows.
    """
    outputs = g.shape[-1]
    few = g.size // outputs < 128 or (inputs == 1 and space != g.shape[1:3])
    large = 4 * g.size >= 2 << 20  # bytes
    return few or large or size == 3


def _windows(x, size, stride, axis):
    """The elements of all windows of `size` along the axis: `size` arrays, the first one of the
    windows' first elements.

    With a stride, x is first split into that many arrays, because contiguous slices are faster: an
    update of small_baseline took 0.87 of the time that it took with strided slices.
    """
    count = (x.shape[axis] - size) // stride + 1
    phases = [lax.slice_in_dim(x, k, None, stride, axis) for k in range(stride)]
    return [
        lax.slice_in_dim(phases[k % stride], k // stride, k // stride + count, axis=axis)
        for k in range(size)
    ]


def _row_patches(x, size, stride, padding):
    """Every window of `size` columns of x [B, H, W, C], zero-padded, as channels:
    [B, H + 2·padding, W', size·C]."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return jnp.concatenate(_windows(x, size, stride, axis=2), axis=-1)


def _patches(x, size, stride, padding):
    """Every size×size window of x [B, H, W, C], zero-padded, as channels: [B, H', W', size²·C]
    (im2col)."""
    x = _row_patches(x, size, stride, padding)
    return jnp.concatenate(_windows(x, size, stride, axis=1), axis=-1)


# ---- Layers of an NCA step, channels first -------------------------------------------------------
#
# In [C, cells], products with a narrow kernel have long rows. For 4,096 cells of 32 channels, the
# gradient of a 1×1 kernel ran at 64 GFLOP/s, and in [cells, C] at 31. With 48 channels it was 79
# and 62. XLA's convolutions run at 1.5 GFLOP/s in this layout, so a convolution is a product, too.


def channels_first(side):
    """The layers of an NCA step, for cells [C, B·side·side]: the second axis runs over the images,
    their rows and their columns."""
    return SimpleNamespace(elu=elu, linear=_linear_of_cells, conv=partial(_conv_of_cells, side))


def _linear_of_cells(params, s):
    """As `linear`: s [in, cells] -> [out, cells]."""
    return _add_bias_of_cells(params, _map_cells(s, params["kernel"]))


def _conv_of_cells(side, params, s, padding):
    """As `conv` onto a grid of the same size: s [in, cells] -> [out, cells]."""
    chex.assert_shape(params["kernel"], (2 * padding + 1, 2 * padding + 1, None, None))
    return _add_bias_of_cells(params, _convolve_cells(s, params["kernel"], side))


def _add_bias_of_cells(params, y):
    return (y + params["bias"][:, None]).astype(y.dtype)


@jax.custom_vjp
def _map_cells(s, kernel):
    """s [in, cells], kernel [in, out] -> [out, cells]. Its gradient is written out to sum that of
    the kernel in the kernel's dtype, also if s is bfloat16."""
    return kernel.T.astype(s.dtype) @ s


def _map_cells_forward(s, kernel):
    return _map_cells(s, kernel), (s, kernel)


def _map_cells_backward(saved, g):
    s, kernel = saved
    return _map_cells(g, kernel.T), _product_of_rows(s, g, kernel.dtype)


_map_cells.defvjp(_map_cells_forward, _map_cells_backward)


def _product_of_rows(s, g, dtype):
    """Σ over all cells of s's column times g's row: s [in, cells], g [out, cells] -> [in, out]."""
    return jnp.matmul(s, g.T, preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_cells(s, kernel, side):
    """s [in, cells], kernel [k, k, in, out] with an odd k -> [out, cells].

    Each cell sees its k neighbours in a row, k·in channels. One product turns them into what the
    cell adds to its k neighbours in a column, k·out channels.
    """
    around = _around(kernel)
    seen = _neighbours(s, around, side)
    return _sum_to_neighbours(_map_cells(seen, _matrix(kernel)), side * around, side**2)


def _convolve_cells_forward(s, kernel, side):
    return _convolve_cells(s, kernel, side), (s, kernel)


def _convolve_cells_backward(side, saved, g):
    s, kernel = saved
    k, _, inputs, outputs = kernel.shape
    around = _around(kernel)
    # A scan would keep what the cells see for each step: that took longer than to gather it again.
    seen, sent = _neighbours(s, around, side), _neighbours(g, -side * around, side**2)
    of_kernel = _product_of_rows(seen, sent, kernel.dtype).reshape(k, inputs, k, outputs)
    of_seen = _map_cells(sent, _matrix(kernel).T)
    return _sum_to_neighbours(of_seen, -around, side), of_kernel.transpose(2, 0, 1, 3)


_convolve_cells.defvjp(_convolve_cells_forward, _convolve_cells_backward)


def _around(kernel):
    """The distances of a cell's neighbours: −1, 0 and 1 for a 3×3 kernel."""
    return np.arange(kernel.shape[0]) - kernel.shape[0] // 2


def _matrix(kernel):
    """kernel [k, k, in, out] -> [k·in, k·out]: from neighbours in a row to neighbours in a
    column."""
    k, _, inputs, outputs = kernel.shape
    return kernel.transpose(1, 2, 0, 3).reshape(k * inputs, k * outputs)


def _neighbours(s, distances, length):
    """The neighbours at these distances as channels: s [C, cells] -> [len(distances)·C, cells]."""
    return jnp.concatenate([_move(s, d, length) for d in distances])


def _sum_to_neighbours(s, distances, length):
    """The sum of the parts of s, each moved by its distance: [len(distances)·C, cells] ->
    [C, cells]."""
    parts = jnp.split(s, len(distances))
    return sum(_move(part, d, length) for part, d in zip(parts, distances, strict=True))


def _move(s, distance, length):
    """Shifts s [C, cells] within lines of that length: cell i of a line becomes what cell
    i + distance was, or 0 if the line has no such cell."""
    zero, lines = jnp.zeros((), s.dtype), s.reshape(-1, length)
    return lax.pad(lines, zero, [(0, 0, 0), (-distance, distance, 0)]).reshape(s.shape)
