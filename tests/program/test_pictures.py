"""Pictures: the files are valid PNG, and every image is where it should be and shows the model."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vnca.likelihoods import as_floats, binomial
from vnca.program import pictures
from vnca.program.data import noise
from vnca.program.learner import make_learner

pytest.importorskip("PIL")  # which comes with matplotlib
from PIL import Image, ImageSequence  # noqa: E402

PAPER = 96  # the grey between images


@pytest.mark.parametrize("colours, mode", [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("facts", [{}, {"duration": 100, "loop": 0}])  # ms; for ever
def test_an_animation_in_grey_or_colours_is_a_valid_png_with_a_sheet_for_each_frame(
    facts, colours, mode
):
    frames = np.random.RandomState(0).rand(3 if facts else 1, 5, 4, 4, colours)
    content = pictures.animate(frames, 3)
    picture = Image.open(io.BytesIO(content))
    found = [np.array(page).reshape(224, 320, -1) for page in ImageSequence.Iterator(picture)]
    sheets = [pictures.sheet([images[:3], images[3:]], 16) for images in frames]  # 64×64 each
    np.testing.assert_array_equal(found, sheets)
    assert picture.mode == mode and content.endswith(b"IEND\xaeB`\x82")
    assert facts.items() <= picture.info.items()


def shown(logits, colours=1):
    """What cells show that have one more channel than these logits."""
    model = make_learner(tiny.config())[0]._replace(likelihood=binomial(32, colours, 1))
    return pictures.shown(model, np.insert(logits, colours, 7.0, axis=-1))


def test_logits_are_shown_as_means_however_large_they_are_and_as_black_if_they_are_not_finite():
    logits = [-1e4, -2, 0, 1, 1e4, -np.inf, np.inf, np.nan]
    expected = [0, 0.119203, 0.5, 0.731059, 1, 0, 0, 0]
    with np.errstate(all="raise"):
        found = shown(np.float32(logits)[:, None])
    np.testing.assert_allclose(found[:, 0], expected, 1e-5, 1e-9)
    in_colours = np.float32([[-2, 0, 1], [1, 2, np.nan]])
    found = shown(in_colours, 3)
    np.testing.assert_allclose(found, [expected[1:4], [0, 0, 0]], 1e-5)


def test_a_pixel_has_changed_if_one_of_its_colours_has():
    # Of black and white: on the other side of one half, which is black itself.
    seen = np.array([0.0, 0.4, 0.5, 0.5001, 1.0, np.nan])[:, None]
    for expected, wanted in ((0.0, [0, 0, 0, 1, 1, 1]), (1.0, [1, 1, 1, 0, 0, 1])):
        found = pictures.has_changed(tiny.DIGITS, seen, np.full((6, 1), expected))
        np.testing.assert_array_equal(found, wanted)
    # Of colours: one of them by more than 32 of 255.
    before = np.full((4, 3), 100 / 255)
    seen = np.array([[100, 100, 133], [67, 100, 100], [131, 69, 100], [100, np.nan, 100]]) / 255
    found = pictures.has_changed(binomial(16, 3, 16), seen, before)
    np.testing.assert_array_equal(found, [1, 1, 0, 1])
    assert pictures.changed_in_words(tiny.DIGITS, "wrong") == "wrong pixels"
    assert "32 of 255" in pictures.changed_in_words(binomial(16, 1, 16), "wrong")


@pytest.mark.parametrize("colours", [[1.0], [0.0, 0.6, 1.0]])
def test_smaller_grids_are_centred_on_paper_and_short_rows_end_in_it(colours):
    rows = [[np.ones((2, 2, 1)), np.full((4, 4, 1), 0.3)], [np.ones((8, 8, 1))]]
    expected = np.full((22, 22, len(colours)), PAPER)
    levels = np.array(colours)
    expected[5:7, 5:7] = np.round(255 * levels)
    expected[4:8, 14:18] = np.round(76.5 * levels)
    expected[12:20, 2:10] = np.round(255 * levels)
    for scale in 1, 4:
        found = pictures.sheet([[image * levels for image in row] for row in rows], scale)
        np.testing.assert_array_equal(found, np.kron(expected, np.ones((scale, scale, 1))))


@pytest.mark.parametrize(
    "length, starts", [(1, [0]), (10, [0]), (11, [0, 9]), (37, [0, 9, 18, 27])]
)
def test_a_long_growth_is_broken_into_lines_that_repeat_where_they_left_off(length, starts):
    grids = np.random.RandomState(0).rand(length, 2, 2, 1)
    rows = [grids[i : i + 10] for i in starts]
    assert pictures.rows_of_growth([grids]) == pictures.png(pictures.sheet(rows))


def toy(kind, likelihood):
    """A Model whose logits tell where they come from: of images a number of their white pixels, of
    z its first number; cells gain 1 in a step, and it takes 3. A second and a third logit of a
    pixel are twice and three times as large at first."""
    made = make_learner(tiny.config(kind)).model
    size, outputs = likelihood.size, likelihood.outputs

    def decode(params, z):
        shape = len(z), size, size, outputs
        return jnp.broadcast_to(z[:, None, None, :1] * jnp.arange(1, outputs + 1), shape)

    def grow(params, z):
        return [jnp.stack([decode(params, z)[:, :n, :n] + t for t in range(3)]) for n in (4, size)]

    return made._replace(
        likelihood=likelihood, latent_size=1, steps=3, decode=decode, grow=made.grow and grow,
        encode=lambda params, x: (x.sum(axis=(1, 2))[:, :1] / 256, None),
        initial_cells=lambda z: decode(None, z), step=made.step and (lambda params, s: s + 1),
    )  # fmt: skip


def probability(logits):
    return 1 / (1 + np.exp(-np.float64(logits)))


@pytest.mark.parametrize(
    "kind, count, likelihood",
    [
        ("baseline", 2, tiny.DIGITS),
        ("doubling", 3, tiny.DIGITS),
        ("nondoubling", 4, tiny.DIGITS),
        ("nondoubling", 4, binomial(16, 3, 1)),
    ],
)
def test_training_draws_what_its_model_can_show(kind, count, likelihood):
    size, factors = likelihood.size, np.arange(1, likelihood.colours + 1)
    brightness = np.linspace(0.2, 1, 9, dtype=np.float32)[:, None, None, None]
    images = brightness * np.array(as_floats(likelihood, noise(likelihood, 9)))
    z, sums = pictures.prior_samples(5, 32, 1), images.sum(axis=(1, 2))[:, :1] / 256

    def plain(logits, n=size):
        """An image of one colour for each pixel's logits."""
        return probability(np.ones((n, n, 1)) * np.reshape(logits, (-1, 1, 1, len(factors))))

    drawn, grown = plain(sums * factors), z[0] * factors + np.arange(3)[:, None]
    # Image i loses quadrant i mod 4.
    kept = np.tile(1 - np.eye(4), (2, 1)).reshape(8, 2, 2)
    kept = np.kron(kept, np.ones((size // 2, size // 2)))[..., None]
    cells = (sums[:8] * factors + 3)[:, None, None]
    healed = [cells + 0 * kept, *(cells * kept + steps for steps in (0, 2, 4, 8, 16, 32))]
    rows = {
        "samples": np.split(plain(z * factors), 4),
        "reconstructions": [images[:8], drawn[:8], images[8:], drawn[8:]],
        "growth": [plain(grown, 4), plain(grown)],
        "recovery": probability(np.stack(healed, axis=1)),
    }
    expected = {name: pictures.png(pictures.sheet(rows[name])) for name in [*rows][:count]}
    assert pictures.training_pictures(toy(kind, likelihood), {}, images, seed=5) == expected


def test_samples_are_of_the_prior_and_of_the_seed():
    z = np.asarray(pictures.prior_samples(5, 1000, 2))
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
    assert np.all(z != pictures.prior_samples(6, 1000, 2))
