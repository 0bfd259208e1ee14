"""The parameters under names and in the layout of PyTorch, and back.

Arrays are channels-first and outputs-first there, channels-last here. A name is the path in the
parameters, joined by dots, with `weight` for `kernel`, as in a state_dict of modules so called.
Shapes as published; a linear layer of the encoder or the baseline stands beside a 2×2 grid of 512
channels, which PyTorch flattens as (512, 2, 2) and we as (2, 2, 512):

    name                                  here                 there
    encoder.conv{0…4}.weight              [5, 5, in, out]      [out, in, 5, 5]      Conv2d
    encoder.linear.weight                 [2048, 512]          [512, 2048]          Linear
    decoder.perceive.weight               [3, 3, 256, 256]     [256, 256, 3, 3]     Conv2d
    decoder.blocks.{0…3}.linear{0,1}.weight, decoder.update.weight
                                          [256, 256]           [256, 256, 1, 1]     Conv2d
    decoder.linear.weight                 [256, 2048]          [2048, 256]          Linear
    decoder.conv_transpose{0…4}.weight    [5, 5, out, in]      [in, out, 5, 5]      ConvTranspose2d
    each with its .bias                   [out]                [out]

Equinox's arrays are PyTorch's, but for two: the bias of a convolution is [out, 1, 1], and the
weight of a transposed one is [out, in, 5, 5], turned by 180 degrees.
"""

import jax
import numpy as np


def to_torch(params):
    """Parameters of any of the models -> {name: array in PyTorch's layout}."""
    leaves = jax.tree.leaves_with_path(params)
    return {_name(path): np.array(_there(path, np.asarray(x)), order="C") for path, x in leaves}


def from_torch(arrays, like):
    """The inverse of `to_torch`: {name: array} -> parameters, float32, nested as `like`.

    like: parameters, or their shapes as `jax.eval_shape(model.init, jax.random.key(0))` has them.
    Raises ValueError where an array is missing, not of this model, or of another shape.
    """
    names = {_name(path) for path, _ in jax.tree.leaves_with_path(like)}
    if wrong := sorted(names ^ arrays.keys()):
        reason = "is missing" if wrong[0] in names else "is no array of this model"
        raise ValueError(f"{wrong[0]} {reason}")

    def restore(path, leaf):
        # Our numbering of the entries, laid out as theirs, says where each of theirs belongs.
        numbers = _there(path, np.arange(leaf.size).reshape(leaf.shape))
        array = np.asarray(arrays[_name(path)])
        if array.shape != numbers.shape:
            raise ValueError(f"{_name(path)} is {list(array.shape)}, not {list(numbers.shape)}")
        here = np.empty(leaf.size, np.float32)
        here[numbers] = array
        return here.reshape(leaf.shape)

    return jax.tree.map_with_path(restore, like)


def _keys(path):
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _name(path):
    *layer, array = _keys(path)
    return ".".join([*layer, {"kernel": "weight"}.get(array, array)])


def _there(path, x):
    """An array of ours in PyTorch's layout."""
    part, *_, layer, array = _keys(path)
    if (part, layer) == ("decoder", "linear"):  # its outputs become 2×2 cells
        return x.reshape(-1, 4, x.shape[-1] // 4).T.reshape(x.shape[::-1])
    if array == "bias":
        return x
    if (part, layer) == ("encoder", "linear"):  # its inputs were 2×2 cells
        return x.reshape(4, -1, x.shape[-1]).T.reshape(x.shape[::-1])
    if x.ndim == 2:  # a linear map of every cell: a 1×1 convolution
        return x.T[:, :, None, None]
    return x.transpose(3, 2, 0, 1)
