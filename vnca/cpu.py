"""The products and convolutions of `vnca.layers`, and their gradients, as a CPU runs them fast;
and the gradient of a batch in pieces that fit into its cache.

Nothing here is another method: each function gives the sum that the layer of its name defines, to
rounding. They are written out because XLA's CPU compiler has a fast path for one layout alone (of
convolutions, the one in `_lax_conv`; of products, matrices), and rewrites others into it only
outside of loops (jax issue 12868), or by transposing arrays in memory: in a scan, JAX's own
gradient of a 3×3 convolution ran at 4 GFLOP/s, this one at 170.
"""

import inspect
from functools import wraps

import jax
import jax.numpy as jnp
from jax import lax


def door(fast, fast_gradient):
    """Gives a layer(x, kernel, *sizes), linear in x and in kernel, another way on a CPU.

    fast: the same function; fast_gradient: x, kernel, g, *sizes -> the gradients of x and kernel
    where that of the result is g. The platform is that which a program is lowered for, forward
    and backward. Both ways keep x and kernel for it, as a scan keeps what either way asks for.
    """

    def through(plain):
        @wraps(plain)
        def either(x, kernel, *sizes):
            return by_platform(with_sizes(fast, sizes), with_sizes(plain, sizes), x, kernel)

        def own_gradient(x, kernel, g, *sizes):
            # Of a linear function JAX's gradient is its transpose.
            of_x = jax.linear_transpose(lambda x: plain(x, kernel, *sizes), x)
            of_kernel = jax.linear_transpose(lambda kernel: plain(x, kernel, *sizes), kernel)
            return *of_x(g), *of_kernel(g)

        def backward(*arguments):
            *sizes, kept, g = arguments
            ways = with_sizes(fast_gradient, sizes), with_sizes(own_gradient, sizes)
            return by_platform(*ways, *kept, g)

        static = range(2, len(inspect.signature(plain).parameters))
        layer = jax.custom_vjp(either, nondiff_argnums=tuple(static))
        layer.defvjp(lambda x, w, *sizes: (layer(x, w, *sizes), (x, w)), backward)
        return layer

    return through


def with_sizes(function, sizes):
    """The function of its arrays alone."""
    return lambda *arrays: function(*arrays, *sizes)


def by_platform(fast, plain, *arrays):
    """fast(*arrays) in a program for a CPU, plain(*arrays) in one for anything else."""
    return lax.platform_dependent(*arrays, cpu=fast, default=plain)


def gradient_of_result(slope):
    """Gives a function of x the gradient slope(its result, g).

    The result, which the next layer keeps anyway, is enough: one array fewer is written, kept and
    read for each activation. So on all devices, as a scan keeps what either way asks for.
    """

    def through(plain):
        function = jax.custom_vjp(plain)
        function.defvjp(lambda x: (plain(x),) * 2, lambda y, g: (slope(y, g),))
        return function

    return through


# ---- Products -----------------------------------------------------------------------------------
#
# Linear maps are products of two matrices everywhere: a convolution without spatial axes ran at
# the speed of a product in JAX 0.10, and at 1% of it, inside a loop, in JAX 0.12.


def product(x, kernel):
    """x [..., in] with kernel [in, out] -> [..., out]."""
    return (_flat(x) @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], -1)


def product_gradient(x, kernel, g):
    """Gradients of x and kernel, the latter summed in its own dtype."""
    return product(g, kernel.T), _product_of_columns(x, g, kernel.dtype)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _product_of_columns(x, g, dtype):
    """Σ of x's column times g's row over all cells: x [..., in], g [..., out] -> [in, out]."""
    return jnp.matmul(_flat(x).T, _flat(g), preferred_element_type=dtype)


# ---- Convolutions -------------------------------------------------------------------------------
#
# A convolution is linear in its input and in its kernel, so its gradient is two maps of the same
# kind. All three are written twice: as a convolution in the fast layout, and as products of
# matrices over patches; which one runs, the shapes say, by what was faster.


def convolve(x, kernel, stride, padding):
    """x [B, H, W, in] with kernel [k, k, in, out] -> [B, H', W', out], zero-padded."""
    kernel, size = kernel.astype(x.dtype), len(kernel)
    grid = [(n + 2 * padding - size) // stride + 1 for n in x.shape[1:3]]
    if _patches_are_faster(x.shape[0], *grid, size, x.shape[-1]):
        patches = _patches(x, size, stride, padding)
        return product(patches, kernel.reshape(-1, kernel.shape[-1]))
    return _lax_conv(x, kernel, [(padding, padding)] * 2, stride)


def convolve_gradient(x, kernel, g, stride, padding):
    """Gradients of x, the adjoint of the convolution, and of the kernel."""
    return (
        _adjoint(g, kernel, stride, padding, x.shape[1:3]),
        _kernel_gradient(x, g, stride, padding, len(kernel), kernel.dtype),
    )


def convolve_transpose(x, kernel, stride, padding, output_padding):
    """x [B, H, W, in] with kernel [k, k, out, in] -> [B, H', W', out]."""
    size = len(kernel)
    space = [(n - 1) * stride - 2 * padding + size + output_padding for n in x.shape[1:3]]
    return _adjoint(x, kernel, stride, padding, space)


def convolve_transpose_gradient(x, kernel, g, stride, padding, output_padding):
    """Gradients of x, a convolution, and of the kernel, where x and g change places."""
    return (
        convolve(g, kernel, stride, padding),
        _kernel_gradient(g, x, stride, padding, len(kernel), kernel.dtype),
    )


def _adjoint(g, kernel, stride, padding, space):
    """The adjoint of `convolve` in x: g [B, H', W', out] -> [B, H, W, in].

    A convolution of g, its cells spread `stride` apart, with the kernel turned by 180 degrees
    and its channel axes swapped; or each cell's k×k·in products, summed where they overlap.
    `space` is (H, W), which a stride leaves open.
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
    turned = jnp.flip(kernel, (0, 1)).swapaxes(-1, -2)
    return _lax_conv(g, turned, ends, spread=stride)


def _kernel_gradient(x, g, stride, padding, size, dtype):
    """The adjoint of `convolve` in its kernel: x [B, H, W, in], g [B, H', W', out] -> kernel.

    A convolution of x with g as its kernel, where the batch is the axis that is summed over:
    the input channels stand where a batch would, and g's cells are spread `stride` apart. Or, for
    each row of the kernel, one product of g with the patches that its taps see.
    """
    inputs, outputs = x.shape[-1], g.shape[-1]
    if _rows_are_faster(g):
        windows = _row_patches(x, size, stride, padding)
        rows = [_every(windows, i, g.shape[1], stride, axis=1) for i in range(size)]
        if g.size // outputs > size * inputs:  # many cells: then the wider factor is better second
            turned = jnp.stack([_product_of_columns(g, row, dtype) for row in rows])
            return turned.reshape(size, outputs, size, inputs).transpose(0, 2, 3, 1)
        straight = jnp.stack([_product_of_columns(row, g, dtype) for row in rows])
        return straight.reshape(size, size, inputs, outputs)
    ends = [
        (padding, size + (m - 1) * stride - n - padding)
        for n, m in zip(x.shape[1:3], g.shape[1:], strict=False)
    ]
    x, g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    return _lax_conv(x, g, ends, kernel_spread=stride, dtype=dtype).transpose(1, 2, 0, 3)


def _lax_conv(x, kernel, padding, stride=1, spread=1, kernel_spread=1, dtype=None):
    """The convolution in the layout that runs fast: channels last in x, kernel and result."""
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


def _patches_are_faster(batch, height, width, size, channels):
    """Whether a convolution onto this grid leaves the CPU idle where products over its patches do
    not: on grids of 4×4 and less (5×5, 256→512, onto 2×2 at batch 32: 287 ms against 2.5), of one
    channel (its adjoint, 32×32 cells, batch 32: 51 ms against 0.5), and wherever the patches fit
    into the cache."""
    patches = 4 * batch * height * width * size * size * channels  # bytes
    return min(height, width) <= 4 or channels == 1 or patches <= 4 << 20


def _rows_are_faster(g):
    """Whether a kernel's gradient is faster as products. Else g slides over x: 3×3, 32×32 cells,
    batch 4: with 32 channels (0.5 MB) at 93 GFLOP/s where products made 52, of a core's 143; with
    128 (2 MB) at 55 where products made 95. With 256 on any grid the two are within a fifth."""
    return g.shape[-1] > 128 or 4 * g.size > 1 << 20


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


# ---- Micro-batches ------------------------------------------------------------------------------


def mean_in_pieces(gradient, params, parts, most):
    """Means of a gradient and of its loss terms over the batch, and aux [B, …] of all its images.

    gradient: params, *part -> grads, (terms [3], aux [n, …]). The arrays of `parts`, [B, …], are
    cut into equal pieces of at most `most`, one after the other: the mean is the same, the memory a
    part of it. 4 images of 32×32×256 fill a cache of 4 MB. An accelerator takes one piece.
    """
    size = len(jax.tree.leaves(parts)[0])
    count = next(n for n in range(1, size + 1) if size % n == 0 and size // n <= max(most, 1))

    def add(total, part):
        grads, (terms, aux) = gradient(params, *part)
        return jax.tree.map(jnp.add, total, (grads, terms)), aux

    parts = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), parts)
    zero = jax.tree.map(jnp.zeros_like, params), jnp.zeros(3)
    total, aux = lax.scan(add, zero, parts)
    grads, terms = jax.tree.map(lambda a: a / count, total)
    return grads, terms, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux)
