"""The arithmetic of a model and of a training update, from the sizes of its kernels."""

import jax

from vnca.program.method import make_model, param_shapes
from vnca.program.metrics import name

CELLS = 1024  # 32×32


def operations(model, steps=None):
    """The multiply-adds of each operation in one image's forward pass: {name: count}. An operation
    costs the size of its kernel for each cell that it computes.

    model: config.model; steps: the NCA steps of nondoubling and healing, by default model.steps.
    Every kernel tap counts, on padding as well. Biases and ELUs do not.
    """
    steps = steps or model.get("steps")
    counts = {}
    for path, x in jax.tree.leaves_with_path(param_shapes(make_model(model))):
        if x.ndim > 1:  # a kernel; a bias has one dimension
            operation = name(path).removesuffix("/kernel")
            counts[operation] = x.size * _cells(operation, model, steps)
    if waves := model.get("position_waves"):
        # Each cell sums, over nine cells, what no step changes and how many are alive.
        channels = 4 * waves + model.latent_size + 1
        counts["decoder/inherited"] = CELLS * steps * 9 * channels**2
    return counts


def _cells(operation, model, steps):
    """How many cells an operation computes in one image's forward pass."""
    part, layer, *_ = operation.split("/")
    if layer == "linear":
        return 1
    if part == "encoder":  # conv0 … conv4: 32×32 … 2×2
        return 4 ** (5 - int(layer[-1]))
    if model.name == "baseline":  # conv_transpose0 … 4: the inputs' cells, 2×2 … 32×32
        return 4 ** (1 + int(layer[-1]))
    if model.name == "doubling":  # on grids of 2×2, 4×4, …
        return model.steps_per_doubling * sum(4**k for k in range(1, model.doublings + 1))
    return CELLS * steps


def training_steps(model):
    """The mean of `model.train_steps`, rounded up; 0 if the model has no such field."""
    return (sum(model.get("train_steps", ())) + 1) // 2


def most_steps(model):
    """The most steps of `model`, which has `model.train_steps`, in an evaluation or an update."""
    return max(model.steps, *model.train_steps)


def _gradient(model, steps):
    """The multiply-adds of one image's gradient: the backward pass costs as much as two forward
    passes. Inheritance has no backward pass."""
    counts = operations(model, steps)
    return 3 * sum(counts.values()) - 2 * counts.get("decoder/inherited", 0)


def update_flops(config):
    """The FLOP of one training update, at the mean number of steps in training. A multiply-add is
    2 FLOP."""
    return 2 * config.train.batch_size * _gradient(config.model, training_steps(config.model))


def update_multiply_adds(config):
    """The multiply-adds of an update as `update_flops` counts them, and how many more the plain
    program has: {reason: multiply-adds}, exact, and negative where it has fewer."""
    model, counts = config.model, operations(config.model)
    encoder, first = _encoder(counts), counts["encoder/conv0"]
    if config.train.get("encoder_from"):
        differences = {"the given encoder has no gradient": -2 * encoder}
    else:  # the stride is 2 along both axes, so that three of four cells are zeros
        strided = encoder - first - counts["encoder/linear"]
        differences = {
            "the first layer has no gradient of its input": -first,
            "zeros between spread cells, in gradients of inputs": 3 * strided,
        }
    if steps := training_steps(model):
        most = most_steps(model)
        more = _gradient(model, most) - _gradient(model, steps)
        differences[f"the loop has {most} steps, of which {steps} are counted"] = more
    for reason, n in _transposed_convolutions(model, counts).items():
        differences[f"{reason}, forward and in gradients of kernels"] = 2 * n
    differences = {reason: n * config.train.batch_size for reason, n in differences.items()}
    return update_flops(config) // 2, differences


def evaluation_flops(model, images, samples):
    """The FLOP of the IWELBO of so many images with so many samples each. An image is encoded once,
    and decoded for every sample. model: config.model."""
    counts = operations(model)
    encoder = _encoder(counts)
    return 2 * images * (encoder + samples * (sum(counts.values()) - encoder))


def evaluation_multiply_adds(config):
    """What `update_multiply_adds` returns, for the evaluation of one image with one sample."""
    counts = operations(config.model)
    return sum(counts.values()), _transposed_convolutions(config.model, counts)


def _encoder(counts):
    return sum(n for operation, n in counts.items() if operation.startswith("encoder"))


def _transposed_convolutions(model, counts):
    """The multiply-adds that the baseline's forward pass has beyond its count, for one image:
    {reason: multiply-adds}."""
    if model.name != "baseline":
        return {}
    *strided, last = (counts[f"decoder/conv_transpose{i}"] for i in range(5))
    return {
        "zeros between spread cells of transposed convolutions": 3 * sum(strided),
        "the last layer computes 28×28 cells alone": last // CELLS * (28**2 - CELLS),
    }
