"""Randomness: the keys by JAX's own folding, the numbers by the distribution they must have."""

import math

import jax
import numpy as np

from vnca.training import normal, stream

POSTERIOR = 3_655_264_240  # the CRC-32 of "posterior", by gzip


def cumulative(x):
    """The standard normal distribution function."""
    return np.array([(1 + math.erf(v / 2**0.5)) / 2 for v in x])


def test_a_stream_is_its_seed_its_purpose_and_its_indices_folded_in():
    key = jax.random.fold_in(jax.random.key(7), POSTERIOR)
    assert stream(7, "posterior") == key
    key = jax.random.fold_in(key, 5)
    assert stream(7, "posterior", 5) == key
    assert stream(7, "posterior", 5, 9) == jax.random.fold_in(key, 9)
    assert stream(7, "posterior", 9, 5) != jax.random.fold_in(key, 9)


def test_noise_is_standard_normal_and_independent():
    draws = [normal(stream(0, "posterior", t), np.arange(500), 8) for t in (1, 2)]
    draws.append(normal(stream(0, "evaluation", 1), np.arange(500), 8))
    for x in map(np.asarray, draws):
        assert x.shape == (500, 8) and x.dtype == np.float32
        ordered = np.sort(x.ravel())
        # Kolmogorov-Smirnov: 2 / √n is exceeded once in 1,500 times by numbers that are right.
        off = np.abs(cumulative(ordered) - (np.arange(4000) + 0.5) / 4000).max()
        assert off < 2 / 4000**0.5
    # No two places, latents, updates or purposes have correlated numbers, or more in common than
    # the nine of 12,000 that are equal by chance (a number has 2²³ values).
    columns = np.concatenate(draws, axis=1)
    correlations = np.corrcoef(columns, rowvar=False) - np.eye(24)
    assert np.abs(correlations).max() < 5 / 500**0.5
    rows = np.corrcoef(np.concatenate(draws, axis=1)) - np.eye(500)
    assert np.abs(rows).max() < 0.95
    assert len(np.unique(columns)) > 11_950


def test_an_index_has_the_same_noise_in_any_batch():
    key = stream(3, "posterior", 1)
    alone, among = normal(key, np.array([41]), 4), normal(key, np.array([7, 41, 2]), 4)
    np.testing.assert_array_equal(alone[0], among[1])
    assert (np.asarray(among[0]) != among[2]).all()
