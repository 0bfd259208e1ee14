"""The arithmetic of a model and of a training update, counted by hand."""

STRIDED = "zeros between spread cells"


def operations(model, steps=None):
    """The multiply-adds of each operation in one image's forward pass: {name: count}.

    model: config.model; steps: the NCA steps of nondoubling and healing, by default model.steps.
    Every kernel tap counts, on padding as well. Biases and ELUs do not.
    """
    width, latent = model.encoder_width, model.latent_size
    counts = {"encoder/conv0": 32 * 32 * 25 * width}
    for i in range(1, 5):
        counts[f"encoder/conv{i}"] = (32 >> i) ** 2 * 25 * (width << i - 1) * (width << i)
    counts["encoder/linear"] = 2 * 2 * (width << 4) * 2 * latent
    if model.name == "baseline":
        counts["decoder/linear"] = latent * 4 * (width << 4)
        for i in range(4):  # a transposed convolution: 25 taps for each input cell
            counts[f"decoder/conv_transpose{i}"] = (
                4 ** (i + 1) * 25 * (width << 4 - i) * (width << 3 - i)
            )
        counts["decoder/conv_transpose4"] = 32 * 32 * 25 * width
        return counts
    if model.name in ("nondoubling", "healing"):
        cells = 32 * 32 * (steps or model.steps)
        channels, hidden = cell_channels(model), hidden_channels(model)
        inherited = inherited_channels(model)
        counts["decoder/perceive"] = cells * 9 * channels * hidden
        counts["decoder/residual"] = cells * hidden * (channels - inherited)
        if inherited:
            counts["decoder/inherited"] = cells * 9 * (inherited + 1) ** 2
        return counts
    cells = model.steps_per_doubling * sum(4**k for k in range(1, model.doublings + 1))
    counts["decoder/perceive"] = cells * 9 * latent**2
    for i in range(4):
        for j in range(2):
            counts[f"decoder/blocks/{i}/linear{j}"] = cells * latent**2
    counts["decoder/residual"] = cells * latent**2
    return counts


def cell_channels(model):
    """The channels of a cell of an automaton. model: config.model."""
    return model.get("channels") or model.latent_size


def inherited_channels(model):
    """The channels of a cell that hold its position and z: no step changes them. Healing only."""
    waves = model.get("position_waves", 0)
    return model.latent_size + 4 * waves if waves else 0


def hidden_channels(model):
    """The channels of the hidden layers in an automaton's step. model: config.model."""
    return model.get("hidden") or cell_channels(model)


def training_steps(model):
    """The mean of `model.train_steps`, rounded up; 0 if the model has no such field."""
    return -(-sum(model.get("train_steps", (0,))) // 2)


def most_steps(model):
    """The most steps of `model`, which has `model.train_steps`, in an evaluation or an update."""
    return max(model.steps, *model.train_steps)


def update_flops(config):
    """The FLOP of one training update, at the mean number of steps in training.

    A multiply-add is 2 FLOP. The backward pass costs as much as two forward passes. Inheritance has
    no backward pass.
    """
    counts = operations(config.model, training_steps(config.model))
    inheritance = counts.pop("decoder/inherited", 0)
    return 2 * (3 * sum(counts.values()) + inheritance) * config.train.batch_size


def update_multiply_adds(config):
    """The multiply-adds of an update as `update_flops` counts them, and the plain program's exact
    excess over them: {reason: multiply-adds}, negative where it has fewer."""
    model, images = config.model, config.train.batch_size
    counts = operations(model)
    encoder = {name: n * images for name, n in counts.items() if name.startswith("encoder")}
    differences = {}
    if config.train.get("encoder_from"):
        differences["the given encoder has no gradient"] = -2 * sum(encoder.values())
    else:
        strided = sum(n for name, n in encoder.items() if "conv" in name) - encoder["encoder/conv0"]
        differences["the first layer has no gradient of its input"] = -encoder["encoder/conv0"]
        # The stride is 2 along both axes, so that three of four cells are zeros.
        differences[f"{STRIDED}, in gradients of inputs"] = 3 * strided
    if "train_steps" in model:
        most, counted = most_steps(model), training_steps(model)
        step = {name: n for name, n in operations(model, 1).items() if name.startswith("decoder")}
        inheritance = step.pop("decoder/inherited", 0)
        differences[f"the loop has {most} steps, of which {counted} are counted"] = (
            (most - counted) * (3 * sum(step.values()) + inheritance) * images
        )
    for reason, n in _transposed_convolutions(model, counts).items():
        differences[f"{reason}, forward and in gradients of kernels"] = 2 * n * images
    return update_flops(config) // 2, differences


def evaluation_flops(model, images, samples):
    """The FLOP of the IWELBO of so many images with so many samples each. An image is encoded once,
    and decoded for every sample. model: config.model."""
    counts = operations(model)
    decoder = sum(n for name, n in counts.items() if name.startswith("decoder"))
    return 2 * images * (sum(counts.values()) + (samples - 1) * decoder)


def evaluation_multiply_adds(config):
    """As `update_multiply_adds`, for one image and one sample in evaluation."""
    counts = operations(config.model)
    return sum(counts.values()), _transposed_convolutions(config.model, counts)


def _transposed_convolutions(model, counts):
    """The multiply-adds that the baseline's forward pass has beyond its count, for one image:
    {reason: multiply-adds}."""
    if model.name != "baseline":
        return {}
    strided = sum(counts[f"decoder/conv_transpose{i}"] for i in range(4))
    cropped = counts["decoder/conv_transpose4"] * (28**2 - 32**2) // 32**2
    return {
        f"{STRIDED} of transposed convolutions": 3 * strided,
        "the last layer computes 28×28 cells alone": cropped,
    }
