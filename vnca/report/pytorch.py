"""Conversion of parameters to the names and array layouts of PyTorch, and back.

PyTorch's arrays have channels and outputs first, ours have them last. A name is the path in the
parameters, joined by dots, with `weight` instead of `kernel`, as in the state_dict of modules with
these names. The table shows the published shapes. A linear layer next to a 2×2 grid of 512 channels
(in the encoder and in the baseline) also has its grid reordered: PyTorch flattens the grid as
(512, 2, 2), we flatten it as (2, 2, 512).

    name                                  here                 PyTorch
    encoder.conv{0…4}.weight              [5, 5, in, out]      [out, in, 5, 5]      Conv2d
    encoder.linear.weight                 [2048, 512]          [512, 2048]          Linear
    decoder.perceive.weight               [3, 3, 256, 256]     [256, 256, 3, 3]     Conv2d
    decoder.blocks.{0…3}.linear{0,1}.weight, decoder.residual.weight
                                          [256, 256]           [256, 256, 1, 1]     Conv2d
    decoder.linear.weight                 [256, 2048]          [2048, 256]          Linear
    decoder.conv_transpose{0…4}.weight    [5, 5, out, in]      [in, out, 5, 5]      ConvTranspose2d
    each with its .bias                   [out]                [out]

Equinox uses the same arrays as PyTorch with two exceptions: the bias of a convolution is
[out, 1, 1], and the weight of a transposed convolution is [out, in, 5, 5], rotated by 180 degrees.
"""

import jax
import numpy as np


def to_torch(params):
    """Converts the parameters of any of the models to {name: array in PyTorch's layout}."""
    leaves = jax.tree.leaves_with_path(params)
    return {_name(path): np.array(_transpose(path, np.asarray(x)), order="C") for path, x in leaves}


def from_torch(arrays, like):
    """The inverse of `to_torch`: converts {name: array} to float32 parameters, nested as `like`.

    like: parameters, or their shapes as returned by `jax.eval_shape(model.init,
    jax.random.key(0))`. Raises ValueError if an array is missing, has another shape, or does not
    belong to this model.
    """
    names = {_name(path) for path, _ in jax.tree.leaves_with_path(like)}
    if wrong := sorted(names ^ arrays.keys()):
        reason = "is missing" if wrong[0] in names else "does not belong to this model"
        raise ValueError(f"{wrong[0]} {reason}")

    def restore(path, leaf):
        # Transposing our flat indices shows where each entry of PyTorch's array belongs in ours.
        indices = _transpose(path, np.arange(leaf.size).reshape(leaf.shape))
        array = np.asarray(arrays[_name(path)])
        if array.shape != indices.shape:
            found, expected = list(array.shape), list(indices.shape)
            raise ValueError(f"{_name(path)} has shape {found}, not {expected}")
        restored = np.empty(leaf.size, np.float32)
        restored[indices] = array
        return restored.reshape(leaf.shape)

    return jax.tree.map_with_path(restore, like)


def _keys(path):
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _name(path):
    *layer, array = _keys(path)
    return ".".join([*layer, {"kernel": "weight"}.get(array, array)])


def _transpose(path, x):
    """Transposes one of our arrays to PyTorch's layout."""
    part, *_, layer, array = _keys(path)
    if (part, layer) == ("decoder", "linear"):  # its outputs become a 2×2 grid
        return x.reshape(-1, 4, x.shape[-1] // 4).T.reshape(x.shape[::-1])
    if array == "bias":
        return x
    if (part, layer) == ("encoder", "linear"):  # its inputs come from a 2×2 grid
        return x.reshape(4, -1, x.shape[-1]).T.reshape(x.shape[::-1])
    if x.ndim == 2:  # a linear map applied to every cell is a 1×1 convolution
        return x.T[:, :, None, None]
    return x.transpose(3, 2, 0, 1)
