"""The models of `vnca.models`, and the norm of the gradient, in the forms that a GPU runs fast.

Each function computes the same sum as the plain one, up to rounding. A GPU spends most of an update
on memory traffic, and on starting kernels, 2.5 µs each. The numbers are floors of one update on an
H100 (`--mode=compile --topology=h100`), in float32, of the doubling model unless another is named:

- All steps are unrolled. A scan copies what the backward pass needs into stacks and out of them:
  32.2 ms and 66.5 GB with scans, 22.1 ms and 45.9 GB without.
- A linear map of every cell is a 1×1 convolution. cuDNN adds its bias, and the array that the map
  is added to, in the same kernel. After a product of matrices XLA adds that array in a kernel of
  its own, and it computes the gradients of weights in 32 parts: 18.5 ms instead of 17.7.
- The gradient of ELU needs only its result, which the next layer keeps anyway.
- The gradient of a bias is a sum over all cells. Only five of the ten biases of a step are summed.
  The others follow from these by products with the weights, once an update (`doubling_gradient`).
- On the smallest grids (`SMALL`: 2×2 and 4×4 cells), the gradients of biases and of 1×1 kernels
  are computed for all steps at once. The 24 steps on grids of 2×2 to 8×8 had 700 kernels, whose
  start alone took 1.75 ms.
- At 32×32, the 3×3 convolution and its two gradients take 0.39 of the 1.38 ms of a step. The rest
  is memory. cuDNN fuses no ELU in float32, so each of the four ELUs costs one more read and write,
  and again in the backward pass.
- Kernels keep their layout in memory. Otherwise XLA transposes them and both moments of Adam at
  both ends of a call, in 90 kernels of the baseline's 266.

Trials that were not adopted: with steps that are recomputed in the backward pass, or with a scan
that stacks its states, an update takes 31 to 32 ms. Triton products fuse a bias, but never ELU;
`--xla_gpu_experimental_gemm_fusion_v2` would, but is experimental.
"""

from functools import lru_cache, partial
from math import prod

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from vnca import layers
from vnca.layers import LAYOUT
from vnca.models.doubling import crop, double

MOST_STEPS = 127  # unrolled: the time to compile grows with them
SMALL = 1 << 20  # bytes: a kernel that reads less takes no longer than its start, 2.5 µs


def fast_model(model, settings):
    """The Model of a config's `model` section, `settings`, whose layers are those of this file, in
    the form that a GPU runs fast. Models of more steps than MOST_STEPS stay as they are."""
    if settings.name == "doubling":
        doublings, steps = settings.doublings, settings.steps_per_doubling
        if doublings * steps <= MOST_STEPS:
            size, outputs = model.likelihood.size, model.likelihood.outputs
            return model._replace(decode=decode_doubling(doublings, steps, size, outputs))
    if settings.name == "nondoubling" and model.max_steps <= MOST_STEPS:
        return model._replace(develop=develop_at_most(model.max_steps))
    return model


# ---- Layers: an argument `nn` of a model's `make` ------------------------------------------------


def conv(params, x, stride=1, padding=0):
    """As `vnca.layers.conv`."""
    return layers.conv(in_place(params), x, stride, padding)


def conv_transpose(params, x, stride, padding, output_padding=0):
    """As `vnca.layers.conv_transpose`."""
    return layers.conv_transpose(in_place(params), x, stride, padding, output_padding)


def linear(params, x):
    """As `vnca.layers.linear`."""
    return layers.linear(params, x)


def in_place(params):
    """The parameters, or their gradient, in the layout in which they are stored. NumPy arrays, such
    as those of a packaged model, become JAX's, which alone may have a layout outside of jit."""

    def constrained(x):
        return with_layout_constraint(jnp.asarray(x), Layout(major_to_minor=tuple(range(x.ndim))))

    return jax.tree.map(constrained, params)


@jax.custom_vjp
def elu(x):
    """As `vnca.layers.elu`."""
    return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))


def _elu_forward(x):
    y = elu(x)
    return y, y


def _elu_backward(y, g):
    return (g * slope(y),)


elu.defvjp(_elu_forward, _elu_backward)


def slope(y):
    """The derivative of ELU where its result is y: 1, or exp(x) = y + 1 where x is negative."""
    return jnp.minimum(y, 0) + 1


# ---- The gradient's norm -------------------------------------------------------------------------


def global_norm(tree):
    """As `vnca.optimizer.global_norm`, with one last sum for all arrays instead of one for each.

    The barrier keeps XLA from making the one sum many again.
    """
    rows = [
        x**2 if x.ndim == 1 else jnp.sum(x.reshape(-1, x.shape[-1]) ** 2, axis=-1)
        for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(jnp.sum(lax.optimization_barrier(jnp.concatenate(rows))))


# ---- Linear maps of cells [B, H, W, C], and their gradients --------------------------------------


@jax.named_scope("cellwise")  # a name in what the compiler writes
def cellwise(kernel, x):
    """x [B, H, W, in] times kernel [in, out], as a 1×1 convolution."""
    kernel = kernel.astype(x.dtype)[None, None]
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)


@jax.named_scope("neighbourhood")
def neighbourhood(kernel, x):
    """x [B, H, W, in] convolved with kernel [3, 3, in, out], zero-padded by 1."""
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), [(1, 1)] * 2, dimension_numbers=LAYOUT
    )


@jax.named_scope("kernel_gradient")
def kernel_gradient(convolve, shape, x, g):
    """The gradient of a kernel of this shape, float32, where convolve(kernel, x) has gradient g."""
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    [gradient] = jax.linear_transpose(lambda kernel: convolve(kernel, x), kernel)(g)
    return gradient.astype(jnp.float32)


def adjoint_kernel(kernel):
    """The kernel [3, 3, out, in] with which `neighbourhood` gives the gradient of its input.

    The barrier hides the rotation. If XLA sees it, it takes cuDNN's own function for this gradient,
    which cannot add to its result.
    """
    return lax.optimization_barrier(lax.rev(kernel, (0, 1)).swapaxes(2, 3))


def add_bias(y, bias):
    """y + bias in y's dtype, as cuDNN adds it. The gradient of the bias is float32 (`cell_sum`)."""
    return y + bias.astype(y.dtype)


@jax.named_scope("cell_sum")
def cell_sum(g):
    """Partial sums of g [B, H, W, C], float32 [n, C], each over 512 cells (over all cells if 512
    does not divide their number). The sum of these rows is the sum over all cells. Steps add the
    rows, and the last sum is done once an update."""
    cells = g.reshape(-1, g.shape[-1])
    parts = len(cells) // 512 if len(cells) % 512 == 0 else 1
    return jnp.sum(cells.reshape(parts, -1, g.shape[-1]), axis=1, dtype=jnp.float32)


# Sums over the steps of an update. A term is a step's gradient or, where starting a kernel takes
# longer than the gradient itself, the arrays that it is made from, to be put together with others.


def is_small(g, taps=1):
    return taps * g.nbytes <= SMALL


def kernel_term(convolve, shape, x, g):
    """A term for `kernel_sum`: see `kernel_gradient`."""
    return (x, g) if is_small(g, prod(shape[:-2])) else kernel_gradient(convolve, shape, x, g)


def kernel_sum(convolve, shape, terms):
    """The gradient of a kernel, summed over steps."""
    pairs = [term for term in terms if isinstance(term, tuple)]
    done = [term for term in terms if not isinstance(term, tuple)]
    for grid in sorted({x.shape[1:3] for x, _ in pairs}):
        arrays = zip(*(pair for pair in pairs if pair[0].shape[1:3] == grid), strict=True)
        done.append(kernel_gradient(convolve, shape, *map(jnp.concatenate, arrays)))
    return sum(done)


def bias_term(g):
    """A term for `bias_sum`: see `cell_sum`."""
    return g if is_small(g) else cell_sum(g)


def bias_sum(terms):
    """The gradient of a bias [C], summed over all cells of all steps."""
    total = 0
    for shape in sorted({term.shape for term in terms}, key=str):
        alike = [term for term in terms if term.shape == shape]
        if len(shape) == 4:  # the barrier keeps XLA from making the one sum many again
            rows = cell_sum(lax.optimization_barrier(jnp.concatenate(alike)))
        else:
            rows = sum(alike)
        total = total + jnp.sum(rows, axis=0)
    return total


# ---- DoublingVNCA --------------------------------------------------------------------------------


@lru_cache  # so that equal models have equal functions, and their programs are compiled once
def decode_doubling(doublings, steps, size, outputs):
    """Makes `decode` of the doubling model, for images and logits of these sizes."""

    @jax.custom_vjp
    def grow(params, z):
        return forward(params, z)[0]

    def forward(params, z):
        params = in_place(params)
        s, kept = z[:, None, None], []
        for k in range(1, doublings + 1):
            s = double(s)
            chex.assert_shape(s, (len(z), 2**k, 2**k, z.shape[1]))
            for _ in range(steps):
                s, arrays = doubling_step(params, s)
                kept.append(arrays)
        return s[..., :outputs], (params, kept)

    def backward(saved, g):
        params, kept = saved
        terms = []
        g = jnp.pad(g, ((0, 0), (0, 0), (0, 0), (0, len(params["residual"]["bias"]) - outputs)))
        for i in reversed(range(doublings * steps)):
            g, of_step = doubling_step_backward(params, kept[i], g)
            terms.append(of_step)
            if i % steps == 0:
                g = halve(g)
        return in_place(doubling_gradient(params, terms)), g[:, 0, 0]

    grow.defvjp(forward, backward)

    def decode(params, z):
        chex.assert_shape(z, (None, len(params["decoder"]["residual"]["kernel"])))
        layers.check_floats(z)
        return crop(grow(params["decoder"], z), size)

    return decode


def doubling_step(params, s):
    """`vnca.models.doubling.nca_step`, s [B, H, W, C], and the arrays that its gradient needs."""
    h = add_bias(neighbourhood(params["perceive"]["kernel"], s), params["perceive"]["bias"])
    inputs, activations = [h], []
    for block in params["blocks"]:
        y = cellwise(block["linear0"]["kernel"], h)
        activations.append(elu(add_bias(y, block["linear0"]["bias"])))
        y = cellwise(block["linear1"]["kernel"], activations[-1])
        h = h + add_bias(y, block["linear1"]["bias"])
        inputs.append(h)
    y = cellwise(params["residual"]["kernel"], h)
    return s + add_bias(y, params["residual"]["bias"]), (s, inputs, activations)


def doubling_step_backward(params, kept, g):
    """The gradient of s, from g, that of the cells after the step; and the step's terms for
    `doubling_gradient`, {name: term}."""
    s, inputs, activations = kept
    kernel = params["residual"]["kernel"]
    term = partial(kernel_term, cellwise, kernel.shape)
    terms = {"residual": term(inputs[-1], g), "residual bias": bias_term(g)}
    into_h = cellwise(kernel.T, g)
    for k in reversed(range(len(params["blocks"]))):
        block, x, y = params["blocks"][k], inputs[k], activations[k]
        terms["linear1", k] = term(y, into_h)
        into_linear0 = cellwise(block["linear1"]["kernel"].T, into_h) * slope(y)
        terms["linear0", k], terms["bias", k] = term(x, into_linear0), bias_term(into_linear0)
        into_h = into_h + cellwise(block["linear0"]["kernel"].T, into_linear0)
    kernel = params["perceive"]["kernel"]
    terms["perceive"] = kernel_term(neighbourhood, kernel.shape, s, into_h)
    return g + neighbourhood(adjoint_kernel(kernel), into_h), terms


def halve(g):
    """The gradient before `double`: g [B, 2H, 2W, C] -> [B, H, W, C]."""
    batch, height, width, channels = g.shape
    return g.reshape(batch, height // 2, 2, width // 2, 2, channels).sum(axis=(2, 4))


def doubling_gradient(params, terms):
    """The gradient of the decoder's parameters, from the terms of all steps."""
    kernel = params["residual"]["kernel"]

    def weights(name, convolve=cellwise, shape=kernel.shape):
        return kernel_sum(convolve, shape, [of_step[name] for of_step in terms])

    def bias(name):
        return bias_sum([of_step[name] for of_step in terms])

    # `through` is the gradient of h, summed over all cells. Where h passes a linear map, so does
    # that sum, and the gradient of a bias is that sum where the bias is added.
    residual = {"kernel": weights("residual"), "bias": bias("residual bias")}
    through = passed(residual["bias"], kernel)
    blocks = []
    for k in reversed(range(len(params["blocks"]))):
        linear0 = {"kernel": weights(("linear0", k)), "bias": bias(("bias", k))}
        linear1 = {"kernel": weights(("linear1", k)), "bias": through}
        blocks.insert(0, {"linear0": linear0, "linear1": linear1})
        through = through + passed(linear0["bias"], params["blocks"][k]["linear0"]["kernel"])
    shape = params["perceive"]["kernel"].shape
    perceive = {"kernel": weights("perceive", neighbourhood, shape), "bias": through}
    return {"perceive": perceive, "blocks": blocks, "residual": residual}


def passed(total, kernel):
    """The gradient of the input of `cellwise`, from that of its output, of their sums: [C]."""
    return jnp.matmul(total, kernel.T, precision="highest")


# ---- NonDoublingVNCA -----------------------------------------------------------------------------


@lru_cache
def develop_at_most(most):
    """Makes `develop` of the non-doubling model, for at most `most` steps.

    T steps are runs of 1, 2, 4, … steps, one for each binary digit of T, each taken or left out. So
    the host is asked six times, not 63 times, which branch to take, no step is computed in vain,
    and inside of a run nothing is copied.
    """
    runs = [1 << i for i in reversed(range(most.bit_length()))]

    @jax.custom_vjp
    def take_steps(params, s, steps):
        return forward(params, s, steps)[0]

    def forward(params, s, steps):
        params, kept = in_place(params), []
        for run in runs:
            after = lax.cond(steps & run > 0, partial(run_forward, run), partial(left_out, run),
                             params, s)  # fmt: skip
            kept.append((s, after))
            s = after[-1][1]
        return s, (params, kept, steps)

    def backward(saved, g):
        params, kept, steps = saved
        sums = zero_sums(params, g)
        for run, (s, after) in zip(reversed(runs), reversed(kept), strict=True):
            g, sums = lax.cond(
                steps & run > 0, run_backward, lambda params, s, after, g, sums: (g, sums),
                params, s, after, g, sums,
            )  # fmt: skip
        return in_place(nondoubling_gradient(sums)), g, None

    take_steps.defvjp(forward, backward)

    def develop(params, s, steps):
        if not isinstance(steps, jax.core.Tracer) and steps > most:
            raise ValueError(f"{steps} steps: this model develops for {most} at most")
        chex.assert_shape(s, (None, None, None, len(params["decoder"]["residual"]["bias"])))
        return take_steps(params["decoder"], s, steps)

    return develop


def nondoubling_step(params, s):
    """A step of NonDoublingVNCA, s [B, H, W, C]: the hidden layer, and the cells."""
    y = add_bias(neighbourhood(params["perceive"]["kernel"], s), params["perceive"]["bias"])
    y = elu(y)
    return y, s + add_bias(cellwise(params["residual"]["kernel"], y), params["residual"]["bias"])


def run_forward(run, params, s):
    """So many steps: the hidden layer and the cells after each."""
    after = []
    for _ in range(run):
        y, s = nondoubling_step(params, s)
        after.append((y, s))
    return after


def left_out(run, params, s):
    """As `run_forward` where the run is not taken: arrays without content, and the cells s."""
    empty = lax.empty(s.shape, s.dtype)
    hidden = lax.empty((*s.shape[:3], len(params["perceive"]["bias"])), s.dtype)
    return [(hidden, empty)] * (run - 1) + [(hidden, s)]


def run_backward(params, s, after, g, sums):
    """The gradient of a run's s, from g, that of its result, and the sums after it."""
    into_s = adjoint_kernel(params["perceive"]["kernel"])
    before = [s, *(cells for _, cells in after[:-1])]
    for s, (y, _) in zip(reversed(before), reversed(after), strict=True):
        kernel = params["residual"]["kernel"]
        into_perceive = cellwise(kernel.T, g) * slope(y)
        of_step = {
            "residual": kernel_gradient(cellwise, kernel.shape, y, g),
            "residual bias": cell_sum(g),
            "perceive": kernel_gradient(
                neighbourhood, params["perceive"]["kernel"].shape, s, into_perceive
            ),
            "perceive bias": cell_sum(into_perceive),
        }
        sums = jax.tree.map(jnp.add, sums, of_step)
        g = g + neighbourhood(into_s, into_perceive)
    return g, sums


def zero_sums(params, g):
    """The zeros, float32, that `run_backward` adds to; for biases with the rows of `cell_sum`."""
    cells = jax.eval_shape(cell_sum, g)
    hidden = (cells.shape[0], len(params["perceive"]["bias"]))
    return {
        "residual": jnp.zeros_like(params["residual"]["kernel"]),
        "residual bias": jnp.zeros(cells.shape),
        "perceive": jnp.zeros_like(params["perceive"]["kernel"]),
        "perceive bias": jnp.zeros(hidden),
    }


def nondoubling_gradient(sums):
    """The gradient of the decoder's parameters, from the sums over all steps."""
    return {
        name: {"kernel": sums[name], "bias": jnp.sum(sums[f"{name} bias"], axis=0)}
        for name in ("perceive", "residual")
    }
