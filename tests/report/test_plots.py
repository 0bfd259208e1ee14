"""The plots: what they draw is what is there, and what is not there they do not."""

import io
import json

import jax
import numpy as np
import pytest
import reference
import tiny
from matplotlib.image import imread

from vnca import models
from vnca.images import unpack
from vnca.program import data
from vnca.report import packaged, plots

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BUNDLED = data.load("bundled")


@pytest.fixture(scope="module")
def subjects():
    """Tiny models of each kind, untrained, with the bundled digits."""
    return {
        kind: packaged.TrainedModel(
            config, model, jax.jit(model.init)(jax.random.key(0)), BUNDLED, curve, ""
        )
        for kind in packaged.KINDS
        for config in [tiny.config(kind)]
        for model in [models.make_model(config.model)]
        for curve in [np.stack([np.arange(1, 101), np.linspace(200, 100, 100)], axis=1)]
    }


def test_the_probe_never_sees_in_training_an_image_that_it_is_scored_on(subjects, monkeypatch):
    from sklearn import linear_model

    seen = {"fit": [], "score": []}

    class Reader(linear_model.LogisticRegression):
        def fit(self, x, y):
            seen["fit"].append(x)
            return super().fit(x, y)

        def score(self, x, y):
            seen["score"].append(x)
            return super().score(x, y)

    def numbered(subject, images, cells, shown):
        # Cells that say which image they are of.
        states = np.arange(len(images), dtype=float).repeat(cells).reshape(-1, cells, 1)
        return [("only", states, np.zeros((10, 32, 32, 1)))]

    monkeypatch.setattr(linear_model, "LogisticRegression", Reader)
    monkeypatch.setattr(plots, "sample_cells", numbered)
    plots.png(lambda of: plots.probe(of, images=40, cells=3), subjects)
    for fitted, scored in zip(seen["fit"], seen["score"], strict=True):
        assert not set(fitted.ravel()) & set(scored.ravel())
        assert len(set(fitted.ravel())) == len(set(scored.ravel())) == 40


@pytest.mark.parametrize(
    "kind, names",
    [
        ("doubling", ["z", "2×2", "4×4", "8×8", "16×16", "32×32"]),
        ("nondoubling", ["step 0", "step 1", "step 2"]),
    ],
)
def test_cells_are_those_of_the_growth(subjects, kind, names):
    subject, images = subjects[kind], unpack(BUNDLED.test[:25])
    params = reference.numbers_like(subject.params, 1, 0.2)  # with which steps change cells
    subject = subject._replace(params=params)
    found = plots.sample_cells(subject, images, 4, shown=[24, 13, 1])
    assert [name for name, _, _ in found] == names
    mean, _ = jax.jit(subject.model.encode)(subject.params, images)
    grow = jax.jit(subject.model.grow, static_argnums=2)
    stages = grow(subject.params, mean, None)
    grids = stages[0] if kind == "nondoubling" else [stages[0][0], *(s[-1] for s in stages)]
    for (_, some, whole), all_cells in zip(found, map(np.asarray, grids), strict=True):
        assert some.shape == (25, 4, 4)
        np.testing.assert_allclose(whole, all_cells[[1, 13, 24]], rtol=1e-4, atol=1e-5)
        for cells, grid in zip(some, all_cells, strict=True):
            near = np.isclose(grid.reshape(-1, 1, 4), cells, rtol=1e-4, atol=1e-5)
            assert near.all(axis=2).any(axis=0).all()


def test_tsne_colours_are_the_true_labels_of_the_encoded_images(subjects, monkeypatch):
    from sklearn import manifold

    class Places:
        def __init__(self, **_):
            pass

        def fit_transform(self, codes):
            return codes[:, :2]

    monkeypatch.setattr(manifold, "TSNE", Places)
    figure = plots.tsne(subjects, images=50)
    for axes, kind in zip(figure.axes, ("baseline", "doubling"), strict=True):
        (dots,) = axes.collections
        order = np.random.RandomState(0).permutation(10_000)[:50]
        np.testing.assert_array_equal(dots.get_array(), BUNDLED.test_labels[order])
        encode = jax.jit(subjects[kind].model.encode)
        mean, _ = encode(subjects[kind].params, unpack(BUNDLED.test[order]))
        np.testing.assert_allclose(dots.get_offsets(), mean[:, :2], rtol=1e-4, atol=1e-5)


def test_tsne_draws_codes_of_one_number(subjects, monkeypatch):
    monkeypatch.setattr(plots, "posterior_means", lambda *_: np.random.RandomState(0).rand(9, 1))
    figure = plots.tsne(subjects, images=9)
    assert all(np.isfinite(axes.collections[0].get_offsets()).all() for axes in figure.axes)
    monkeypatch.setattr(plots, "posterior_means", lambda *_: np.ones((9, 2)))  # it would crash
    with pytest.raises(plots.NotEnough, match="t-SNE needs latent vectors that differ"):
        plots.tsne(subjects, images=9)


def test_what_was_measured_is_drawn_of_the_models_that_it_was_measured_of(
    subjects, tmp_path, monkeypatch
):
    def drawn_here(draw, of, png=plots.png):  # the others are in other tests
        here = draw is plots.training or draw.__name__.endswith("_measured")
        return png(draw, of) if here else b""

    monkeypatch.setattr(plots, "png", drawn_here)
    lost = [[None, None]] * 2  # after which a digit has diverged
    curve = {"wrong": [[3.0, 1.0]] * 5, "log_px": [[-90.0, 9.0]] * 3 + lost}
    # Of few images, not every digit is there; and the doubling model was trained on since.
    bound = {
        "samples": [1, 2],
        "iwelbo": [-99, -98],
        "digits": [[-90.0, 1.0]] * 8 + [[None] * 2] * 2,
    }
    identity = packaged.fingerprints(subjects)
    study = {"recovery": {"0": curve, "16": curve}, "stability": curve}
    study |= {"iwelbo": dict.fromkeys(packaged.KINDS, bound), "models": identity | {"doubling": []}}
    (tmp_path / "study.json").write_text(json.dumps(study))

    def drawn():
        pages, lines = {}, []
        plots.draw_all(subjects, tmp_path, lambda n, png, _: pages.update({n: png}), lines.append)
        return {name: png for name, png in pages.items() if "measured" in name}, lines

    def names():
        with monkeypatch.context() as patch:
            patch.setattr(plots, "png", lambda draw, of: b"")  # half a second each
            found, lines = drawn()
        return found.keys(), lines

    found, lines = names()
    assert found == {"recovery_measured", "stability_measured"}
    assert sum("with --mode=study" in line for line in lines) == 2
    (tmp_path / "study.json").write_text(json.dumps(study | {"models": identity}))
    found, _ = drawn()
    assert len(found) == 4
    assert all(imread(io.BytesIO(png)).ndim == 3 for png in found.values())
    for damaged in ("[]", "{", '{"models": {}}'):
        (tmp_path / "study.json").write_text(damaged)
        assert names()[0] == set()


@pytest.mark.slow
def test_the_published_set_without_training_labels_has_its_charts():
    for draw in (plots.charts, plots.examples):
        page = plots.png(draw, BUNDLED._replace(train_labels=None))
        assert imread(io.BytesIO(page)).std() > 0.1
