"""ELBO (Kingma & Welling 2014) and IWELBO (Burda et al. 2016), nats for each image, float32 [B]
(their means: `loss_terms`), of x and logits [B, 32, 32, 1], latents and noise [B, latent]."""

import jax
import jax.numpy as jnp
from jax import lax


def bernoulli_log_likelihood(logits, x):
    """log p(x|z), summed over all pixels."""
    return jnp.sum(x * logits - jax.nn.softplus(logits), axis=(1, 2, 3))


def gaussian_kl(mean, logvar):
    """KL(N(mean, σ²) ‖ N(0, I)) with logvar = log σ², summed over the latents."""
    return 0.5 * jnp.sum(jnp.exp(logvar) + mean**2 - 1 - logvar, axis=-1)


def gaussian_log_density(z, mean, logvar):
    """log N(z; mean, σ²) with logvar = log σ², summed over the latents."""
    square = (z - mean) ** 2 * jnp.exp(-logvar)
    return -0.5 * jnp.sum(jnp.log(2 * jnp.pi) + logvar + square, axis=-1)


def reparametrize(mean, logvar, noise):
    """A sample of N(mean, σ²) from standard normal noise: z = mean + σ·noise."""
    return mean + jnp.exp(0.5 * logvar) * noise


def elbo(model, params, x, noise):
    """log p(x|z) and KL(q(z|x) ‖ p(z)), the ELBO's terms, with one z = mean + σ·noise an image."""
    mean, logvar = model.encode(params, x)
    z = reparametrize(mean, logvar, noise)
    return bernoulli_log_likelihood(model.decode(params, z), x), gaussian_kl(mean, logvar)


def loss_terms(log_px, kl):
    """Loss (−ELBO), reconstruction and KL, means over images: [3]."""
    return jnp.stack([jnp.mean(kl - log_px), jnp.mean(-log_px), jnp.mean(kl)])


def log_importance_weight(model, params, x, mean, logvar, noise):
    """log p(x|z) p(z) / q(z|x) of one z = mean + σ·noise for each image, and log p(x|z)."""
    z = reparametrize(mean, logvar, noise)
    log_px = bernoulli_log_likelihood(model.decode(params, z), x)
    log_pz, log_qz = gaussian_log_density(z, 0.0, 0.0), gaussian_log_density(z, mean, logvar)
    return log_px + log_pz - log_qz, log_px


def iwelbo(model, params, x, noise, samples):
    """log 1/S Σ_s p(x|z_s) p(z_s) / q(z_s|x), with z_s = mean + σ·noise(s) and S = samples.

    noise: s -> [B, latent], as samples are streamed: memory does not grow with S, which may be
    traced. Returns the bound, the mean of log p(x|z_s), and the KL.
    """
    mean, logvar = model.encode(params, x)

    def add(s, sums):
        log_weight, log_px = log_importance_weight(model, params, x, mean, logvar, noise(s))
        return jnp.logaddexp(sums[0], log_weight), sums[1] + log_px

    start = jnp.full(x.shape[0], -jnp.inf), jnp.zeros(x.shape[0])
    log_sum, log_px = lax.fori_loop(0, samples, add, start)
    return log_sum - jnp.log(samples), log_px / samples, gaussian_kl(mean, logvar)
