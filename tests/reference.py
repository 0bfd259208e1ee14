"""What the tests compare with: the same mathematics as plain NumPy loops, in float64.

Nothing here is imported from the code under test, or computes in the same way: convolutions go
over the cells one at a time, gradients are finite differences.
"""

import math

import numpy as np

sigmoid = np.vectorize(lambda x: 1 / (1 + math.exp(-x)))
elu = np.vectorize(lambda x: x if x > 0 else math.exp(x) - 1, otypes=[float])


def conv(x, kernel, bias, stride, padding):
    """x [B, H, W, in], kernel [k, k, in, out]: each output cell is a sum over its window."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    k = len(kernel)
    h, w = ((n - k) // stride + 1 for n in x.shape[1:3])
    y = np.empty((len(x), h, w, kernel.shape[3]))
    for i in range(h):
        for j in range(w):
            window = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
            y[:, i, j] = np.tensordot(window, kernel, 3) + bias
    return y


def conv_transpose(x, kernel, bias, stride, padding, output_padding):
    """x [B, H, W, in], kernel [k, k, out, in]: each input cell adds the kernel where it stands."""
    k = len(kernel)
    h, w = ((n - 1) * stride + k + output_padding for n in x.shape[1:3])
    y = np.zeros((len(x), h, w, kernel.shape[2]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            stamp = np.tensordot(x[:, i, j], kernel, (1, 3))
            y[:, i * stride : i * stride + k, j * stride : j * stride + k] += stamp
    return y[:, padding : h - padding, padding : w - padding] + bias


def linear(params, x):
    """x [..., in], kernel [in, out]."""
    return np.einsum("...i,io->...o", x, params["kernel"]) + params["bias"]


def doubling_step(params, s):
    """One step of the doubling model's cells."""
    h = conv(s, **params["perceive"], stride=1, padding=1)
    for block in params["blocks"]:
        h = h + linear(block["linear1"], elu(linear(block["linear0"], h)))
    return s + linear(params["residual"], h)


def nondoubling_change(params, s):
    """What a step of the non-doubling or of the healing model adds to the cells."""
    hidden = elu(conv(s, **params["perceive"], stride=1, padding=1))
    return linear(params["residual"], hidden)


def nondoubling_step(params, s):
    """One step of the non-doubling model's cells."""
    return s + nondoubling_change(params, s)


def healing_step(params, s, waves):
    """One step of the healing model's cells. The channels that a step does not change are the
    position, sines and cosines of so many waves, and z. A cell without a position takes both from
    its neighbours, whose positions are rotated as complex numbers: on n rows, the slowest wave by
    π/n from a cell to the next."""
    change = nondoubling_change(params, s)
    first = change.shape[-1]
    position = slice(first, first + 4 * waves)
    new = np.array(s, np.float64)
    new[..., :first] += change
    for b, i, j in np.ndindex(s.shape[:3]):
        if s[b, i, j, position].any():
            continue
        found = []
        for y, x in np.ndindex(s.shape[1:3]):
            if max(abs(y - i), abs(x - j)) == 1 and s[b, y, x, position].any():
                found.append(s[b, y, x].copy())
                for axis, cells in enumerate((i - y, j - x)):
                    for wave in range(waves):
                        sine = first + 2 * waves * axis + wave
                        angle = cells * np.pi / s.shape[1] * 2**wave
                        turned = np.exp(1j * angle) * (
                            s[b, y, x, sine + waves] + 1j * s[b, y, x, sine]
                        )
                        found[-1][sine + waves], found[-1][sine] = turned.real, turned.imag
        new[b, i, j] = np.mean(found, axis=0) if found else 0
        new[b, i, j, :first] = 0
    return new


def gradient(f, x, step=1e-4):
    """Central finite differences of the number f(x), in every entry of x."""
    slope = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        slope[index] = (f(up) - f(down)) / (2 * step)
    return slope


def numbers_like(shapes, seed, scale):
    """Normal numbers, float32, in the place of every array of nested dicts and lists."""
    random = np.random.RandomState(seed)

    def fill(node):
        if isinstance(node, dict):
            return {name: fill(node[name]) for name in sorted(node)}
        if isinstance(node, list):
            return [fill(part) for part in node]
        return (scale * random.randn(*node.shape)).astype(np.float32)

    return fill(shapes)


def equations(jaxpr):
    """Every equation of a jaxpr, and of the jaxprs inside it (loops, branches, calls)."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


def multiply_adds(jaxpr):
    """Of all products of matrices in a jaxpr: each of the result's numbers is a row by a column."""
    total = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name != "conv_general_dilated"
        if equation.primitive.name == "dot_general":
            total += equation.outvars[0].aval.size * equation.invars[0].aval.shape[-1]
        times = equation.params.get("length", 1)  # of a scan
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * multiply_adds(inner)
    return total
