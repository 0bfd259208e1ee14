"""The arithmetic of a model and of a training update, counted by hand."""


def operations(model, steps=None):
    """Multiply-adds of every operation for one image, forward: {name: count}.

    model: config.model; steps: of the non-doubling model, unless as in evaluation. Every kernel
    tap counts, also on padding; biases and ELUs do not.
    """
    width, latent = model.encoder_width, model.latent_size
    counts = {"encoder/conv0": 32 * 32 * 25 * width}
    for i in range(1, 5):
        counts[f"encoder/conv{i}"] = (32 >> i) ** 2 * 25 * (width << i - 1) * (width << i)
    counts["encoder/linear"] = 2 * 2 * (width << 4) * 2 * latent
    if model.name == "baseline":
        counts["decoder/linear"] = latent * 4 * (width << 4)
        for i in range(4):  # a transposed convolution: 25 taps for each cell of its input
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
    """The channels of a cell of an automaton; model: config.model."""
    return model.get("channels") or model.latent_size


def inherited_channels(model):
    """The channels of a cell that no step changes, its position and z; 0 as published."""
    waves = model.get("position_waves", 0)
    return model.latent_size + 4 * waves if waves else 0


def hidden_channels(model):
    """The channels of the hidden layers of an automaton's step; model: config.model."""
    return model.get("hidden") or cell_channels(model)


def training_steps(model):
    """The mean of the non-doubling model's steps in training, rounded up; 0 of the others."""
    return -(-sum(model.get("train_steps", (0,))) // 2)


def update_flops(config):
    """FLOP of one training update: 2 a multiply-add, and the gradient costs two forward passes, but
    for what is inherited, which has none.

    The non-doubling model is counted at the mean of its steps in training, rounded up (48).
    """
    counts = operations(config.model, training_steps(config.model))
    once = counts.pop("decoder/inherited", 0)
    return 2 * (3 * sum(counts.values()) + once) * config.train.batch_size
