"""The models of `vnca.models`, and the norm of the gradient, in the forms that a TPU runs fast.

Each function computes the same sum as the plain one, up to rounding. At the precision in which a
TPU multiplies by default (operands rounded to bfloat16, sums in float32) it rounds the same
operands. The numbers are estimates by XLA's TPU compiler (`--mode=compile`), in thousand cycles of
a v5e core, of the automata for 4 images of 32×32×256, forward and backward:

- The 3×3 convolution as nine shifted products takes 130. As a convolution it takes 343, since a
  batch of 4 makes XLA cut the image into strips. From 8 images on the convolution is faster.
- Cells are [1, H, W·B, C], with the batch beside the columns, or [H, W, B, C] if 8 divides B. In
  the first layout, a shift by one column is a shift by B rows, and in each, whole tiles of 8 rows
  move, even on a grid of 2×2. A step on 2×2 takes 25 instead of 96, on 4×4 27 instead of 108, on
  8×8 41 instead of 112.
- Of each step only the cells are kept, in bfloat16, to which the products that read them round them
  anyway. All else is computed again in the backward pass. Everything then stays on the chip
  (128 MiB): a step takes 357 instead of 826, although it has 71 products instead of 54.
- The gradient of a bias is a product with ones at precision "high", which keeps 16 bits of each
  number. On the matrix unit this takes 1, and adding it to the sums of other steps is free. A sum
  over the cells would take 19, and adding it 2.
"""

from functools import lru_cache, partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from vnca import layers
from vnca.layers import LAYOUT
from vnca.model import encode as published_encode
from vnca.models.doubling import crop, double, nca_step

ROWS = 8  # of a tile: what a TPU reads at once
LARGE = 1 << 17  # numbers
SMALL = 4  # rows of a grid on which a 5×5 convolution is faster as products over a table
MOST_STEPS = 127  # unrolled: the time to compile grows with them
OFF_CHIP = ("TPU v2", "TPU v3")  # device kinds whose arrays leave the chip between operations


def fast_model(model, settings, device_kind):
    """The Model of a config's `model` section, `settings`, in the form that a TPU runs fast.

    The published encoder and the baseline have such a form for grey images of 32×32 pixels alone.
    device_kind: as JAX names it, such as "TPU v5 lite".
    """
    size, colours, outputs = settings.size, settings.colours, model.likelihood.outputs
    is_small_and_grey = (size, colours) == (32, 1)
    is_published = getattr(model.encode, "func", None) is published_encode  # it is a partial
    if is_small_and_grey and is_published:
        model = model._replace(encode=encode)
    if settings.name == "doubling":
        doublings, steps = settings.doublings, settings.steps_per_doubling
        is_unrolled = device_kind in OFF_CHIP and doublings * steps <= MOST_STEPS
        grow = grow_off_chip if is_unrolled else grow_on_chip
        return model._replace(decode=decode_doubling(grow, doublings, steps, size, outputs))
    if settings.name == "nondoubling":
        return model._replace(develop=develop_at_most(model.max_steps))
    is_digit = is_small_and_grey and outputs == 1
    if settings.name == "baseline" and is_digit and settings.drawn_size == 28:
        return model._replace(decode=decode_baseline)
    return model


@lru_cache  # so that equal models have equal functions, and their programs are compiled once
def decode_doubling(grow, doublings, steps, size, outputs):
    """Makes `decode` of the doubling model from one of the two functions below."""

    def decode(params, z):
        chex.assert_shape(z, (None, len(params["decoder"]["residual"]["kernel"])))
        layers.check_floats(z)
        return crop(grow(doublings, steps, outputs, params["decoder"], z), size)

    return decode


def grow_off_chip(doublings, steps, outputs, params, z):
    """The doubling model's logits [B, n, n, outputs] after all steps, for chips whose limit is
    memory.

    These are JAX's own gradients with all steps unrolled, so that nothing is copied into stacks.
    Shifted products and recomputation took a fifth more cycles on a v3 core.
    """
    nn = SimpleNamespace(conv=layers.conv, linear=layers.linear, elu=elu)
    s = z[:, None, None]
    for k in range(1, doublings + 1):
        s = double(s)
        chex.assert_shape(s, (len(z), 2**k, 2**k, z.shape[1]))
        for _ in range(steps):
            s = nca_step(nn, params, s)
    return s[..., :outputs]


def grow_on_chip(doublings, steps, outputs, params, z):
    """The doubling model's logits [B, n, n, outputs] after all steps, for chips that hold its
    arrays."""
    s = z[None, None]
    for k in range(1, doublings + 1):
        s = s.repeat(2, axis=0).repeat(2, axis=1)
        chex.assert_shape(s, (2**k, 2**k, *z.shape))
        s = _steps(doubling_step, steps, steps, params, s)
    # Otherwise XLA lays the cells out for the few channels that the likelihood reads, and copies
    # all of them: 0.58 M of 9.2 M cycles in a sample of 32 images.
    logits = s[..., :outputs].transpose(2, 0, 1, 3)
    layout = Layout(major_to_minor=(0, 1, 2, 3))
    return lax.optimization_barrier(with_layout_constraint(logits, layout))


@lru_cache
def develop_at_most(most):
    """Makes `develop` of the non-doubling model, for at most `most` steps."""

    def develop(params, s, steps):
        if not isinstance(steps, jax.core.Tracer) and steps > most:
            raise ValueError(f"{steps} steps: this model develops for {most} at most")
        chex.assert_shape(s, (None, None, None, len(params["decoder"]["residual"]["bias"])))
        s = _steps(nondoubling_step, most, steps, params["decoder"], s.transpose(1, 2, 0, 3))
        # The cells keep their layout in memory. Otherwise XLA lays them out for the one channel
        # that the loss reads, and copies all of them there and back, at 1.1 M cycles. The barrier
        # keeps this layout out of a program's result, which JAX 0.10 would read wrongly.
        layout = Layout(major_to_minor=(1, 2, 0, 3))
        return lax.optimization_barrier(with_layout_constraint(s.transpose(2, 0, 1, 3), layout))

    return develop


def _steps(step, most, steps, params, s):
    """`repeat` on s [H, W, B, C], with B beside W where it is no multiple of a tile's rows."""
    height, width, batch, channels = s.shape
    shape = s.shape if batch % ROWS == 0 else (1, height, width * batch, channels)
    return repeat(partial(step, batch), most, steps, params, s.reshape(shape)).reshape(s.shape)


# ---- Steps --------------------------------------------------------------------------------------


def doubling_step(batch, params, s):
    """`vnca.models.doubling.nca_step` on cells s [1, H, W·B, C] or [H, W, B, C]."""
    h = perceive(params["perceive"], s, batch)
    for block in params["blocks"]:
        h = h + linear(block["linear1"], elu(linear(block["linear0"], h)))
    return s + linear(params["residual"], h)


def nondoubling_step(batch, params, s):
    """A step of NonDoublingVNCA on cells s, as `doubling_step`."""
    return s + linear(params["residual"], elu(perceive(params["perceive"], s, batch)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def repeat(step, most, steps, params, s):
    """s after `steps` steps, at most `most`, with a gradient that computes each step again.

    step: params, s -> s, the biases in rows (`_rowed`).
    """
    return _loop(most, steps, lambda _, s: step(_rowed(params), s), s)


def _repeat_forward(step, most, steps, params, s):
    def one(i, carry):
        s, kept = carry
        s = step(_rowed(params), s)
        return s, lax.dynamic_update_index_in_dim(kept, s.astype(kept.dtype), i + 1, 0)

    exact = jax.config.jax_default_matmul_precision not in (None, "default", "fastest", "bfloat16")
    first = s if exact else s.astype(jnp.bfloat16)  # to which products round it
    kept = lax.empty((most + 1, *s.shape), first.dtype)  # 256 MiB in the non-doubling model:
    kept = lax.dynamic_update_index_in_dim(kept, first, 0, 0)  # zeros would cost 0.5 M cycles
    s, kept = _loop(most, steps, one, (s, kept))
    return s, (steps, params, kept)


def _repeat_backward(step, most, saved, g):
    steps, params, kept = saved

    def one(i, carry):
        g, total = carry
        s = lax.dynamic_index_in_dim(kept, steps - 1 - i, keepdims=False).astype(g.dtype)
        grads, g = jax.vjp(step, _rowed(params), s)[1](g)
        return g, jax.tree.map(jnp.add, total, grads)

    g, total = _loop(most, steps, one, (g, jax.tree.map(jnp.zeros_like, _rowed(params))))
    return None, jax.tree.map(lambda p, sums: sums[0] if p.ndim == 1 else sums, params, total), g


repeat.defvjp(_repeat_forward, _repeat_backward)


def _rowed(params):
    """The parameters, each bias [C] as ROWS equal rows [ROWS, C].

    `_add_bias_backward` puts the whole gradient into every row, and `_repeat_backward` reads one.
    """
    return jax.tree.map(lambda p: jnp.broadcast_to(p, (ROWS, len(p))) if p.ndim == 1 else p, params)


def _loop(most, steps, body, carry):
    """body(i, carry) for i = 0, 1, … below `steps`, at most `most`. `steps` is known only at run
    time. The condition names `most` as well, because the compiler estimates the time from it."""
    return lax.while_loop(
        lambda state: (state[0] < steps) & (state[0] < most),
        lambda state: (state[0] + 1, body(*state)),
        (jnp.int32(0), carry),
    )[1]


@jax.custom_vjp
def elu(x):
    """As `vnca.layers.elu`, with a gradient that needs only the result."""
    positive = x > 0
    return jnp.where(positive, x, jnp.expm1(jnp.where(positive, 0, x)))


def _elu_forward(x):
    y = elu(x)
    return y, y


def _elu_backward(y, g):
    return (jnp.where(y > 0, g, g * (y + 1)),)  # because exp(x) = elu(x) + 1


elu.defvjp(_elu_forward, _elu_backward)

# ---- The gradient's norm -------------------------------------------------------------------------


def global_norm(tree):
    """As `vnca.optimizer.global_norm`, of large arrays on the matrix unit: 15 thousand cycles
    for 3.3 million numbers, where their sum takes 62. A product rounds each x by 2⁻⁹ at
    most, the sum of so many by 10⁻⁶."""
    return jnp.sqrt(sum(map(_square, jax.tree.leaves(tree))))


def _square(x):
    if x.size < LARGE:
        return jnp.sum(x**2)
    kept = min((x.ndim - 1, x.ndim - 2), key=lambda axis: x.shape[axis])
    axes = tuple(axis for axis in range(x.ndim) if axis != kept)
    y = lax.dot_general(x, x, ((axes, axes), ((), ())), precision=lax.Precision.DEFAULT)
    return jnp.sum(jnp.where(jnp.eye(len(y), dtype=bool), y, 0))


# ---- Encoder and baseline ------------------------------------------------------------------------
#
# In layers on 32×32 with 1 or 32 channels, blocks of 2×2 cells become one cell of a coarser grid
# with four times the channels. That fills registers of 128 numbers, and needs 9 taps instead of 25.
# On grids of 4×4 and 2×2 a convolution transposed its kernel in memory first (99 thousand cycles
# for 256 and 512 channels). There, a product with a table selects the cells that a tap sees.


def encode(params, images):
    """As `vnca.model.encode`: images [B, 32, 32, 1] -> mean, logvar, each [B, latent]."""
    chex.assert_shape(images, (len(images), 32, 32, 1))
    layers.check_floats(images)
    params, batch, x = params["encoder"], len(images), _blocked(images)
    for name, shifts in ("conv0", (0, 1)), ("conv1", (0,)):
        x = _shift(x, _blocked_kernel(params[name]["kernel"], shifts), batch)
        x = elu(_with_bias(x, params[name]["bias"]))
    x = x.reshape(16, 16, batch, -1)
    for i in range(2, 5):
        layer = params[f"conv{i}"]
        y = (_convolve_small if len(x) <= SMALL else _convolve)(x, layer["kernel"], 2)
        x = elu(_with_bias(y, layer["bias"]))
    x = x.transpose(2, 0, 1, 3).reshape(batch, -1)
    return tuple(jnp.split(_flat_linear(params["linear"], x), 2, axis=-1))


def decode_baseline(params, z):
    """As that of BaselineVAE: z [B, latent] -> logits [B, 32, 32, 1]."""
    params, batch = params["decoder"], len(z)
    chex.assert_shape(z, (batch, len(params["linear"]["kernel"])))
    layers.check_floats(z)
    x = _flat_linear(params["linear"], z).reshape(batch, 2, 2, -1).transpose(1, 2, 0, 3)
    for i in range(3):
        layer = params[f"conv_transpose{i}"]
        y = _transpose(x, layer["kernel"], _convolve_small if len(x) <= SMALL else _convolve)
        x = elu(_with_bias(y, layer["bias"]))
    x = x.reshape(1, 16, 16 * batch, -1)
    for name, shifts in ("conv_transpose3", (0,)), ("conv_transpose4", (0, 1)):
        x = _shift(x, _blocked_kernel(params[name]["kernel"], shifts), batch, 1)
        x = _with_bias(x, params[name]["bias"])
        x = elu(x) if name == "conv_transpose3" else x
    x = x.reshape(16, 16, batch, 2, 2).transpose(2, 0, 3, 1, 4).reshape(batch, 32, 32, 1)
    inside = jnp.pad(jnp.ones((28, 28, 1), bool), ((2, 2), (2, 2), (0, 0)))
    return jnp.where(inside, x, -1e4)  # as cutting and padding, 20 thousand cycles less


def _flat_linear(params, x):
    """x [B, in] -> [B, out]."""
    return _with_bias(_product(x, params["kernel"]).astype(x.dtype), params["bias"])


def _blocked(images):
    """2×2 pixels as channels: images [B, 32, 32, 1] -> [1, 16, 16·B, 4]."""
    return images.reshape(-1, 16, 2, 16, 2).transpose(1, 3, 0, 2, 4).reshape(1, 16, -1, 4)


def _blocked_kernel(kernel, shifts):
    """A 5×5 kernel [5, 5, in, out], padding 2, on blocks: a 3×3 kernel, padding 1.

    shifts (0, 1): of a convolution with stride 1, onto blocks, [3, 3, 4·in, 4·out]; (0,): with
    stride 2, onto cells, [3, 3, 4·in, out].
    """
    taps = [
        jnp.pad(kernel, ((a, 1 - a), (b, 1 - b), (0, 0), (0, 0))) for a in shifts for b in shifts
    ]
    taps = jnp.stack(taps, axis=3).reshape(3, 2, 3, 2, kernel.shape[2], -1)
    return taps.transpose(0, 2, 1, 3, 4, 5).reshape(3, 3, 4 * kernel.shape[2], -1)


def _with_bias(y, bias):
    """y [..., C] or, of blocks, [..., 4·C], and bias [C], whose gradient is summed in float32."""
    return (y + jnp.tile(bias, y.shape[-1] // len(bias))).astype(y.dtype)


def _seen(size):
    """Which cells of a grid the 25 taps of each cell of one of half its size see, as ones:
    [cells, smaller grid's cells, taps]."""
    with jax.ensure_compile_time_eval():  # a constant of the program
        cell, smaller, tap = jnp.indices((size, size // 2, 5), sparse=True)
        line = jnp.float32(cell == 2 * smaller + tap - 2)
        pair = line[:, None, :, None, :, None] * line[None, :, None, :, None, :]
        return pair.reshape(size**2, -1, 25)


def _convolve_small(x, kernel, _):
    """As `_convolve` with stride 2, by a table of the cells that a tap sees: x [H, H, B, in].

    The table's products are exact, so that the gradient, which sums what overlaps, is, too.
    """
    size, _, batch, inputs = x.shape
    table, x = _seen(size).astype(x.dtype), x.reshape(size**2, batch, inputs)
    taps = jnp.tensordot(table, x, (0, 0), precision="highest")
    y = jnp.tensordot(taps, kernel.reshape(25, inputs, -1).astype(x.dtype), ((1, 3), (0, 1)))
    return y.reshape(size // 2, size // 2, batch, -1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _transpose(x, kernel, convolve):
    """The adjoint of convolve(·, kernel, 2): x [H, W, B, in], kernel [5, 5, out, in]."""
    height, width, batch, _ = x.shape
    shape = jax.ShapeDtypeStruct((2 * height, 2 * width, batch, kernel.shape[2]), x.dtype)
    return jax.linear_transpose(lambda y: convolve(y, kernel, 2), shape)(x)[0]


def _transpose_forward(x, kernel, convolve):
    return _transpose(x, kernel, convolve), (x, kernel)


# Written out, as JAX's own gradient of a kernel turns it in memory: 72 thousand cycles for 256 and
# 512 channels.
def _transpose_backward(convolve, saved, g):
    x, kernel = saved
    y, pull = jax.vjp(lambda kernel: convolve(g, kernel, 2), kernel)
    return y, *pull(x)


_transpose.defvjp(_transpose_forward, _transpose_backward)

# ---- Layers on cells [1, H, W·B, C] or [H, W, B, C] ---------------------------------------------


@jax.named_scope("linear")  # a name in what the compiler writes
def linear(params, x):
    """Cells x with `in` channels -> `out` channels."""
    return _add_bias(_product(x, params["kernel"]).astype(x.dtype), params["bias"])


@jax.named_scope("perceive")
def perceive(params, x, batch):
    """The 3×3 convolution, zero-padded by 1: cells x with `in` channels -> `out` channels."""
    kernel = params["kernel"]
    y = _convolve(x, kernel) if batch % ROWS == 0 else _shift(x, kernel, batch)
    return _add_bias(y, params["bias"])


def _product(x, kernel, axis=0):
    """x [..., C] with this axis of the kernel, summed in float32."""
    kernel = kernel.astype(x.dtype)
    return jnp.tensordot(x, kernel, (-1, axis), preferred_element_type=jnp.float32)


def _convolve(x, kernel, stride=1):
    """x [H, W, B, in] with kernel [k, k, in, out], zero-padded by k // 2: [H/stride, W/stride, B,
    out]."""
    padding = len(kernel) // 2
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        [stride, stride],
        [(padding, padding), (padding, padding)],
        dimension_numbers=("HWNC", "HWIO", "HWNC"),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shift(x, kernel, batch, axis=0):
    """Σ of x, shifted, with each tap of a 3×3 kernel: nine products; axis 1: the adjoint in x."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (batch, batch), (0, 0)))
    total = 0
    for i in range(3):
        for j in range(3):
            shifted = padded[:, i : i + height, j * batch : j * batch + width]
            tap = kernel[2 - i, 2 - j] if axis else kernel[i, j]
            total = total + _product(shifted, tap, axis)
    return total.astype(x.dtype)


def _shift_forward(x, kernel, batch, axis):
    return _shift(x, kernel, batch, axis), (x, kernel)


def _shift_backward(batch, axis, saved, g):
    x, kernel = saved
    image, cotangent = (g, x) if axis else (x, g)

    def convolution(kernel):
        return lax.conv_general_dilated(
            image,
            kernel,
            window_strides=[1, 1],
            padding=[(1, 1), (batch, batch)],
            rhs_dilation=[1, batch],
            dimension_numbers=LAYOUT,
        )

    of_kernel = jax.linear_transpose(convolution, kernel.astype(x.dtype))(cotangent)[0]
    return _shift(g, kernel, batch, 1 - axis), of_kernel.astype(kernel.dtype)


_shift.defvjp(_shift_forward, _shift_backward)


@jax.custom_vjp
def _add_bias(y, bias):
    return (y + bias[0]).astype(y.dtype)


def _add_bias_forward(y, bias):
    return _add_bias(y, bias), None


def _add_bias_backward(_, g):
    # "high" multiplies in three parts of bfloat16, of which two reach a sum with ones: 2⁻¹⁷.
    ones = jnp.ones((*g.shape[:-1], ROWS), g.dtype)
    cells = ((0, 1, 2), (0, 1, 2))
    return g, jnp.tensordot(ones, g, cells, precision="high", preferred_element_type=jnp.float32)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)
