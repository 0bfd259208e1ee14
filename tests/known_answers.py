"""Computes the known answers of the packaged models, in float64, by NumPy alone.

Run: python -m tests.known_answers

Nothing is imported from the package or from JAX: arrays and images are read from their files, and
the models are written again, from the paper, as sums over the taps of each kernel.
"""

import json
import math
from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).resolve().parents[1] / "vnca/program"
IMAGES, SAMPLES = 16, 4


def read(name):
    """The config of a packaged model (nested dict) and its parameters as nested dicts, float64."""
    params = {}
    with np.load(PROGRAM / f"packaged_{name}.npz", allow_pickle=False) as file:
        for array in file.files:
            if array.startswith("params/"):
                *path, last = array.split("/")[1:]
                place = params
                for key in path:
                    place = place.setdefault(key, {})
                place[last] = file[array].astype(np.float64)
        return json.loads(str(file["config"])), params


def faces(levels):
    """The first test faces, float64 [16, 16, 16, 3]: 0 … 255, rounded to 0 … levels."""
    with np.load(PROGRAM / "faces.npz", allow_pickle=False) as file:
        return np.rint(file["test"][:IMAGES] / 255 * levels)


def digits():
    """The first test digits with their border, float64 [16, 32, 32, 1] of 0 and 1."""
    with np.load(PROGRAM / "bundled.npz", allow_pickle=False) as file:
        pixels = np.unpackbits(file["test"][:IMAGES], axis=1).reshape(-1, 28, 28)
    return np.pad(pixels.astype(np.float64), ((0, 0), (2, 2), (2, 2)))[..., None]


# ---- Layers: one product of matrices for each tap of a kernel ------------------------------------


def taps(size):
    return np.ndindex(size, size)


def conv(layer, x, stride=1, padding=0):
    """x [B, H, W, in], kernel [k, k, in, out]."""
    kernel = layer["kernel"]
    rows, columns = ((n + 2 * padding - len(kernel)) // stride + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    y = 0
    for i, j in taps(len(kernel)):
        seen = x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        y = y + seen[:, :rows, :columns] @ kernel[i, j]
    return y + layer["bias"]


def conv_transpose(layer, x, stride, padding, output_padding=0):
    """x [B, H, W, in], kernel [k, k, out, in]: each cell adds the kernel to its neighbourhood."""
    kernel = layer["kernel"]
    batch, *space, _ = x.shape
    rows, columns = space
    high, wide = ((n - 1) * stride + len(kernel) + output_padding for n in space)
    y = np.zeros((batch, high, wide, kernel.shape[2]))
    for i, j in taps(len(kernel)):
        y[:, i : i + stride * rows : stride, j : j + stride * columns : stride] += (
            x @ kernel[i, j].T
        )
    return y[:, padding : high - padding, padding : wide - padding] + layer["bias"]


def linear(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def elu(x):
    return np.maximum(x, 0) + np.expm1(np.minimum(x, 0))


# ---- Models -------------------------------------------------------------------------------------


def encode(params, x):
    """Images [B, size, size, colours] in 0…1 -> the mean and log σ² of q(z|x), [B, latent] each."""
    h = x
    for i in range(5):
        h = elu(conv(params["encoder"][f"conv{i}"], h, 1 if i == 0 else 2, 2))
    moments = linear(params["encoder"]["linear"], h.reshape(len(x), -1))
    return np.split(moments, 2, axis=1)


def doubling(model, params, z):
    """z [B, latent] -> logits [B, size, size, colours]."""
    decoder, s = params["decoder"], z[:, None, None]
    for _ in range(model["doublings"]):
        s = np.repeat(np.repeat(s, 2, axis=1), 2, axis=2)
        for _ in range(model["steps_per_doubling"]):
            h = conv(decoder["perceive"], s, padding=1)
            for k in range(4):
                block = decoder["blocks"][str(k)]
                h = h + linear(block["linear1"], elu(linear(block["linear0"], h)))
            s = s + linear(decoder["residual"], h)
    return s[..., : model.get("colours", 1)]


def baseline(model, params, z):
    """z [B, latent] -> logits [B, 32, 32, 1]; those of the border make a 1 impossible."""
    del model
    decoder = params["decoder"]
    x = linear(decoder["linear"], z).reshape(len(z), 2, 2, -1)
    for i in range(4):
        x = elu(conv_transpose(decoder[f"conv_transpose{i}"], x, 2, 2, 1))
    x = conv_transpose(decoder["conv_transpose4"], x, 1, 4)
    return np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-np.inf)


def healing(model, params, z, lost=None):
    """z [B, latent] -> logits [B, size, size, colours], where the cells of `lost`, rows and
    columns, are set to zero after half of the steps.

    A position is kept as complex numbers exp(i·angle), one for each wave and each axis, so that a
    neighbour's is turned by a multiplication.
    """
    decoder, waves, size = params["decoder"], model["position_waves"], model.get("size", 32)
    first = decoder["residual"]["kernel"].shape[1]  # of the channels that a step changes
    turn = np.exp(1j * np.pi / size * 2.0 ** np.arange(waves))  # of one cell
    angles = (np.arange(size) + 0.5)[:, None] * np.angle(turn)
    row, column = np.exp(1j * angles)[:, None], np.exp(1j * angles)[None]
    grid = np.zeros((len(z), size, size, 1))
    places = np.broadcast_arrays(row + 0 * grid[..., :1], column + 0 * grid[..., :1])
    position = np.concatenate([part for p in places for part in (p.imag, p.real)], axis=-1)
    cells = np.concatenate([np.repeat(grid, first, -1), position, z[:, None, None] + grid], -1)
    for t in range(model["steps"]):
        if lost and t == model["steps"] // 2:
            cells[:, lost[0], lost[1]] = 0
        change = linear(decoder["residual"], elu(conv(decoder["perceive"], cells, padding=1)))
        kept = cells[..., first:].copy()
        is_lost = np.all(kept[..., : 4 * waves] == 0, axis=-1)
        cells[..., :first] += np.where(is_lost[..., None], 0, change)
        if is_lost.any():
            cells[is_lost, first:] = inherited(kept, ~is_lost, turn)[is_lost]
    return cells[..., : model.get("colours", 1)]


def inherited(kept, is_alive, turn):
    """The mean of what the living neighbours say of a cell's position and z."""
    waves, size = len(turn), kept.shape[1]
    padded = np.pad(kept, ((0, 0), (1, 1), (1, 1), (0, 0)))
    alive = np.pad(is_alive, ((0, 0), (1, 1), (1, 1)))[..., None]
    total, count = 0, 0
    for i, j in taps(3):  # the neighbour is i − 1 rows below and j − 1 columns to the right
        theirs = padded[:, i : i + size, j : j + size]
        parts = []
        for axis, cells in enumerate((1 - i, 1 - j)):
            sine, cosine = np.split(theirs[..., 2 * waves * axis : 2 * waves * (axis + 1)], 2, -1)
            turned = (cosine + 1j * sine) * turn**cells
            parts += [turned.imag, turned.real]
        living = alive[:, i : i + size, j : j + size]
        said = np.concatenate([*parts, theirs[..., 4 * waves :]], axis=-1)
        total, count = total + np.where(living, said, 0), count + living
    return total / np.maximum(count, 1)


# ---- Objectives, in nats an image ----------------------------------------------------------------


def log_likelihood(logits, heads, tosses):
    """log p(x|z): the log of the probability of each number of heads, summed."""
    tails = tosses - heads
    ways = [math.log(math.comb(tosses, k)) for k in range(tosses + 1)]
    # A border's logit is −∞: what no toss needs must not be multiplied by 0.
    costs = heads * np.logaddexp(0, np.where(heads > 0, -logits, 0))
    costs += tails * np.logaddexp(0, np.where(tails > 0, logits, 0))
    return (np.array(ways)[heads.astype(int)] - costs).sum(axis=(1, 2, 3))


def log_normal(z, mean, variance):
    """The log density of independent normal variables, summed."""
    return -0.5 * (np.log(2 * np.pi * variance) + (z - mean) ** 2 / variance).sum(axis=1)


def kl(mean, variance):
    """KL(N(mean, variance) ‖ N(0, I)), the closed form."""
    return 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(axis=1)


def excerpt(x):
    """Four numbers of each image, the mean of all, and the root of their mean square: [16, 6]."""
    x = x.reshape(len(x), -1)
    spread = [x[:, x.shape[1] * k // 8] for k in (1, 3, 5, 7)]
    return np.stack([*spread, x.mean(axis=1), np.sqrt((x**2).mean(axis=1))], axis=1)


DECODERS = {
    "doubling": doubling,
    "healing": healing,
    "baseline": baseline,
    "faces_doubling": doubling,
    "faces_healing": healing,
}


def answers(name):
    """{part: float64 array} of the packaged model of this name."""
    config, params = read(name)
    model, decode, tosses = config["model"], DECODERS[name], config["model"].get("levels", 1)
    heads = faces(tosses) if name.startswith("faces") else digits()
    x = heads / tosses
    mean, logvar = encode(params, x)
    shape = SAMPLES, IMAGES, model["latent_size"]
    noise = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    log_weights, log_likelihoods = [], []
    for eps in noise.astype(np.float64):
        z, variance = mean + np.exp(logvar / 2) * eps, np.exp(logvar)
        log_likelihoods.append(log_likelihood(decode(model, params, z), heads, tosses))
        log_weights.append(
            log_likelihoods[-1] + log_normal(z, 0.0, np.ones(1)) - log_normal(z, mean, variance)
        )
    bound = np.logaddexp.reduce(log_weights, axis=0) - np.log(SAMPLES)
    z = mean + np.exp(logvar / 2) * noise[0]
    drawn, grid = slice(2, -2), x.shape[1]
    found = {"mean": mean, "logvar": logvar, "logits": decode(model, params, z)[:, drawn, drawn]}
    if decode is healing:
        square = (slice(grid // 4, grid - grid // 4),) * 2
        found["healed"] = healing(model, params, z, lost=square)[:, drawn, drawn]
    nats = np.stack([log_likelihoods[0], kl(mean, np.exp(logvar)), bound], axis=1)
    return {part: excerpt(array) for part, array in found.items()} | {"nats": nats}


def write(path):
    """Writes the answers of all packaged models: arrays NAME/PART, float64."""
    arrays = {f"{name}/{part}": a for name in DECODERS for part, a in answers(name).items()}
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    write(PROGRAM / "known_answers.npz")
