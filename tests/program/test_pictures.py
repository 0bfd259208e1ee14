"""Pictures: the files are valid PNG, and every image is where it should be and shows the model."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from pngs import decode, decode_all

from vnca.images import unpack
from vnca.program import pictures
from vnca.program.data import load
from vnca.program.method import make_method

PAPER = 96  # the grey between images


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 40), (3, 5, 7)], ids=str)
def test_a_picture_is_a_valid_png_of_its_pixels_and_several_are_an_animation(shape):
    frames = list(np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8))
    np.testing.assert_array_equal(decode_all(pictures.png(*frames)), frames)


def test_an_animation_has_a_sheet_for_each_frame():
    frames = np.random.RandomState(0).rand(2, 5, 4, 4)
    for page, images in zip(decode_all(pictures.animate(frames, 3)), frames, strict=True):
        assert np.array_equal(page, pictures.sheet([images[:3], images[3:]], 2))


def test_logits_become_probabilities_however_large_they_are():
    logits = np.array([-1e4, -2, 0, 1, 1e4, -np.inf, np.inf], np.float32).reshape(1, 1, -1, 1)
    with np.errstate(all="raise"):
        found = pictures.probabilities(logits)
    np.testing.assert_allclose(found[0, 0], [0, 0.119203, 0.5, 0.731059, 1, 0, 1], 1e-5, 1e-9)


@pytest.mark.parametrize("scale", [1, 4])
def test_smaller_grids_are_centred_on_paper_and_short_rows_end_in_it(scale):
    rows = [[np.ones((2, 2)), np.full((4, 4), 0.3)], [np.ones((8, 8))]]
    expected = np.full((22, 22), PAPER)
    expected[5:7, 5:7] = 255
    expected[4:8, 14:18] = 76
    expected[12:20, 2:10] = 255
    expected = np.kron(expected, np.ones((scale, scale)))
    assert np.array_equal(pictures.sheet(rows, scale, 2), expected)


def shown(i, j, page, size):
    """The image at (row, column) of a sheet whose pixels are 4×4, with gaps of 2."""
    top, left = (2 + k * (size + 2) for k in (i, j))
    return page[::4, ::4][top : top + size, left : left + size]


def has_shade(pixels, logits):
    """Whether uint8 pixels have the probability of logits, rounded."""
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    return np.abs(pixels - 255 * p).max() < 0.5 + 1e-4


@pytest.mark.parametrize(("length", "lines"), [(1, 1), (10, 1), (11, 2), (37, 4)])
def test_a_long_growth_is_broken_into_lines_that_repeat_where_they_left_off(length, lines):
    logits = np.linspace(-2, 2, length)
    grids = np.broadcast_to(logits.reshape(-1, 1, 1, 1), (length, 2, 2, 1))
    page = decode(pictures.rows_of_growth([grids]))
    assert page.shape == (4 * (lines * 4 + 2), 4 * (min(length, 10) * 4 + 2))
    for n in range(length):
        line = max(n - 1, 0) // 9
        assert has_shade(shown(line, n - 9 * line, page, 2), logits[n])


def toy(kind):
    """A Model whose logits tell where they come from: of images four times the mean pixel, of z its
    first number; cells gain 1 in a step, and it takes 3."""
    made = make_method(tiny.config(kind)).model

    def decode(params, z):
        return jnp.broadcast_to(z[:, None, None, :1], (len(z), 32, 32, 1))

    def grow(params, z):
        return [jnp.stack([decode(params, z)[:, :n, :n] + t for t in range(3)]) for n in (4, 32)]

    return made._replace(
        latent_size=1, steps=3, decode=decode, grow=made.grow and grow,
        encode=lambda params, x: (4 * x.mean(axis=(1, 2)), None),
        initial_cells=lambda z: decode(None, z), step=lambda params, s: s + 1,
    )  # fmt: skip


DRAWN = {
    "baseline": ["samples", "reconstructions"],
    "doubling": ["samples", "reconstructions", "growth"],
    "nondoubling": ["samples", "reconstructions", "growth", "recovery"],
}


@pytest.mark.parametrize("kind", DRAWN)
def test_training_draws_what_its_model_can_show(kind):
    images = unpack(load("bundled").test[:9])
    drawn = pictures.training_pictures(toy(kind), {}, images, seed=5)
    assert [*drawn] == DRAWN[kind]
    page = {name: decode(content) for name, content in drawn.items()}
    z, mean = pictures.prior_samples(5, 32, 1), 4 * np.mean(images, axis=(1, 2, 3))
    for n in range(32):
        assert has_shade(shown(*divmod(n, 8), page["samples"], 32), z[n])
    for n in range(9):
        i, j = divmod(n, 8)
        original, other = (shown(2 * i + k, j, page["reconstructions"], 32) for k in (0, 1))
        assert np.array_equal(original, 255 * images[n, ..., 0]) and has_shade(other, mean[n])
    for t in range(3 if "growth" in page else 0):
        small, large = (shown(i, t, page["growth"], 32) for i in (0, 1))
        assert has_shade(small[14:18, 14:18], z[0] + t) and has_shade(large, z[0] + t)
    for j, steps in enumerate([0, 0, 2, 4, 8, 16, 32] if "recovery" in page else []):
        for i in range(8):
            cells = np.full((2, 16, 2, 16), mean[i] + 3)
            if j:  # image i has lost a quadrant
                cells[i % 4 // 2, :, i % 2] = 0
            found = shown(i, j, page["recovery"], 32)
            assert has_shade(found, cells.reshape(32, 32) + steps)


def test_samples_are_of_the_prior_and_of_the_seed():
    z = np.asarray(pictures.prior_samples(5, 1000, 2))
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
    assert np.all(z != pictures.prior_samples(6, 1000, 2))
    assert np.array_equal(z[:3], pictures.prior_samples(5, 3, 2))
