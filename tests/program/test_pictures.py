"""Pictures: the files are valid PNG, and every image is where it should be and shows the model."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vnca.models import unpack
from vnca.program import pictures
from vnca.program.data import load
from vnca.program.method import make_method

pytest.importorskip("PIL")  # which comes with matplotlib
from PIL import Image, ImageSequence  # noqa: E402

PAPER = 96  # the grey between images


@pytest.mark.parametrize("facts", [{}, {"duration": 100, "loop": 0}])  # ms; for ever
def test_an_animation_is_a_valid_png_with_a_sheet_for_each_frame(facts):
    frames = np.random.RandomState(0).rand(3 if facts else 1, 5, 4, 4)
    content = pictures.animate(frames, 3)
    picture = Image.open(io.BytesIO(content))
    found = [np.array(page) for page in ImageSequence.Iterator(picture)]
    sheets = [pictures.sheet([images[:3], images[3:]], 2) for images in frames]
    np.testing.assert_array_equal(found, sheets)
    assert picture.mode == "L" and content.endswith(b"IEND\xaeB`\x82")
    assert facts.items() <= picture.info.items()


def test_logits_become_probabilities_however_large_they_are():
    logits = np.array([-1e4, -2, 0, 1, 1e4, -np.inf, np.inf], np.float32).reshape(1, 1, -1, 1)
    with np.errstate(all="raise"):
        found = pictures.probabilities(logits)
    np.testing.assert_allclose(found[0, 0], [0, 0.119203, 0.5, 0.731059, 1, 0, 1], 1e-5, 1e-9)


def test_smaller_grids_are_centred_on_paper_and_short_rows_end_in_it():
    rows = [[np.ones((2, 2)), np.full((4, 4), 0.3)], [np.ones((8, 8))]]
    expected = np.full((22, 22), PAPER)
    expected[5:7, 5:7] = 255
    expected[4:8, 14:18] = 76
    expected[12:20, 2:10] = 255
    for scale in 1, 4:
        assert np.array_equal(
            pictures.sheet(rows, scale), np.kron(expected, np.ones((scale, scale)))
        )


@pytest.mark.parametrize(
    "length, starts", [(1, [0]), (10, [0]), (11, [0, 9]), (37, [0, 9, 18, 27])]
)
def test_a_long_growth_is_broken_into_lines_that_repeat_where_they_left_off(length, starts):
    grids = np.random.RandomState(0).normal(size=(length, 2, 2, 1))
    rows = [pictures.probabilities(grids[i : i + 10]) for i in starts]
    assert pictures.rows_of_growth([grids]) == pictures.png(pictures.sheet(rows))


def toy(kind):
    """A Model whose logits tell where they come from: of images a number of their white pixels, of
    z its first number; cells gain 1 in a step, and it takes 3."""
    made = make_method(tiny.config(kind)).model

    def decode(params, z):
        return jnp.broadcast_to(z[:, None, None, :1], (len(z), 32, 32, 1))

    def grow(params, z):
        return [jnp.stack([decode(params, z)[:, :n, :n] + t for t in range(3)]) for n in (4, 32)]

    return made._replace(
        latent_size=1, steps=3, decode=decode, grow=made.grow and grow,
        encode=lambda params, x: (x.sum(axis=(1, 2)) / 256, None),
        initial_cells=lambda z: decode(None, z), step=lambda params, s: s + 1,
    )  # fmt: skip


@pytest.mark.parametrize("kind, count", [("baseline", 2), ("doubling", 3), ("nondoubling", 4)])
def test_training_draws_what_its_model_can_show(kind, count):
    images = np.asarray(unpack(load("bundled").test[:9]))
    z, sums = pictures.prior_samples(5, 32, 1), images.sum(axis=(1, 2)) / 256

    def plain(levels, n=32):
        """An image of one shade for each logit."""
        return pictures.probabilities(np.ones((n, n, 1)) * np.reshape(levels, (-1, 1, 1, 1)))

    drawn, pixels, grown = plain(sums), images[..., 0], z[0] + np.arange(3)
    # Image i loses quadrant i mod 4.
    kept = np.kron(np.tile(1 - np.eye(4), (2, 1)).reshape(8, 2, 2), np.ones((16, 16)))
    cells = sums[:8, :, None] + 3
    healed = [cells + 0 * kept, *(cells * kept + steps for steps in (0, 2, 4, 8, 16, 32))]
    rows = {
        "samples": plain(z).reshape(4, 8, 32, 32),
        "reconstructions": [pixels[:8], drawn[:8], pixels[8:], drawn[8:]],
        "growth": [plain(grown, 4), plain(grown)],
        "recovery": pictures.probabilities(np.stack(healed, axis=1)[..., None]),
    }
    expected = {name: pictures.png(pictures.sheet(rows[name])) for name in [*rows][:count]}
    assert pictures.training_pictures(toy(kind), {}, images, seed=5) == expected


def test_samples_are_of_the_prior_and_of_the_seed():
    z = np.asarray(pictures.prior_samples(5, 1000, 2))
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
    assert np.all(z != pictures.prior_samples(6, 1000, 2))
