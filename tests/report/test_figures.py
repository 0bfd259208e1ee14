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
from vnca.models import Model, unpack
from vnca.program import runs, store
from vnca.program.config import KINDS
from vnca.program.data import Dataset, load
from vnca.program.method import make_method
from vnca.program.order import fixed_shuffle
from vnca.program.pictures import prior_samples
from vnca.report import figures, trained

FILES = {
    "doubling": "channels.png growth.png growth_animated.png interpolation.png "
    "interpolation_animated.png",
    "nondoubling": "channels.png growth.png recovery.png recovery_animated.png stability.png",
    "baseline": "interpolation.png",
}
EACH = " samples.png reconstructions.png arrays.npz"
ALL = {f"{kind}_{name}" for kind in FILES for name in (FILES[kind] + EACH).split()}
ALL |= {"data_examples.png", "play.html"}


def test_a_runs_checkpoint_is_shown_and_the_other_models_come_with_the_package(
    tmp_path, capsys, monkeypatch
):
    config, arrays = store.load(runs.packaged_path("nondoubling"))
    for update in (1, 2):
        changed = {name: np.full_like(x, update) for name, x in arrays.items()}
        store.save(store.checkpoint(tmp_path, update), config, changed)
    run = runs.open_run(ConfigDict(config), tmp_path, "figures", "1")
    params = trained.trained_models(run)["nondoubling"].params
    assert all(np.all(x == 1) for x in jax.tree.leaves(params))
    lines = capsys.readouterr().out
    assert f"nondoubling: {store.checkpoint(tmp_path, 1)}, bundled images\n" in lines
    assert "baseline: packaged_baseline.npz, bundled images\n" in lines
    monkeypatch.setattr(trained, "trusted", lambda method, config: make_method(config, plain=True))
    for shown in trained.trained_models(run).values():  # whose fast form is not to be trusted
        assert shown.model == make_method(shown.config, plain=True).model


# ---- What the figures show: a model whose numbers are known --------------------------------------

ENDS = np.array([[0, 1, -2, 3]] * 32)
RAMP = np.linspace(-ENDS, ENDS, 32)  # [row, column, channel]


def encode(params, x):
    mean = x.mean(axis=(1, 2)).repeat(4, axis=1)
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


KNOWN = Model(4, None, encode, decode, grow, 3, None, initial_cells, step)
Z = np.asarray(prior_samples(0, 32, 4))[:, :1]
IMAGES = unpack(load("bundled").test[fixed_shuffle(32, 10_000)])
MEANS = np.asarray(IMAGES).mean(axis=(1, 2))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of the figures of known models with tiny parameters, and what was said of them,
    where the packages of the extra `report` are not installed."""
    workdir, lines, models = tmp_path_factory.mktemp("figures"), [], {}
    for kind in KINDS:
        packaged = tiny.in_place_of_packaged(kind)._replace(model=KNOWN)
        models[kind] = trained.TrainedModel(*packaged[:3], load("bundled"), packaged.curve, "x.npz")
    with pytest.MonkeyPatch.context() as patch, tiny.fast_compilation():
        patch.setitem(sys.modules, "matplotlib", None)
        patch.delitem(sys.modules, "vnca.report.plots", raising=False)
        patch.delattr(report, "plots", raising=False)  # where another test has imported it
        patch.setattr(figures, "trained_models", lambda run: models)
        patch.setattr(figures, "say", lines.append)
        tiny.without_network(patch)
        figures.figures(runs.open_run(tiny.config(), workdir, "figures"))
    return workdir / "figures", lines


@pytest.mark.slow  # draws every figure, for 5 seconds
def test_without_the_extra_packages_every_other_figure_is_there(drawn):
    folder, lines = drawn
    said = [Path(line.partition("  ")[0]) for line in lines[:-1]]
    assert {folder / name for name in ALL} == {*folder.iterdir()} == {*said}
    advice = "python -m pip install -e '.[report]' installs it"
    assert lines[-1] == f"no plots: matplotlib is missing: {advice}"


def frames(path, scale):
    """The 32×32 images of each frame of a PNG file, which have gaps around them: uint8
    [frames, rows, columns, 32, 32]."""
    pages = np.stack([page.convert("L") for page in ImageSequence.Iterator(Image.open(path))])
    pages = pages[:, 2 * scale :: scale, 2 * scale :: scale]
    _, rows, columns = np.array(pages.shape) // 34
    return pages.reshape(-1, rows, 34, columns, 34).swapaxes(2, 3)[..., :32, :32]


def flat(logits):
    """Images that have the grey level of one logit each."""
    return 255 * jax.nn.sigmoid(np.float32(logits))[..., None, None]


def test_each_picture_shows_what_its_title_says(drawn):
    growth = Z[:16].reshape(2, 8) + 0.1 * np.minimum(np.arange(14), 3)[:, None, None]
    starts = Z[:8] + 0.3  # of ways that lead from each sample to the next
    ways = np.roll(starts, -1, axis=0) - starts
    between = (starts + np.arange(12) / 11 * ways).T.reshape(12, 2, 4)
    stability = MEANS[:8] - 5 + 0.02 * np.array([3, 50, 100, 200, 350, 500])
    # Image i loses quadrant i mod 4, and then the next one.
    kept = np.kron(np.tile(1 - np.eye(4), (4, 1)).reshape(16, 2, 2), np.ones((16, 16)))
    cells, recovery = MEANS[:16, None] - 5 + 3 * 0.02 + 0 * kept, []
    for mask in (kept, np.roll(kept, -1, axis=0)):
        lost = cells * mask
        recovery += [cells] * 6 + [lost] * 4 + [lost + 0.02 * t for t in range(1, 33)]
        cells = recovery[-1]
    up = np.linspace(0, 255, 32)[:, None]
    wanted = {
        "doubling_growth_animated": flat(growth),
        "doubling_interpolation_animated": flat(between),
        "nondoubling_stability": flat(stability),
        "nondoubling_recovery_animated": flat(recovery).reshape(84, 2, 8, 32, 32),
        "doubling_channels": [0 * up, up, up[::-1], up],  # each in its own range
    }
    for name, levels in wanted.items():
        found = frames(drawn[0] / f"{name}.png", 2 if "animated" in name else 4)
        assert np.abs(found - levels).max() < 0.51, name


def test_what_diverged_is_black():
    diverged = jnp.where(jnp.arange(32) < 9, jnp.nan, jnp.inf)[:, None]
    lost = KNOWN._replace(step=lambda params, s: s + diverged)
    assert not frames(io.BytesIO(figures.stability(lost, {}, IMAGES, 0)), 4).any()


def test_the_arrays_are_samples_images_and_reconstructions(drawn):
    arrays = np.load(drawn[0] / "baseline_arrays.npz")
    np.testing.assert_array_equal(arrays["images"], IMAGES[..., 0])
    for name, z in ("samples", Z), ("reconstructions", MEANS):
        assert np.abs(255 * arrays[name] - flat(z[:, 0] + 0.3)).max() < 0.01


@pytest.mark.parametrize("classes", [4, 10, 12])
def test_the_examples_are_ten_of_each_of_ten_classes_and_their_mean(classes):
    x = np.random.RandomState(0).randint(2, size=(60, 28, 28), dtype=np.uint8)
    bits = np.packbits(x.reshape(60, -1), axis=1)
    labels = None if classes == 10 else np.arange(60) % classes
    content = figures.data_examples(Dataset("own", bits, bits, None, labels))
    [page] = frames(io.BytesIO(content), 2)
    of_class = 255.0 * x.reshape(-1, classes, 28, 28).swapaxes(0, 1)[:10]
    wanted = [[*images[:10], images.mean(axis=0)] for images in of_class]
    assert np.abs(page[..., 2:30, 2:30] - wanted).max() < 0.51
