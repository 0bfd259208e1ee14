"""The plots: what they draw is what is there, and what is not there they do not."""

import io
import json

import glyphs
import jax
import numpy as np
import pytest
import reference
import tiny
from matplotlib.image import imread

from vnca import models
from vnca.images import unpack
from vnca.program import data
from vnca.program.data import Dataset
from vnca.program.order import fixed_shuffle
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
        assert axes.get_title() == f"{plots.NAMES[kind]}, bundled"


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


def test_the_probe_says_how_often_it_is_right_and_has_a_row_for_each_class(subjects, monkeypatch):
    labels = BUNDLED.test_labels[fixed_shuffle(80, 10_000)]
    read = np.where(np.arange(80) % 4 == 3, (labels + 1) % 10, labels)  # what the cells say
    read[:40] = labels[:40]

    def telling(subject, images, cells, shown):
        states = np.eye(10)[read].repeat(cells, 0).reshape(-1, cells, 10)
        return [("only", states, np.eye(10)[labels[sorted(shown), None, None]].repeat(32, 1))]

    monkeypatch.setattr(plots, "sample_cells", telling)
    figure = plots.probe(subjects, images=40, cells=3)
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_xticklabels()] == ["only\n75%", "grown"]
        rows = [int(text.get_text()) for text in axes.get_yticklabels()]
        assert rows == sorted(set(labels[40:]))
        found = axes.images[0].get_array()[17 :: 32 + 2, 17]
        np.testing.assert_allclose(found, plots.class_colours(10)[rows])


def test_the_curves_of_the_training_are_those_of_the_models(subjects):
    raised = subjects["baseline"].curve + [0, 7]
    subjects = subjects | {"baseline": subjects["baseline"]._replace(curve=raised)}
    (axes,) = plots.training(subjects).axes
    for line, kind in zip(axes.lines, packaged.KINDS, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), subjects[kind].curve)
        assert line.get_label() == plots.model_name(subjects[kind])


def test_the_charts_count_images_and_white_pixels_and_the_examples_have_their_mean():
    images, labels = glyphs.draw(36, seed=0)  # four classes, nine of each
    bits = np.packbits((images > 0).reshape(36, -1), axis=1)
    own = Dataset("own", bits[labels < 3], bits, labels[labels < 3], labels)
    counts, ones = plots.charts(own).axes
    heights = [[bar.get_height() for bar in bars] for bars in counts.containers]
    assert heights == [[9, 9, 9], [9, 9, 9, 9]]
    assert [text.get_text() for text in counts.get_legend().texts] == ["training", "test"]
    medians = [np.median((images[labels == n] > 0).sum(axis=(1, 2))) for n in range(4)]
    middles = [line.get_ydata() for line in ones.lines if len(set(line.get_ydata())) == 1]
    assert all(any((y == m).all() for y in middles) for m in medians)
    figure = plots.examples(own)
    for label in range(4):
        row = figure.axes[11 * label : 11 * label + 11]
        mean = (images[labels == label] > 0).mean(axis=0)
        np.testing.assert_allclose(row[10].images[0].get_array()[2:30, 2:30], mean, atol=1e-6)


def curve(first):
    """A mean and a deviation at each of 501 steps, which differ from those of another `first`."""
    return (first + np.array([[t, 1 + 0.01 * t] for t in range(501)])).tolist()


STUDY = {
    "recovery": {
        size: {"wrong": curve(i), "log_px": curve(-700 - i)} for i, size in enumerate(["0", "16"])
    },
    "stability": {"wrong": curve(0.5), "log_px": curve(-600)},
    "iwelbo": {
        kind: {
            "samples": [1, 2, 4],
            "iwelbo": [-93 - i, -92 - i, -91 - i],
            "digits": [[-90 - i - n, 1 + i + n / 10] for n in range(10)],
        }
        for i, kind in enumerate(packaged.KINDS)
    },
    "names": {"doubling": "Grower", "nondoubling": "Healer", "baseline": "Decoder"},
    "models": {kind: ["", f"images of {kind}"] for kind in packaged.KINDS},
}


def check_band(band, line, values):
    """A line is the mean, and the band around it has one deviation to each side."""
    mean, deviation = np.array(values).T
    np.testing.assert_allclose(line.get_ydata(), mean)
    (path,) = band.get_paths()
    for edge in (mean - deviation, mean + deviation):
        steps = np.stack([np.arange(len(mean)), edge], axis=1)
        assert all(np.isclose(path.vertices, point).all(axis=1).any() for point in steps[::50])


def test_what_recovery_and_stability_show_is_what_was_measured():
    for draw, names in (
        (plots.recovery_measured, {"0": "no damage", "16": "16×16 cells damaged"}),
        (plots.stability_measured, {None: None}),
    ):
        figure = draw(STUDY)
        for axes, term in zip(figure.axes, ("wrong", "log_px"), strict=True):
            assert axes.get_ylabel().startswith({"wrong": "wrong pixels", "log_px": "log p"}[term])
            shown = zip(axes.collections, axes.lines, names.items(), strict=True)
            for band, line, (size, name) in shown:
                values = STUDY["recovery"][size] if size else STUDY["stability"]
                check_band(band, line, values[term])
                assert name in (None, line.get_label())


def test_what_the_bounds_show_is_what_was_measured():
    (axes,) = plots.samples_measured(STUDY).axes
    for line, kind in zip(axes.lines, packaged.KINDS, strict=True):
        bounds = STUDY["iwelbo"][kind]
        np.testing.assert_array_equal(line.get_xdata(), bounds["samples"])
        np.testing.assert_array_equal(line.get_ydata(), bounds["iwelbo"])
        assert line.get_label() == f"{STUDY['names'][kind]}, images of {kind}"
    (axes,) = plots.digits_measured(STUDY).axes
    bars = [found for found in axes.containers if hasattr(found, "patches")]
    for found, kind in zip(bars, ("baseline", "doubling"), strict=True):
        digits = np.array(STUDY["iwelbo"][kind]["digits"])
        np.testing.assert_allclose([bar.get_height() for bar in found], digits[:, 0])
        (lines,) = found.errorbar[2]
        np.testing.assert_allclose(np.ptp(lines.get_segments(), axis=1)[:, 1], 2 * digits[:, 1])
        assert found.get_label() == f"{STUDY['names'][kind]}, images of {kind}"


def test_a_users_matplotlibrc_changes_no_plot():
    from matplotlib import rc_context

    wanted = plots.png(plots.samples_measured, STUDY)
    with rc_context({"figure.autolayout": True, "lines.linewidth": 9, "font.family": "monospace"}):
        assert plots.png(plots.samples_measured, STUDY) == wanted


@pytest.mark.slow
def test_the_published_set_without_training_labels_has_its_charts():
    for draw in (plots.charts, plots.examples):
        page = plots.png(draw, BUNDLED._replace(train_labels=None))
        assert imread(io.BytesIO(page)).std() > 0.1
