"""The figures: each is drawn, is a picture, and shows what its name says."""

import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image, ImageSequence

from vnca import report
from vnca.likelihoods import as_floats, binomial
from vnca.model import Model
from vnca.program import runs, store
from vnca.program.data import Dataset, load
from vnca.program.learner import make_learner
from vnca.program.order import fixed_shuffle
from vnca.program.pictures import prior_samples
from vnca.report import figures, trained

FILES = {
    "doubling": "channels.png growth.png growth_animated.png interpolation.png "
    "interpolation_animated.png",
    "mine": "channels.png growth.png recovery.png recovery_animated.png stability.png "
    "sampled_pixels.png",
    "baseline": "interpolation.png",
}
EACH = " samples.png reconstructions.png arrays.npz"
ALL = {f"{name}_{file}" for name in FILES for file in (FILES[name] + EACH).split()}
ALL |= {"data_examples.png", "play.html"}


def test_a_runs_checkpoint_is_shown_and_the_other_models_come_with_the_package(
    tmp_path, capsys, monkeypatch
):
    _, config, arrays = runs.find("packaged", "healing")
    for update in (1, 2):
        changed = {name: np.full_like(x, update) for name, x in arrays.items()}
        store.save(store.checkpoint(tmp_path, update), config, changed)
    run = runs.open_run(ConfigDict(config), tmp_path, "figures", "1")
    params = trained.trained_models(run)["healing"].params
    assert all(np.all(x == 1) for x in jax.tree.leaves(params))
    lines = capsys.readouterr().out
    assert f"healing: {store.checkpoint(tmp_path, 1)}, bundled images\n" in lines
    assert "baseline: packaged_baseline.npz, bundled images\n" in lines
    monkeypatch.setattr(
        trained, "trusted", lambda learner, config: make_learner(config, plain=True)
    )
    for shown in trained.trained_models(run).values():  # whose fast form is not to be trusted
        assert shown.model == make_learner(shown.config, plain=True).model


# ---- What the figures show: models whose numbers are known ---------------------------------------

ENDS = np.array([[0, 1, -2, 3]] * 32)
RAMP = np.linspace(-ENDS, ENDS, 32)  # [row, column, channel]


def encode(params, x):
    mean = jnp.tile(x.mean(axis=(1, 2)), 4)[:, :4]  # of one colour, four times; or of three
    return mean, jnp.nan * mean  # no picture is drawn from log-variances


def grow(params, z, channels=1):
    """The logit is z with t/10 added. It is the same in all cells, as other channels are not."""
    cells = [z[:, None, None] + t / 10 + (t - 2) * RAMP for t in range(4)]
    cells = jnp.stack(cells)[..., :channels]
    return [cells[:2, :, ::2, ::2], cells[2:]]


def decode(params, z):
    return grow(params, z)[-1][-1]


def initial_cells(z):
    return z[:, None, None] - 5 + 0 * RAMP


def step(params, cells):
    return cells + 0.02


def grow_on_a_grid(params, z, channels=3):
    """All channels of all cells are z with t/10 added."""
    return [jnp.stack([(initial_cells(z) + 5 + t / 10)[..., :channels] for t in range(4)])]


KNOWN = Model(4, tiny.DIGITS, None, encode, decode)
GROWS = KNOWN._replace(grow=grow)
STEPS = GROWS._replace(steps=3, initial_cells=initial_cells, step=step)
COLOURED = STEPS._replace(
    likelihood=binomial(32, 3, 255),
    grow=grow_on_a_grid,
    decode=lambda params, z: grow_on_a_grid(params, z)[-1][-1],
)
MODELS = {"doubling": GROWS, "mine": COLOURED, "baseline": KNOWN}
Z = np.asarray(prior_samples(0, 32, 4))
IMAGES = as_floats(tiny.DIGITS, load("bundled").test[fixed_shuffle(32, 10_000)])
MEANS = np.asarray(IMAGES).mean(axis=(1, 2))
COLOURS = np.random.RandomState(0).randint(256, size=(32, 32, 32, 3), dtype=np.uint8)
COLOURS[:, :, :, 1] //= 4  # so that no two colours are as bright
COLOURS[:, :, :, 2] //= 16
COLOURED_DATA = Dataset("own", *[COLOURS.reshape(32, -1)] * 2, None, None)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of the figures of known models with tiny parameters, and what was said of them,
    where the packages of the extra `report` are not installed."""
    workdir, lines = tmp_path_factory.mktemp("figures"), []
    models = {
        name: trained.TrainedModel(
            None, model, {}, COLOURED_DATA if model is COLOURED else load("bundled"), None, "x.npz"
        )
        for name, model in MODELS.items()
    }
    with pytest.MonkeyPatch.context() as patch, tiny.fast_compilation():
        patch.setitem(sys.modules, "matplotlib", None)
        patch.delitem(sys.modules, "vnca.report.plots", raising=False)
        patch.delattr(report, "plots", raising=False)  # where another test has imported it
        patch.setattr(figures, "trained_models", lambda run: models)
        patch.setattr(figures.play, "page", lambda models, plain: f"{[*models]} {plain}")
        patch.setattr(figures, "say", lines.append)
        tiny.without_network(patch)
        figures.figures(runs.open_run(tiny.config(), workdir, "figures"))
    return workdir / "figures", lines


def test_without_the_extra_packages_every_other_figure_is_there(drawn):
    folder, lines = drawn
    said = [Path(line.partition("  ")[0]) for line in lines[:-1]]
    assert {folder / name for name in ALL} == {*folder.iterdir()} == {*said}
    advice = "python -m pip install -e '.[report]' installs it"
    assert (folder / "play.html").read_text() == "['doubling', 'mine', 'baseline'] False"
    assert lines[-1] == f"no plots: matplotlib is missing: {advice}"


def frames(path, scale):
    """The 32×32 images of each frame of a PNG file, which have gaps around them: uint8
    [frames, rows, columns, 32, 32, colours]."""
    pages = [np.asarray(page) for page in ImageSequence.Iterator(Image.open(path))]
    pages = np.stack(pages).reshape(len(pages), *pages[0].shape[:2], -1)
    pages = pages[:, 2 * scale :: scale, 2 * scale :: scale]
    _, rows, columns, colours = np.array(pages.shape) // [1, 34, 34, 1]
    return pages.reshape(-1, rows, 34, columns, 34, colours).swapaxes(2, 3)[..., :32, :32, :]


def flat(logits):
    """Images that have the colour of these logits, [..., colours]."""
    return 255 * jax.nn.sigmoid(np.float32(logits))[..., None, None, :]


def recovery_of(means):
    """The frames of what loses a quadrant twice, given the mean colours of 16 images."""
    # Image i loses quadrant i mod 4, and then the next one.
    kept = np.kron(np.tile(1 - np.eye(4), (4, 1)).reshape(16, 2, 2), np.ones((16, 16)))[..., None]
    cells, found = means[:, None, None] - 5 + 3 * 0.02 + 0 * kept, []
    for mask in (kept, np.roll(kept, -1, axis=0)):
        lost = cells * mask
        found += [cells] * 6 + [lost] * 4 + [lost + 0.02 * t for t in range(1, 33)]
        cells = found[-1]
    logits = np.float32(found).reshape(84, 2, 8, 32, 32, means.shape[-1])
    return 255 * jax.nn.sigmoid(logits)


def stability_of(means):
    return flat(means[:, None] - 5 + 0.02 * np.array([[3], [50], [100], [200], [350], [500]]))


def test_each_picture_shows_what_its_title_says(drawn):
    growth = Z[:16, :1].reshape(2, 8, 1) + 0.1 * np.minimum(np.arange(14), 3)[:, None, None, None]
    starts = Z[:8, :1] + 0.3  # of ways that lead from each sample to the next
    ways = np.roll(starts, -1, axis=0) - starts
    between = (starts + np.arange(12) / 11 * ways).T.reshape(12, 2, 4, 1)
    up = np.linspace(0, 255, 32)[:, None, None]
    colours = (COLOURS / 255).mean(axis=(1, 2))[fixed_shuffle(32, 32)]
    wanted = {
        "doubling_growth_animated": flat(growth),
        "doubling_interpolation_animated": flat(between),
        "doubling_channels": [0 * up, up, up[::-1], up],  # each in its own range
        "mine_stability": stability_of(colours[:8]),
        "mine_recovery_animated": recovery_of(colours[:16]),
        "mine_growth": flat(Z[0, :3] + 0.1 * np.arange(4)[:, None]),
        "mine_samples": flat(Z[:, :3] + 0.3).reshape(4, 8, 1, 1, 3),
    }
    for name, levels in wanted.items():
        found = frames(drawn[0] / f"{name}.png", 2 if "animated" in name else 4)
        assert found.shape[-1] == np.shape(levels)[-1], name
        assert np.abs(found - levels).max() < 0.51, name


def test_what_diverged_is_black():
    diverged = jnp.where(jnp.arange(32) < 9, jnp.nan, jnp.inf)[:, None]
    lost = STEPS._replace(step=lambda params, s: s + diverged)
    assert not frames(io.BytesIO(figures.stability(lost, {}, IMAGES, 0)), 4).any()


def test_the_arrays_are_samples_images_and_reconstructions(drawn):
    arrays = np.load(drawn[0] / "baseline_arrays.npz")
    np.testing.assert_array_equal(arrays["images"], IMAGES)
    for name, z in ("samples", Z), ("reconstructions", MEANS):
        assert np.abs(255 * arrays[name] - flat(z[:, :1] + 0.3)).max() < 0.01


@pytest.mark.parametrize(("classes", "colours"), [(4, 1), (10, 1), (12, 1), (4, 3)])
def test_the_examples_are_ten_of_each_of_ten_classes_and_their_mean(classes, colours):
    likelihood = binomial(32, colours, 15)
    x = np.random.RandomState(0).randint(16, size=(60, 32, 32, colours), dtype=np.uint8)
    stored = x.reshape(60, -1)
    labels = None if classes == 10 else np.arange(60) % classes
    data = Dataset("own", stored, stored, None, labels)
    model = KNOWN._replace(likelihood=likelihood)
    content = figures.data_examples(trained.TrainedModel(None, model, {}, data, None, ""))
    [page] = frames(io.BytesIO(content), 2)
    of_class = 17.0 * x.reshape(-1, classes, 32, 32, colours).swapaxes(0, 1)[:10]
    wanted = [[*images[:10], images.mean(axis=0)] for images in of_class]
    assert np.abs(page - wanted).max() < 0.51
