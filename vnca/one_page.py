"""The Variational Neural Cellular Automaton (Palm et al. 2022) on one page: python -m vnca.one_page

An encoder shrinks an image to one cell. A neural cellular automaton grows the cell to an image.
Arrays are [B, H, W, channels]. Training takes five minutes on two cores."""

import zlib
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

SEED = 0  # of the weights, the data order and all noise
CHANNELS = 32  # of a cell, and so the size of z
ENCODER = [(5, 5, 1, 8), *[(5, 5, n, 2 * n) for n in (8, 16, 32, 64)], (1, 1, 512, 2 * CHANNELS)]
AUTOMATON = [(3, 3, CHANNELS, CHANNELS)] + 8 * [(1, 1, CHANNELS, CHANNELS)]  # [k, k, in, out]
STEPS = 2  # of the automaton after each doubling
UPDATES = 2_500  # of the weights
BATCH = 8  # images in an update
RATE = 2e-3  # the peak of the learning rate, which rises for 100 updates and then falls to 0


def init_layer(key, shape):
    """A layer: a kernel [k, k, in, out] and a bias [out], both uniform in ±1/√(k·k·in)."""
    fan_in = np.prod(shape[:-1])
    numbers = jax.random.uniform(key, (fan_in + 1, shape[-1]), minval=-1) / np.sqrt(fan_in)
    return numbers[:-1].reshape(shape), numbers[-1]


def init(encoder_key, automaton_key):
    """The layers of both. The automaton has one more, of zeros, so that at first no cell changes."""
    encoder = list(map(init_layer, jax.random.split(encoder_key, 6), ENCODER))
    automaton = list(map(init_layer, jax.random.split(automaton_key, 9), AUTOMATON))
    return encoder, [*automaton, jax.tree.map(jnp.zeros_like, automaton[-1])]


def conv(layer, x, stride=1):
    """Zero-padded convolution: x [B, H, W, in] -> [B, H/stride, W/stride, out]."""
    kernel, bias = layer
    half = len(kernel) // 2
    return bias + jax.lax.conv_general_dilated(
        x, kernel, [stride] * 2, [(half, half)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def encode(layers, x):
    """q(z|x): images [B, 32, 32, 1] -> mean and logvar = log σ², each [B, 1, 1, CHANNELS]."""
    *convolutions, last = layers
    for layer, stride in zip(convolutions, [1, 2, 2, 2, 2], strict=True):
        x = jax.nn.elu(conv(layer, x, stride))
    return jnp.split(conv(last, x.reshape(len(x), 1, 1, -1)), 2, axis=-1)


def nca_step(layers, s):
    """s ← s + U(s): each cell sees its 3×3 neighbourhood, and all cells use the same network U."""
    perceive, *hidden, residual = layers
    h = conv(perceive, s)
    for first, second in zip(hidden[::2], hidden[1::2], strict=True):
        h = h + conv(second, jax.nn.elu(conv(first, h)))
    return s + conv(residual, h)


def decode(layers, s):
    """p(x|z): one cell s = z [B, 1, 1, CHANNELS] grows to logits [B, 32, 32, 1], channel 0."""
    for _ in range(5):
        s = s.repeat(2, axis=1).repeat(2, axis=2)  # every cell becomes 2×2 copies
        for _ in range(STEPS):
            s = nca_step(layers, s)
    return s[..., :1]


def elbo(encoder, automaton, x, noise):
    """E[log p(x|z)] − KL(q(z|x) ‖ N(0, I)), one sample z per image, averaged over images: nats."""
    mean, logvar = encode(encoder, x)
    logits = decode(automaton, mean + jnp.exp(0.5 * logvar) * noise)  # z = mean + σ·noise
    log_px_z = x * logits - jax.nn.softplus(logits)  # of each pixel
    kl = 0.5 * (jnp.exp(logvar) + mean**2 - 1 - logvar)  # of each channel
    return (jnp.sum(log_px_z) - jnp.sum(kl)) / len(x)


def stream(name):
    """The random key for one purpose. Different names give independent numbers."""
    return jax.random.fold_in(jax.random.key(SEED), zlib.crc32(name.encode()))


def normal(key, count):
    """Standard normal noise for `count` cells: [count, 1, 1, CHANNELS], with a key for each."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(key, (1, 1, CHANNELS)))(keys)


def load(name):
    """The images "train" or "test", [N, 32, 32, 1]: 28×28 pixels of 0.0 or 1.0, zero-padded."""
    bits = np.load(Path(__file__).parent / "program" / "bundled.npz")[name]
    pixels = np.unpackbits(bits, axis=1).reshape(-1, 28, 28, 1)
    return np.pad(pixels, [(0, 0), (2, 2), (2, 2), (0, 0)]).astype(np.float32)


def batch(images, t):
    """The images of update t = 1, 2, …: an epoch takes every image once, in a new random order."""
    epoch, i = divmod(t - 1, len(images) // BATCH)
    order = np.random.RandomState([SEED, epoch]).permutation(len(images))
    return images[order[i * BATCH : (i + 1) * BATCH]]


def train(images):
    """Trained parameters, and the loss of each update. Ctrl-C ends the training early."""
    theta, unravel = ravel_pytree(init(*jax.random.split(stream("init"))))
    m = v = jnp.zeros_like(theta)
    losses = []

    @jax.jit
    def update(theta, m, v, x, t):
        noise = normal(jax.random.fold_in(stream("posterior"), t), BATCH)
        loss, g = jax.value_and_grad(lambda theta: -elbo(*unravel(theta), x, noise))(theta)
        g = g * jnp.minimum(1, 10 / jnp.linalg.norm(g))  # clipped to a norm of 10
        m = 0.9 * m + 0.1 * g  # Adam (Kingma & Ba 2015)
        v = 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
        rate = RATE * jnp.minimum(1, t / 100) * (1 + jnp.cos(jnp.pi * t / UPDATES)) / 2
        return theta - rate * step, m, v, loss

    with suppress(KeyboardInterrupt):
        for t in range(1, UPDATES + 1):
            theta, m, v, loss = update(theta, m, v, batch(images, t), t)
            losses.append(float(loss))
            if t == 1 or t % 100 == 0:
                print(f"update {t:,} of {UPDATES:,}: loss {np.mean(losses[-100:]):.1f} nats")
    return unravel(theta), losses


def draw(pixels):
    """Pixels [H, W], 0 or 1, as text. A character is two of them, one above the other."""
    return "\n".join("".join(" ▄▀█"[i] for i in row) for row in 2 * pixels[::2] + pixels[1::2])


def main(count=1_000):
    """Trains, measures the ELBO of the first `count` test images, and draws sixteen samples."""
    (encoder, automaton), _ = train(load("train"))
    bound = elbo(encoder, automaton, load("test")[:count], normal(stream("evaluation"), count))
    print(f"ELBO of the first {count:,} test images: {bound:.1f} nats")
    logits = decode(automaton, normal(stream("prior"), 16))
    for row in np.array(logits > 0, int).reshape(4, 4, 32, 32)[:, :, 2:30, 6:26]:
        print(draw(np.hstack(row)))


if __name__ == "__main__":
    main()
