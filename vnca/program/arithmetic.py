"""The arithmetic of a model and of a training update, counted by hand."""


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
    if model.name == "nondoubling":
        cells = 32 * 32 * (steps or model.steps)
        counts["decoder/perceive"] = cells * 9 * latent**2
        counts["decoder/update"] = cells * latent**2
        return counts
    if model.name == "healing":
        cells = 32 * 32 * (steps or model.steps)
        inherited = inherited_channels(model)
        counts["decoder/perceive"] = cells * 9 * model.channels * model.hidden
        counts["decoder/update"] = cells * model.hidden * (model.channels - inherited)
        counts["decoder/inherited"] = cells * 9 * (inherited + 1) ** 2
        return counts
    cells = model.steps_per_doubling * sum(4**k for k in range(1, model.doublings + 1))
    counts["decoder/perceive"] = cells * 9 * latent**2
    for i in range(4):
        for j in range(2):
            counts[f"decoder/blocks/{i}/linear{j}"] = cells * latent**2
    counts["decoder/update"] = cells * latent**2
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


def update_flops(config):
    """The FLOP of one training update, at the mean number of steps in training.

    A multiply-add is 2 FLOP. The gradient costs two forward passes, except that of inheritance,
    which has no gradient.
    """
    counts = operations(config.model, training_steps(config.model))
    inheritance = counts.pop("decoder/inherited", 0)
    return 2 * (3 * sum(counts.values()) + inheritance) * config.train.batch_size
