"""The figures: each is drawn, is a picture, and shows what its name says."""

import contextlib
import io
import sys

import glyphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from vnca.images import unpack
from vnca.models import Model
from vnca.program import metrics, runs, store
from vnca.program.config import KINDS
from vnca.program.data import Dataset, load
from vnca.program.order import fixed_shuffle
from vnca.program.pictures import prior_samples
from vnca.report import figures, trained

NAMES = {
    "doubling": "channels growth growth_animated interpolation interpolation_animated",
    "nondoubling": "channels growth recovery recovery_animated stability",
    "baseline": "interpolation",
}
PICTURES = {f"{k}_{n}.png" for k in NAMES for n in f"reconstructions samples {NAMES[k]}".split()}
PICTURES |= {"data_examples.png"}
ALL = PICTURES | {"play.html", *(f"{kind}_arrays.npz" for kind in NAMES)}


def frames(content, scale=4):
    """The 32×32 images of each frame of a PNG file, which have gaps around them: a list of uint8
    [rows, columns, 32, 32]."""
    image, found = Image.open(io.BytesIO(content)), []
    for i in range(getattr(image, "n_frames", 1)):
        image.seek(i)
        page = np.asarray(image.convert("L"))[::scale, ::scale]
        rows, columns = (n // 34 for n in page.shape)
        found.append(page[2:, 2:].reshape(rows, 34, columns, 34).swapaxes(1, 2)[..., :32, :32])
    return found


def check_shades(page, logits):
    """Each image has one grey level, that of its logit."""
    assert np.ptp(page, axis=(2, 3)).max() == 0
    np.testing.assert_allclose(page[..., 0, 0], 255 * jax.nn.sigmoid(logits), atol=0.51)


# ---- Whose pictures they are ---------------------------------------------------------------------


def test_a_runs_checkpoint_is_shown_and_the_other_models_come_with_the_package(tmp_path, capsys):
    config, shapes = tiny.config("nondoubling"), tiny.in_place_of_packaged("nondoubling").params
    for update in (1, 2):
        params = jax.tree.map(lambda x, n=update: np.full_like(x, n), shapes)
        arrays = {
            metrics.name(path): x for path, x in jax.tree.leaves_with_path({"params": params})
        }
        store.save(store.checkpoint(tmp_path, update), config.to_dict(), arrays)
    for which, update in ((None, 2), ("1", 1)):
        shown = trained.trained_models(runs.open_run(config, tmp_path, "figures", which))
        for kind, line in zip(KINDS, capsys.readouterr().out.splitlines()[-3:], strict=True):
            origin = f"packaged_{kind}.npz"
            if kind == "nondoubling":
                origin = store.checkpoint(tmp_path, update)
                assert all(np.all(x == update) for x in jax.tree.leaves(shown[kind].params))
            assert line == f"{kind}: {origin}, bundled images"


@pytest.fixture(scope="module", params=["tiny", pytest.param("packaged", marks=pytest.mark.slow)])
def drawn(tmp_path_factory, request):
    """The figures of the packaged models, or of tiny ones, and what was said of them, where the
    packages of the extra `report` are not installed."""
    workdir, out = tmp_path_factory.mktemp("figures"), io.StringIO()
    run = runs.open_run(tiny.committed("small_doubling"), workdir, "figures")
    models, still = {}, known_model(0).grow  # the true one compiles for all grids and pictures
    for kind in KINDS:
        packaged = tiny.in_place_of_packaged(kind)
        model = packaged.model
        if kind == "doubling":
            model = model._replace(grow=still, decode=lambda params, z: still(params, z)[0][-1])
        models[kind] = trained.TrainedModel(
            packaged.config, model, packaged.params, load("bundled"), packaged.curve, "x.npz"
        )
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setitem(sys.modules, "matplotlib", None)
        patch.delitem(sys.modules, "vnca.report.plots", raising=False)
        tiny.without_network(patch)
        if request.param == "tiny":
            patch.setattr(figures, "trained_models", lambda run: models)
        with tiny.fast_compilation():
            figures.figures(run)
    return workdir / "figures", out.getvalue().splitlines()


def test_without_the_extra_packages_every_other_figure_is_there(drawn):
    folder, lines = drawn
    assert {path.name for path in folder.iterdir()} == ALL
    assert all(any(f"{name}  " in line for line in lines) for name in ALL)
    for name in PICTURES:
        count = getattr(Image.open(folder / name), "n_frames", 1)
        assert count > 5 if "animated" in name else count == 1
    assert lines[-1].startswith("no plots: matplotlib is missing")
    assert "python -m pip install -e '.[report]'" in lines[-1]


@pytest.mark.parametrize("kind", NAMES)
def test_the_arrays_are_what_the_pictures_of_samples_and_reconstructions_show(drawn, kind):
    folder, _ = drawn
    arrays = np.load(folder / f"{kind}_arrays.npz")
    shuffled = load("bundled").test[fixed_shuffle(32, 10_000)]
    np.testing.assert_array_equal(arrays["images"], unpack(shuffled)[..., 0])
    names = "samples", "reconstructions"
    [single], [pairs] = (frames((folder / f"{kind}_{name}.png").read_bytes()) for name in names)
    shown = {"samples": single, "images": pairs[::2], "reconstructions": pairs[1::2]}
    for name, page in shown.items():
        wanted = np.round(255 * np.float32(arrays[name]))
        np.testing.assert_array_equal(page.reshape(32, 32, 32), wanted)


def test_the_animation_of_recovery_loses_two_quadrants_and_takes_32_steps_after_each(drawn):
    pages = np.stack(frames((drawn[0] / "nondoubling_recovery_animated.png").read_bytes(), 2))
    assert pages.shape == (2 * (6 + 4 + 32), 2, 8, 32, 32)
    # [frame, image, quadrant, pixels]
    pages = pages.reshape(-1, 16, 2, 16, 2, 16).swapaxes(3, 4).reshape(-1, 16, 4, 16, 16)
    for offset, life in enumerate(np.split(pages.astype(int), 2)):
        assert (life[:6] == life[0]).all() and (life[6:10] == life[6]).all()
        assert (life[10] != life[9]).any()
        lost = (np.arange(16) + offset)[:, None] % 4 == np.arange(4)
        assert np.abs(life[6][lost] - 127.5).max() < 1  # logit 0
        np.testing.assert_array_equal(life[6][~lost], life[5][~lost])


# ---- What the pictures show: a model whose numbers are known ------------------------------------

Z = np.asarray(prior_samples(5, 32, 4))
IMAGES = unpack(load("bundled").test[:8])
MEANS = np.asarray(IMAGES).mean(axis=(1, 2, 3))


def known_model(by=0.1):
    """A model whose cell at step t is z with t·by added, and whose mean of q(z|x) is that of x."""

    def encode(params, x):
        mean = jnp.broadcast_to(x.mean(axis=(1, 2, 3))[:, None], (len(x), 4))
        return mean, mean

    def initial_cells(z):
        return jnp.broadcast_to(z[:, None, None], (len(z), 32, 32, 4))

    def grow(params, z, channels=1):
        return [jnp.stack([initial_cells(z) + by * t for t in range(4)])[..., :channels]]

    def decode(params, z):
        return grow(params, z)[0][-1]

    def step(params, cells):
        return cells + by

    return Model(4, None, encode, decode, grow, 3, None, initial_cells, step)


def test_growth_begins_with_the_first_cells_and_ends_with_the_last():
    pages = frames(figures.growth_animated(known_model(), {}, None, 5), 2)
    assert len(pages) == 4 + 10
    for t, page in enumerate(pages):
        check_shades(page, Z[:16, 0].reshape(2, 8) + 0.1 * min(t, 3))


def test_interpolations_lead_on_straight_lines_from_each_sample_to_the_next():
    starts = Z[:8, :1] + 0.3
    ways = np.roll(starts, -1, axis=0) - starts
    [page] = frames(figures.interpolation(known_model(), {}, None, 5))
    check_shades(page, starts + np.arange(8) / 7 * ways)
    pages = frames(figures.interpolation_animated(known_model(), {}, None, 5), 2)
    assert len(pages) == 12
    for t, page in enumerate(pages):
        check_shades(page, (starts + t / 11 * ways).reshape(2, 4))


@pytest.mark.parametrize("grown", [3, 120])
def test_stability_goes_on_to_step_500_and_what_diverged_is_black(grown):
    model = known_model(0.01)._replace(steps=grown)
    steps = np.array([grown, 50, 100, 200, 350, 500])
    [page] = frames(figures.stability(model, {}, IMAGES, 0))
    check_shades(page, MEANS[:, None] + 0.01 * steps)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        lost = model._replace(step=lambda params, s, value=value: jnp.full_like(s, value))
        assert not frames(figures.stability(lost, {}, IMAGES, 0))[0].any()


def test_channels_are_those_of_the_grown_cells_each_in_its_own_range():
    ramp = jnp.linspace(-1, 1, 32)[:, None, None] * jnp.array([1.0, -2, 3, 0])

    def grow(params, z, channels=1):
        cells = jnp.broadcast_to(ramp, (len(z), 32, 32, 4))
        return [-cells[None], jnp.stack([-cells, cells])]

    [page] = frames(figures.channels(known_model()._replace(grow=grow), {}, IMAGES[:4], 0))
    up = np.linspace(0, 255, 32)
    np.testing.assert_allclose(page[..., 16], [[up, up[::-1], up, 0 * up]] * 4, atol=1)


@pytest.mark.parametrize("labels", [np.arange(36) % 4, None])
def test_the_examples_are_ten_of_each_class_and_their_mean(labels):
    x = np.uint8(glyphs.draw(36, seed=0)[0] > 0)
    bits = np.packbits(x.reshape(36, -1), axis=1)
    [page] = frames(figures.data_examples(Dataset("own", bits, bits, None, labels)), 2)
    labels = np.arange(36) % 10 if labels is None else labels
    for label, row in enumerate(page[..., 2:30, 2:30]):
        of_class = 255 * x[labels == label]
        wanted = np.round([*of_class, of_class.mean(axis=0)])
        np.testing.assert_array_equal(row[: len(wanted)], wanted)
