"""The figures: each is drawn, is a picture, and shows what its name says."""

import contextlib
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_pictures import decode, decode_all

from configs import quickstart
from vnca.images import unpack
from vnca.models import Model
from vnca.program import VncaError, checkpoint, train
from vnca.program.data import load
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_method
from vnca.program.order import fixed_shuffle
from vnca.report import figures, packaged, plots, study
from vnca.report.pictures import prior_samples
from vnca.training import State

GROWTH = ["growth", "growth_animated"]
NAMES = {
    "doubling": ["channels", *GROWTH, "interpolation", "interpolation_animated"],
    "nondoubling": ["channels", "growth", "recovery", "recovery_animated", "stability"],
    "baseline": ["interpolation"],
}
ALL = {f"{k}_{n}.png" for k in NAMES for n in ["reconstructions", "samples", *NAMES[k]]}
ARRAYS = {f"{kind}_arrays.npz" for kind in NAMES}
ALL |= {"play.html", *ARRAYS}


@pytest.fixture
def no_plots(monkeypatch):
    """As where the packages of the extra `report` are not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_a_run_is_shown_and_the_other_models_come_with_the_package(tmp_path):
    config, lines = tiny.config("nondoubling"), []
    params = tiny.in_place_of_packaged("nondoubling").params
    state = State(params, {}, np.int32(1), pool=())
    checkpoint.save(tmp_path, state, fit_to_machine(config).to_dict(), 1)
    with tiny.fast_compilation():
        shown = packaged.trained_models(config, tmp_path, lines.append)
    assert jax.tree.all(jax.tree.map(np.array_equal, shown["nondoubling"].params, params))
    check_origins(lines, tmp_path, "nondoubling")


@pytest.mark.slow
def test_a_run_is_drawn_and_the_other_models_come_with_the_package(tmp_path, no_plots):
    kind, lines = "nondoubling", []
    config = tiny.config(kind, train__updates=1)
    with tiny.fast_compilation():
        train.train(config, tmp_path, lambda line: None, figures.training_pictures)
        figures.figures(config, tmp_path, lines.append)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == ALL
    check_origins(lines, tmp_path, kind)


def check_origins(lines, workdir, own):
    """Each of the first lines says which model comes from where."""
    for kind, line in zip(packaged.KINDS, lines[:3], strict=True):
        packed = f"packaged_{kind}.npz (packaged model)"
        origin = f"{workdir}/checkpoint_00000001.npz" if kind == own else packed
        assert line == f"{kind}: {origin}, bundled images"


def grow(params, z, channels=1):
    """As that of the doubling model, but its cells take steps that change nothing."""
    grids = [jnp.broadcast_to(z[:, None, None], (2, len(z), n, n, 4)) for n in (2, 4, 8, 16, 32)]
    return [grid[..., :channels] for grid in grids]


def drawn_soon(kind, make_method=None):
    """A tiny model in place of a packaged one. Of the doubling one there are eight pictures, and
    each would compile all that it does on all of its grids."""
    found = tiny.in_place_of_packaged(kind)
    if kind != "doubling":
        return found
    decode = lambda params, z: grow(params, z)[-1][-1]  # noqa: E731
    return found._replace(model=found.model._replace(grow=grow, decode=decode))


@pytest.fixture(scope="module", params=["tiny", pytest.param("packaged", marks=pytest.mark.slow)])
def drawn(tmp_path_factory, request):
    """The figures of the packaged models, or of tiny ones, and what was said of them."""
    workdir, lines = tmp_path_factory.mktemp("figures"), []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setitem(sys.modules, "matplotlib", None)
        tiny.without_network(patch)
        if request.param == "tiny":
            patch.setattr(packaged, "load", drawn_soon)
            stack.enter_context(tiny.fast_compilation())
        figures.figures(quickstart.get_config(), workdir, lines.append)
    return workdir / "figures", lines


def test_without_a_checkpoint_or_extra_packages_every_pixel_figure_is_there(drawn):
    folder, lines = drawn
    assert {path.name for path in folder.iterdir()} == ALL
    for name in ALL:
        assert any(f"{name}  " in line for line in lines)
    for name in ALL - ARRAYS - {"play.html"}:
        frames = decode_all((folder / name).read_bytes())
        assert len(frames) > 5 if "animated" in name else len(frames) == 1
    assert lines[-1].startswith("no plots: matplotlib is missing")
    assert "python -m pip install -e '.[report]'" in lines[-1]


def test_the_animation_of_recovery_loses_two_quadrants_and_takes_32_steps_after_each(drawn):
    path = drawn[0] / "nondoubling_recovery_animated.png"
    frames = np.stack(decode_all(path.read_bytes())).astype(float)
    assert len(frames) == 2 * (6 + 4 + 32)
    lost = [abs(frames[n] - 127.5) < 1 for n in (6, 48)]  # logit 0
    for mask, before in zip(lost, (frames[5], frames[47]), strict=True):
        changed = mask & (abs(before - 127.5) > 1)
        assert 0.1 < changed.mean() <= 0.25  # of the picture
    assert (lost[0] ^ lost[1]).mean() > 0.4  # what was lost first has grown again


def test_interpolations_are_straight_lines_from_each_sample_to_the_next():
    def decode(_, z):
        return jnp.broadcast_to(z[:, None, None, :1], (len(z), 32, 32, 1))

    model = SimpleNamespace(latent_size=3, decode=decode)
    found = np.asarray(figures.interpolate(model, None, 5, 6))[..., 0, 0].astype(float)
    logits = np.log(found / (1 - found))
    assert found.shape == (8, 6) and np.ptp(logits) > 1
    np.testing.assert_allclose(np.diff(logits, 2, axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(logits[:, -1], np.roll(logits[:, 0], -1), rtol=1e-4)


def test_the_picture_of_stability_has_the_steps_beyond_those_of_growth(monkeypatch):
    model = make_method(tiny.config("nondoubling", model__steps=120)).model
    params, shapes, sheet = model.init(jax.random.key(0)), [], figures.sheet
    monkeypatch.setattr(figures, "sheet", lambda rows: shapes.append(np.shape(rows)) or sheet(rows))
    figures.stability(model, params, unpack(load("bundled").test[:8]), 0)
    assert shapes == [(8, 4, 32, 32)]  # 120, 200, 350 and 500 steps


@pytest.mark.parametrize("module, mode", [(figures, "figures"), (study, "study")])
def test_the_checkpoint_that_is_named_is_the_one_that_is_shown(monkeypatch, tmp_path, module, mode):
    def named(*given):
        raise VncaError(f"it shows {given[-1]}")

    monkeypatch.setattr(module, "trained_models", named)
    with pytest.raises(VncaError, match="it shows 7"):
        getattr(module, mode)(quickstart.get_config(), tmp_path, print, which="7")


@pytest.mark.parametrize("kind", NAMES)
def test_the_arrays_are_what_the_pictures_of_samples_and_reconstructions_show(drawn, kind):
    with np.load(drawn[0] / f"{kind}_arrays.npz") as file:
        arrays = dict(file)
    assert {a.shape for a in arrays.values()} == {(32, 32, 32)}
    test = load("bundled").test
    shuffled = unpack(test[fixed_shuffle(32, len(test))])
    np.testing.assert_array_equal(arrays["images"], shuffled[..., 0])
    names = "samples", "reconstructions"
    pages = {n: decode((drawn[0] / f"{kind}_{n}.png").read_bytes())[::4, ::4] for n in names}
    for i in range(32):
        line, column = divmod(i, 8)
        for name, row in (("samples", line), ("reconstructions", 2 * line + 1)):
            shown = pages[name][2 + 34 * row :, 2 + 34 * column :][:32, :32]
            np.testing.assert_array_equal(shown, np.round(255 * arrays[name][i]))
        shown = pages["reconstructions"][2 + 68 * (i // 8) :, 2 + 34 * column :][:32, :32]
        np.testing.assert_array_equal(shown, 255 * arrays["images"][i])


# ---- What the pictures show: a model whose numbers are known ------------------------------------

Z = np.asarray(prior_samples(5, 32, 4))


@pytest.fixture(scope="module")
def known():
    """A model whose cell at step t is z with t added: a NumPy array tells what each picture has."""

    def encode(params, x):
        mean = jnp.broadcast_to(x.mean(axis=(1, 2, 3))[:, None], (len(x), 4))
        return mean, jnp.zeros_like(mean)

    def initial_cells(z):
        return jnp.broadcast_to(z[:, None, None], (len(z), 32, 32, 4))

    def grow(params, z, channels=1):
        cells = [initial_cells(z) + 0.1 * t for t in range(4)]
        return [jnp.stack(cells)[..., :channels]]

    return Model(
        4,
        init=lambda key: {},
        encode=encode,
        decode=lambda params, z: grow(params, z)[0][-1],
        grow=grow,
        steps=3,
        initial_cells=initial_cells,
        step=lambda params, s: s + 0.1,
        develop=None,
    )


def tiles(content, rows, columns):
    """The centre of each image in a picture of 32×32 images: [rows, columns], probabilities."""
    page = decode(content)[::4, ::4]
    assert page.shape == (34 * rows + 2, 34 * columns + 2)
    return page[18::34, 18::34] / 255


def shade(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, float)))


def check_tiles(content, logits):
    logits = np.asarray(logits)
    np.testing.assert_allclose(tiles(content, *logits.shape), shade(logits), atol=0.51 / 255)


def test_samples_are_of_the_prior_and_reconstructions_of_the_means(known):
    check_tiles(figures.samples(known, {}, None, 5), Z[:, 0].reshape(4, 8) + 0.3)
    images = unpack(load("bundled").test[:8])
    means = np.asarray(images).mean(axis=(1, 2, 3))
    found = tiles(figures.reconstructions(known, {}, images, 5), 2, 8)
    np.testing.assert_allclose(found[1], shade(means + 0.3), atol=0.51 / 255)


def test_growth_begins_with_the_first_cells_and_ends_with_the_last(known):
    z = prior_samples(5, 1, 4)[0, 0]
    check_tiles(figures.growth(known, {}, None, 5), [z + 0.1 * np.arange(4)])
    z = Z[:16, 0].reshape(2, 8)
    frames = decode_all(figures.growth_animated(known, {}, None, 5))
    assert len(frames) == 4 + 10
    for t, frame in enumerate(frames):
        found = frame[::2, ::2][18::34, 18::34] / 255
        np.testing.assert_allclose(found, shade(z + 0.1 * min(t, 3)), atol=0.51 / 255)


def test_stability_goes_on_for_as_many_steps_as_it_says_and_what_diverged_is_black(known):
    images = unpack(load("bundled").test[:8])
    slow = known._replace(step=lambda params, s: s + 0.01)
    steps = np.array([3, 50, 100, 200, 350, 500])
    means = np.asarray(images).mean(axis=(1, 2, 3))
    check_tiles(figures.stability(slow, {}, images, 0), means[:, None] + 0.01 * steps)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        lost = known._replace(step=lambda params, s, value=value: jnp.full_like(s, value))
        assert not tiles(figures.stability(lost, {}, images, 0), 8, 6).any()


def test_channels_are_those_of_the_grown_cells_each_in_its_own_range(known):
    ramp = jnp.linspace(0, 1, 32)[:, None, None] * jnp.array([1.0, -2, 3, 0])

    def grow(params, z, channels=1):
        before, after = (jnp.broadcast_to(t * ramp, (len(z), 32, 32, 4)) for t in (-1, 1))
        return [before[None], jnp.stack([before, after])]

    page = decode(
        figures.channels(known._replace(grow=grow), {}, unpack(load("bundled").test[:4]), 0)
    )
    page = page[::4, ::4]
    up = np.round(255 * np.linspace(0, 1, 32))
    for row in range(4):
        columns = [page[2 + 34 * row :, 18 + 34 * c][:32] for c in range(4)]
        for found, wanted in zip(columns, [up, up[::-1], up, 0 * up], strict=True):
            np.testing.assert_allclose(found, wanted, atol=1)


def test_a_row_of_interpolations_leads_from_one_sample_to_the_next(known):
    z = Z[:8, :1]
    weights = np.arange(8) / 7
    lines = z + weights * (np.roll(z, -1, 0) - z) + 0.3
    assert np.array_equal(prior_samples(5, 8, 4), Z[:8])
    check_tiles(figures.interpolation(known, {}, None, 5), lines)
    frames = decode_all(figures.interpolation_animated(known, {}, None, 5))
    assert len(frames) == 12
    for frame, logits in ((frames[0], lines[:, 0]), (frames[-1], lines[:, -1])):
        shown, wanted = np.unique(frame).astype(float), 255 * shade(logits)
        assert np.all(abs(shown[:, None] - wanted).min(axis=0) <= 1)


def test_a_plot_without_its_packages_is_an_error_that_names_the_extra(no_plots):
    with pytest.raises(VncaError, match=r"matplotlib is missing: .*\.\[report\]"):
        plots.png(plots.charts, None)


def test_the_damage_is_a_quarter_of_the_cells_and_no_more(drawn):
    # A row a digit: grown, damaged, and after more steps; each image fourfold, two pixels between.
    page = decode((drawn[0] / "nondoubling_recovery.png").read_bytes())[::4, ::4].astype(int)
    for i, corner in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)] * 2):
        grown, damaged = (page[2 + 34 * i :, 2 + 34 * j :][:32, :32] for j in (0, 1))
        hole = np.zeros((32, 32), bool)
        hole[corner[0] :, corner[1] :][:16, :16] = True
        assert np.abs(damaged[hole] - 127.5).max() < 1  # a logit of 0 is a probability of one half
        np.testing.assert_array_equal(damaged[~hole], grown[~hole])
