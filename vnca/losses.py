"""ELBO (Kingma & Welling 2014) and IWELBO (Burda et al. 2016), in nats per image, float32 [B].

Images x and logits are [B, 32, 32, 1]. Latents z, means, log-variances and noise are [B, latent].
Both the paper and the reproduction train on the ELBO, and report the IWELBO of 128 samples.
"""

import chex
import jax
import jax.numpy as jnp
from jax import lax


def bernoulli_log_likelihood(logits, x):
    """log p(x|z), summed over all pixels (Kingma & Welling 2014, appendix C.1)."""
    chex.assert_equal_shape([logits, x])
    return jnp.sum(x * logits - jax.nn.softplus(logits), axis=(1, 2, 3))


def gaussian_kl(mean, logvar):
    """KL(N(mean, σ²) ‖ N(0, I)) with logvar = log σ², summed over the latents (Kingma & Welling
    2014, appendix B)."""
    return 0.5 * jnp.sum(jnp.exp(logvar) + mean**2 - 1 - logvar, axis=-1)


def normal_log_density(z):
    """log N(z; 0, I), summed over the latents."""
    return -0.5 * jnp.sum(jnp.log(2 * jnp.pi) + z**2, axis=-1)


def reparametrize(mean, logvar, noise):
    """A sample of N(mean, σ²) from standard normal noise: z = mean + σ·noise (Kingma & Welling
    2014, section 2.4)."""
    return mean + jnp.exp(0.5 * logvar) * noise


def elbo(mean, logvar, logits, x):
    """E_q[log p(x|z)] − KL(q(z|x) ‖ p(z)), as in Kingma & Welling 2014: eq. 3, estimated by eq. 10.

    The mean and logvar are those of q(z|x). The logits are decoded from one sample z of q(z|x), so
    log p(x|z) is an estimate of the expectation. Returns the ELBO and its two terms, log p(x|z) and
    the KL.
    """
    log_px_z = bernoulli_log_likelihood(logits, x)
    kl = gaussian_kl(mean, logvar)
    return log_px_z - kl, log_px_z, kl


def objective(mean, logvar, logits, x):
    """What training minimizes: −ELBO, as the mean over the images. Arguments as in `elbo`.

    Returns this scalar, and the three means to report, [−ELBO, −log p(x|z), KL].
    """
    bound, log_px_z, kl = elbo(mean, logvar, logits, x)
    value = -jnp.mean(bound)
    return value, jnp.stack([value, -jnp.mean(log_px_z), jnp.mean(kl)])


def log_importance_weight(model, params, x, mean, logvar, noise):
    """log [p(x|z) p(z) / q(z|x)] of one sample z = mean + σ·noise, and log p(x|z)."""
    z = reparametrize(mean, logvar, noise)
    log_px_z = bernoulli_log_likelihood(model.decode(params, z), x)
    log_pz = normal_log_density(z)
    # From the noise, since z − mean would be mostly rounding error if σ is far below |mean|.
    log_qz_x = normal_log_density(noise) - 0.5 * jnp.sum(logvar, axis=-1)
    return log_px_z + log_pz - log_qz_x, log_px_z


def iwelbo(model, params, x, noise_of, samples):
    """log [(1/S) Σ_s p(x|z_s) p(z_s) / q(z_s|x)], with z_s = mean + σ·noise_of(s), S = samples
    (Burda et al. 2016, section 3).

    noise_of is a function s -> noise [B, latent]. Samples are drawn one after another, so that
    memory does not grow with S. S may be traced. Returns the IWELBO, the mean of log p(x|z_s), and
    the KL, each [B].
    """
    mean, logvar = model.encode(params, x)

    def add_sample(s, sums):
        log_sum, log_px_z_sum = sums
        log_weight, log_px_z = log_importance_weight(model, params, x, mean, logvar, noise_of(s))
        return jnp.logaddexp(log_sum, log_weight), log_px_z_sum + log_px_z

    start = jnp.full(x.shape[0], -jnp.inf), jnp.zeros(x.shape[0])
    log_sum, log_px_z_sum = lax.fori_loop(0, samples, add_sample, start)
    return log_sum - jnp.log(samples), log_px_z_sum / samples, gaussian_kl(mean, logvar)
