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

GROWTH = ["growth", "growth_animated", "interpolation_animated"]
NAMES = {
    "doubling": ["channels", "interpolation", *GROWTH],
    "nondoubling": ["channels", "growth", "recovery", "recovery_animated", "stability"],
    "baseline": ["interpolation"],
}
PICTURES = {f"{k}_{n}.png" for k in NAMES for n in ["reconstructions", "samples", *NAMES[k]]}
PICTURES |= {"data_examples.png"}
ALL = PICTURES | {"play.html", *(f"{kind}_arrays.npz" for kind in NAMES)}


def frames(content):
    """The frames of a PNG file, as grey levels: a list of uint8 [H, W]."""
    image, found = Image.open(io.BytesIO(content)), []
    for i in range(getattr(image, "n_frames", 1)):
        image.seek(i)
        found.append(np.asarray(image.convert("L")))
    return found


def tiles(page, scale=4):
    """The 32×32 images of a page of rows, each with a gap around it: uint8 [rows, columns, …]."""
    page = page[::scale, ::scale]
    rows, columns = (n // 34 for n in page.shape)
    return page[2:, 2:].reshape(rows, 34, columns, 34).swapaxes(1, 2)[..., :32, :32]


def shade(logits):
    """The grey level of a logit."""
    return 255 / (1 + np.exp(-np.asarray(logits, float)))


def check_tiles(page, logits, scale=4):
    """Each image has one grey level, that of its logit."""
    found = tiles(page, scale)
    assert np.ptp(found, axis=(2, 3)).max() == 0
    np.testing.assert_allclose(found[..., 0, 0], shade(logits), atol=0.51)


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
            origin = f"packaged_{kind}.npz (packaged model)"
            if kind == "nondoubling":
                origin = store.checkpoint(tmp_path, update)
                assert all(np.all(x == update) for x in jax.tree.leaves(shown[kind].params))
            assert line == f"{kind}: {origin}, bundled images"


def grow(params, z, channels=1):
    """As that of the doubling model, but its cells take steps that change nothing. The true one
    would be compiled for each of its many pictures, on all of its grids."""
    grids = [jnp.broadcast_to(z[:, None, None], (2, len(z), n, n, 4)) for n in (2, 4, 8, 16, 32)]
    return [grid[..., :channels] for grid in grids]


@pytest.fixture(scope="module", params=["tiny", pytest.param("packaged", marks=pytest.mark.slow)])
def drawn(tmp_path_factory, request):
    """The figures of the packaged models, or of tiny ones, and what was said of them, where the
    packages of the extra `report` are not installed."""
    workdir, out = tmp_path_factory.mktemp("figures"), io.StringIO()
    run = runs.open_run(tiny.committed("small_doubling"), workdir, "figures")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.delitem(sys.modules, "vnca.report.plots", raising=False)
        tiny.without_network(patch)
        if request.param == "tiny":
            stack.enter_context(tiny.fast_compilation())
            models, bundled = {}, load("bundled")
            for kind in KINDS:
                packaged = tiny.in_place_of_packaged(kind)
                if kind == "doubling":
                    decode = lambda params, z: grow(params, z)[-1][-1]  # noqa: E731
                    model = packaged.model._replace(grow=grow, decode=decode)
                    packaged = packaged._replace(model=model)
                models[kind] = trained.TrainedModel(*packaged[:3], bundled, packaged.curve, "x.npz")
            patch.setattr(figures, "trained_models", lambda run: models)
        stack.enter_context(contextlib.redirect_stdout(out))
        figures.figures(run)
    return workdir / "figures", out.getvalue().splitlines()


def test_without_the_extra_packages_every_other_figure_is_there(drawn):
    folder, lines = drawn
    assert {path.name for path in folder.iterdir()} == ALL
    assert all(any(f"{name}  " in line for line in lines) for name in ALL)
    for name in PICTURES:
        count = len(frames((folder / name).read_bytes()))
        assert count > 5 if "animated" in name else count == 1
    assert lines[-1].startswith("no plots: matplotlib is missing")
    assert "python -m pip install -e '.[report]'" in lines[-1]


@pytest.mark.parametrize("kind", NAMES)
def test_the_arrays_are_what_the_pictures_of_samples_and_reconstructions_show(drawn, kind):
    folder, _ = drawn
    arrays = np.load(folder / f"{kind}_arrays.npz")
    test = load("bundled").test
    np.testing.assert_array_equal(arrays["images"], unpack(test[fixed_shuffle(32, 10_000)])[..., 0])
    names = "samples", "reconstructions"
    found, pairs = (tiles(frames((folder / f"{kind}_{n}.png").read_bytes())[0]) for n in names)
    for name, shown in (
        ("samples", found),
        ("reconstructions", pairs[1::2]),
        ("images", pairs[::2]),
    ):
        wanted = np.round(255 * arrays[name].astype(np.float32))
        np.testing.assert_array_equal(shown.reshape(32, 32, 32), wanted)


def test_the_animation_of_recovery_loses_two_quadrants_and_takes_32_steps_after_each(drawn):
    content = (drawn[0] / "nondoubling_recovery_animated.png").read_bytes()
    pages = np.stack([tiles(page, 2) for page in frames(content)]).astype(int)
    assert pages.shape == (2 * (6 + 4 + 32), 2, 8, 32, 32)
    pages = pages.reshape(-1, 16, 2, 16, 2, 16).swapaxes(3, 4)  # quadrants
    for start, offset in ((0, 0), (42, 1)):
        assert np.ptp(pages[start : start + 6], axis=0).max() == 0
        assert np.ptp(pages[start + 6 : start + 10], axis=0).max() == 0
        for i in range(16):
            lost = (i + offset) % 4
            before, after = (pages[start + t, i].reshape(4, 16, 16) for t in (5, 6))
            assert np.abs(after[lost] - 127.5).max() < 1  # logit 0
            np.testing.assert_array_equal(*(np.delete(x, lost, 0) for x in (before, after)))
        assert (pages[start + 10] != pages[start + 9]).any()


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
    pages = frames(figures.growth_animated(known_model(), {}, None, 5))
    assert len(pages) == 4 + 10
    for t, page in enumerate(pages):
        check_tiles(page, Z[:16, 0].reshape(2, 8) + 0.1 * min(t, 3), 2)


def test_interpolations_lead_on_straight_lines_from_each_sample_to_the_next():
    starts = Z[:8, :1] + 0.3
    ends = np.roll(starts, -1, axis=0)
    [page] = frames(figures.interpolation(known_model(), {}, None, 5))
    check_tiles(page, starts + np.arange(8) / 7 * (ends - starts))
    pages = frames(figures.interpolation_animated(known_model(), {}, None, 5))
    assert len(pages) == 12
    for t, page in enumerate(pages):
        check_tiles(page, (starts + t / 11 * (ends - starts)).reshape(2, 4), 2)


@pytest.mark.parametrize("grown", [3, 120])
def test_stability_goes_on_to_step_500_and_what_diverged_is_black(grown):
    model = known_model(0.01)._replace(steps=grown)
    later = [t for t in (50, 100, 200, 350, 500) if t > grown]
    [page] = frames(figures.stability(model, {}, IMAGES, 0))
    check_tiles(page, MEANS[:, None] + 0.01 * np.array([grown, *later]))
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        lost = model._replace(step=lambda params, s, value=value: jnp.full_like(s, value))
        assert not tiles(frames(figures.stability(lost, {}, IMAGES, 0))[0]).any()


def test_channels_are_those_of_the_grown_cells_each_in_its_own_range():
    ramp = jnp.linspace(0, 1, 32)[:, None, None] * jnp.array([1.0, -2, 3, 0])

    def grow(params, z, channels=1):
        before, after = (jnp.broadcast_to(t * ramp, (len(z), 32, 32, 4)) for t in (-1, 1))
        return [before[None], jnp.stack([before, after])]

    [page] = frames(figures.channels(known_model()._replace(grow=grow), {}, IMAGES[:4], 0))
    up = np.round(255 * np.linspace(0, 1, 32))
    wanted = np.stack([up, up[::-1], up, 0 * up])
    np.testing.assert_allclose(tiles(page)[..., 16], np.tile(wanted, (4, 1, 1)), atol=1)


@pytest.mark.parametrize("labels", [np.arange(36) % 4, None])
def test_the_examples_are_ten_of_each_class_and_their_mean(labels):
    x = glyphs.draw(36, seed=0)[0] > 0
    bits = np.packbits(x.reshape(36, -1), axis=1)
    [page] = frames(figures.data_examples(Dataset("own", bits, bits, None, labels)))
    shown = tiles(page, 2)[..., 2:30, 2:30]
    labels = np.arange(36) % 10 if labels is None else labels
    for label, row in enumerate(shown):
        of_class = 255 * x[labels == label]
        np.testing.assert_array_equal(row[: len(of_class)], of_class)
        np.testing.assert_array_equal(row[len(of_class)], np.round(of_class.mean(axis=0)))
