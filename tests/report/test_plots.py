"""The plots: what they draw is what is there, and what is not there they do not."""

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from vnca.likelihoods import as_floats, binomial
from vnca.program import data
from vnca.program.data import Dataset
from vnca.program.order import fixed_shuffle
from vnca.report.trained import TrainedModel, fingerprints

plots = pytest.importorskip("vnca.report.plots")
from matplotlib import rc_context  # noqa: E402

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BUNDLED = data.load("bundled")
CURVE = np.arange(200.0).reshape(100, 2)
NAMES = "doubling", "healing", "baseline"  # as packaged
SIZES = 0, 4, 8, 12, 16, 20  # of the squares that are lost


@pytest.fixture(scope="module")
def models():
    """Tiny models in place of those that are packaged."""
    found = {}
    for i, name in enumerate(NAMES):
        packaged = tiny.in_place_of_packaged(name)
        found[name] = TrainedModel(*packaged[:3], BUNDLED, CURVE + [0, i], "x.npz")
    return found


def own(images, labels, train_labels=None):
    """A data set of these images, uint8 [N, 32, 32] of 0 and 1."""
    bits = np.packbits(images.reshape(len(images), -1), axis=1)
    return Dataset("own", bits[:9], bits, train_labels, labels)


# ---- The models ----------------------------------------------------------------------------------


def test_the_curves_of_the_training_are_those_of_the_models(models):
    (axes,) = plots.training(models).axes
    for line, name in zip(axes.lines, NAMES, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), models[name].curve)
        assert line.get_label() == name


class Places:
    """In place of t-SNE: the first two numbers of each code."""

    def __init__(self, **_):
        pass

    def fit_transform(self, codes):
        return codes[:, :2]


def test_tsne_colours_are_the_true_labels_of_the_encoded_images(models, monkeypatch):
    monkeypatch.setattr(plots, "TSNE", Places)
    order = fixed_shuffle(50, 10_000)
    names = "baseline", "doubling"
    figure = plots.tsne({name: models[name] for name in names}, images=50)
    for axes, name in zip(figure.axes, names, strict=True):
        (dots,) = axes.collections
        assert axes.get_title() == f"{name}, bundled"
        np.testing.assert_array_equal(dots.get_array(), BUNDLED.test_labels[order])
        _, model, params, *_ = models[name]
        x = as_floats(tiny.DIGITS, BUNDLED.test[order])
        codes, _ = jax.jit(model.encode)(params, x)
        np.testing.assert_allclose(dots.get_offsets(), codes[:, :2], rtol=1e-6)
        legend = axes.get_legend()
        for words, handle in zip(legend.texts, legend.legend_handles, strict=True):
            label = int(re.sub(r"\D", "", words.get_text()))
            np.testing.assert_allclose(handle.get_color()[:3], plots.COLOURS[label])


MOMENTS = {  # titles; and for each step of each stage of the growth, 0 where all cells are 0
    "doubling": (
        ["z\n50%", "2×2\n50%", "4×4\n50%", "8×8\n50%", "16×16\n50%", "32×32\n50%"],
        [[1, 1]] + [[0, 1]] * 4,
    ),
    "mine": (["step 0\n50%", "step 1\n75%", "step 2\n50%"], [[1, 0, 1]]),
}
COLOURS = {"doubling": tiny.DIGITS, "mine": binomial(32, 3, 15)}


def test_the_probe_reads_cells_of_its_moments_and_is_scored_on_other_images(models):
    # An image tells its class, 0 or 1, by one white pixel. In the second half many tell another.
    order = fixed_shuffle(80, 80)
    images, labels = np.zeros((80, 32, 32), np.uint8), np.zeros(80, int)
    images[order, 2, 2 + np.repeat([0, 1, 0, 1], [5, 35, 30, 10])] = 1
    labels[order] = np.repeat([0, 1, 0, 1], [5, 35, 10, 30])

    def telling(name):
        """A model whose cells are what the image tells, or 0."""

        def encode(params, x):
            return jnp.tile(x[:, 2, None, None, 2:4, 0], 2), 0

        def grow(params, codes, channels):
            """A stage's grid has one cell, four, …"""
            return [
                jnp.stack([codes.repeat(2 << k, 1).repeat(2 << k, 2) * seen for seen in steps])
                for k, steps in enumerate(MOMENTS[name][1])
            ]

        likelihood = COLOURS[name]
        model = models["doubling"].model._replace(encode=encode, grow=grow, likelihood=likelihood)
        subject = own(images, labels)
        if name == "mine":  # with the same in all colours
            numbers = 15 * images[..., None].repeat(3, axis=-1).reshape(80, -1)
            subject = subject._replace(test=numbers)
        return models["doubling"]._replace(model=model, data=subject)

    figure = plots.probe({name: telling(name) for name in MOMENTS}, images=40, cells=3)
    for part, (name, (titles, _)) in zip(figure.subfigs, MOMENTS.items(), strict=True):
        assert part.get_suptitle().startswith(f"{name}: ")
        assert "75% of the test images are of the most frequent class" in part.get_suptitle()
        assert [axes.get_title() for axes in part.axes[: len(titles)]] == titles
        rows = [axes for axes in part.axes if axes.get_ylabel()]
        for label, axes in zip((0, 1), rows, strict=True):  # the first of each tells 0
            assert axes.get_ylabel() == str(label)
            assert (axes.yaxis.label.get_color() == plots.COLOURS[label]).all()
            assert (axes.images[0].get_array() == plots.COLOURS[0]).all()
        grown = part.axes[len(titles)].images[0].get_array()  # of cells (1, 0, 1, 0)
        one, half = 1 / (1 + np.exp(-1)), 0.5
        np.testing.assert_allclose(grown[0, 0], one if name == "doubling" else [one, half, one])


# ---- The data, and what is not there -------------------------------------------------------------


@pytest.mark.parametrize(("colours", "levels"), [(1, 1), (3, 15)])
def test_the_charts_count_images_and_how_bright_they_are(models, colours, levels):
    random = np.random.RandomState(0)
    images = random.randint(levels + 1, size=(40, 32, 32, colours), dtype=np.uint8)
    subject = own(images, np.arange(40) % 4, train_labels=np.arange(9) % 3)
    if levels > 1:
        subject = subject._replace(
            test=images.reshape(40, -1), class_names=("a", "b", "hat", "long hair")
        )
    model = models["doubling"].model._replace(likelihood=binomial(32, colours, levels))
    trained = models["doubling"]._replace(model=model, data=subject)
    counts, brightness = plots.data_charts({"doubling": trained}).axes
    heights = [[bar.get_height() for bar in bars] for bars in counts.containers]
    classes = 10 if levels == 1 else 4
    wanted = [[3] * 3 + [0] * 7, [10] * 4 + [0] * 6]
    assert heights == [of_set[:classes] for of_set in wanted]
    for ax in (counts, brightness):
        named = [label.get_text() for label in ax.get_xticklabels()]
        assert named == (list("0123456789") if levels == 1 else ["a", "b", "hat", "long hair"])
    means = images.mean(axis=(1, 2, 3)) / levels
    drawn = [line.get_ydata() for line in brightness.lines]
    for n in range(4):
        assert any(np.allclose(y, np.median(means[n::4]), rtol=1e-5) for y in drawn)


@pytest.mark.parametrize(
    "labels, left",
    [
        (None, ["data_charts", "tsne", "probe"]),
        (np.arange(40), ["data_charts", "tsne", "probe"]),
        pytest.param(np.zeros(40, int), ["tsne", "probe"], marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_drawn_is_left_out_with_a_line_each(
    models, tmp_path, capsys, monkeypatch, labels, left
):
    monkeypatch.setattr(plots, "TSNE", Places)
    images = own(np.zeros((40, 1024), np.uint8), labels)  # whose codes are equal
    shown = models | {"doubling": models["doubling"]._replace(data=images)}
    run = SimpleNamespace(data=images, workdir=tmp_path)
    drawn = [name for name, _, _ in plots.draw_all(shown, run)]
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    left = left + ["recovery_measured", "stability_measured", "samples_measured", "digits_measured"]
    assert said == [f"no {name}.png" for name in left]
    assert len(drawn) == len(plots.PLOTS) - len(left)


def test_a_plot_shows_the_first_models_that_can_do_what_it_shows(models):
    def chosen(can):
        """What is shown of a run whose model, of a name of one's own, can do what this one can."""
        of_run = {"mine": models[can], **models}
        names = {draw.__name__: list(choose(of_run)) for draw, choose in plots.PLOTS.items()}
        assert names.pop("training") == names.pop("samples_measured") == ["mine", *NAMES]
        assert names.pop("data_charts") == ["mine"]
        assert names.pop("digits_measured") == names["tsne"]
        assert names.pop("stability_measured") == names["recovery_measured"]
        return list(names.values())  # of tsne, probe and recovery_measured

    assert chosen("doubling") == [["baseline", "mine"], ["mine", "healing"], ["healing"]]
    assert chosen("healing") == [["baseline", "mine"], ["doubling", "mine"], ["mine"]]
    assert chosen("baseline") == [["mine", "doubling"], ["doubling", "healing"], ["healing"]]


# ---- The measurements ----------------------------------------------------------------------------


def curves(first):
    """Means and deviations at each of 501 steps, which differ from those of another `first`."""
    steps = np.arange(501)
    wrong = np.transpose([first + steps, 1 + 0.01 * steps])
    return {"wrong": wrong.tolist(), "log_px": (wrong - [700, 0]).tolist()}


def study_of(models):
    """A study of models, with the keys of study.json."""
    bounds = {
        name: {
            "samples": [1, 2, 4],
            "iwelbo": [-93 - i, -92, -91],
            "stderr": 1,
            "digits": [[-90 - i, 1], [-80, 2 + i], [None, None]],
        }
        for i, name in enumerate(models)
    }
    recovery = {"healing": {str(size): curves(size) for size in SIZES}}
    measured = {"recovery": recovery, "stability": {"healing": curves(2)}, "iwelbo": bounds}
    packaged = json.loads(plots.STUDY.read_text())
    return packaged | {"models": fingerprints(models), **measured}


def test_measurements_are_drawn_of_the_models_that_they_are_of(models, tmp_path, monkeypatch):
    measured = {draw: plots.PLOTS[draw] for draw in plots.MEASURED}
    monkeypatch.setattr(plots, "PLOTS", measured)
    run = SimpleNamespace(data=BUNDLED, workdir=tmp_path)
    study = study_of(models)

    def drawn(**changed):
        (tmp_path / "study.json").write_text(json.dumps(study | changed))
        return [name.partition("_")[0] for name, _, _ in plots.draw_all(models, run)]

    names = ["recovery", "stability", "samples", "digits"]
    assert drawn() == names
    trained_on = study["models"] | {"doubling": ["", "bundled"]}
    assert drawn(models=trained_on) == names[:2]
    unlabelled = {name: of | {"digits": None} for name, of in study["iwelbo"].items()}
    assert drawn(iwelbo=unlabelled) == names[:3]
    (tmp_path / "study.json").write_text("{}")
    assert not [*plots.draw_all(models, run)]


def test_a_study_that_is_damaged_or_lacks_a_key_is_not_drawn_but_that_of_the_package_is(
    models, tmp_path, monkeypatch
):
    study, path = study_of(models), tmp_path / "study.json"
    recovery, bounds = study["recovery"]["healing"]["0"], {"healing": {"samples": [1]}}
    spoilt = [
        json.dumps(study | changed)
        for changed in (
            {"recovery": recovery},
            {"recovery": {"healing": recovery}},
            {"stability": {}},
            {"iwelbo": study["iwelbo"] | bounds},
        )
    ]
    healing = {"healing": models["healing"]}
    for text in *spoilt, "[]", json.dumps(study)[:-9]:
        path.write_text(text)
        with pytest.raises(ValueError, match="measure healing first, with --mode=study"):
            plots.find_study(healing, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(plots, "STUDY", tmp_path / "packaged.json")
            plots.STUDY.write_text(json.dumps(study))
            assert plots.find_study(models, tmp_path).items() >= study.items()
            plots.STUDY.write_text(json.dumps(study)[:-9])
            with pytest.raises(ValueError, match=f"{plots.STUDY}: .*; reinstall the package"):
                plots.find_study(models, tmp_path)


def test_what_recovery_shows_is_what_was_measured(models):
    study = study_of(models) | {"names": {"healing": "a"}, "wrong": "wrong pixels (…)"}
    labels = "no damage", *(f"{size}×{size} cells damaged" for size in SIZES[1:])
    measured = study["recovery"]["healing"].values()
    for axes, term in zip(plots.recovery_measured(study).axes, ("wrong", "log_px"), strict=True):
        parts = zip(axes.collections, axes.lines, measured, labels, strict=True)
        for band, line, curves, label in parts:
            mean, deviation = np.transpose(curves[term])
            np.testing.assert_allclose(line.get_ydata(), mean)
            edges = band.get_paths()[0].vertices[:, 1]
            ends = [np.min(mean - deviation), np.max(mean + deviation)]
            np.testing.assert_allclose([edges.min(), edges.max()], ends)
            assert line.get_label() == label


@pytest.mark.parametrize("name", ["healing", "mine"])
def test_a_study_of_larger_squares_on_a_larger_grid_is_drawn(models, tmp_path, name):
    subject = {name: models["healing"]}
    study = study_of(models | subject)
    study["stability"][name] = curves(2)
    study["recovery"][name] = {str(2 * size): curves(size) for size in SIZES}
    (tmp_path / "study.json").write_text(json.dumps(study))
    _, axes = plots.recovery_measured(plots.find_study(subject, tmp_path)).axes
    labels = [line.get_label() for line in axes.lines]
    assert labels[:2] == ["no damage", "8×8 cells damaged"]


def test_what_the_bounds_show_is_what_was_measured(models):
    names = {"baseline": "a", "doubling": "b"}
    keys = {"names": names, "classes": list("ABCDEFGHIJ"), "likelihood": tiny.DIGITS}
    study = study_of(models) | keys
    [by_samples] = plots.samples_measured(study).axes
    [by_class] = plots.digits_measured(study).axes
    bars = by_class.containers[1::2]  # each after its error bars
    for line, found, name in zip(by_samples.lines, bars, study["names"], strict=True):
        bounds = study["iwelbo"][name]
        np.testing.assert_array_equal(line.get_xydata().T, [bounds["samples"], bounds["iwelbo"]])
        mean, error = np.array(bounds["digits"], float).T
        np.testing.assert_allclose([bar.get_height() for bar in found], mean)
        ends = found.errorbar[2][0].get_segments()[:-1]
        np.testing.assert_allclose([np.ptp(end[:, 1]) for end in ends], 2 * error[:-1])
        assert line.get_label() == found.get_label() == study["names"][name]


def test_bounds_of_colours_have_an_axis_of_bits_per_dimension(models):
    likelihood = binomial(16, 3, 16)
    model = models["doubling"].model._replace(likelihood=likelihood)
    figure = plots.training({"mine": models["doubling"]._replace(model=model)})
    figure.draw_without_rendering()  # which places the second axis
    [axes] = figure.axes
    [bits] = axes.child_axes
    assert bits.get_ylabel() == "bits per dimension"
    nats = np.array(axes.get_ylim())
    np.testing.assert_allclose(bits.get_ylim(), nats / (768 * np.log(2)), rtol=1e-6)
    [digits] = plots.training(models).axes
    assert not digits.child_axes


def test_a_loss_with_another_weight_of_the_kl_is_not_called_the_elbo(models):
    config = ConfigDict(models["doubling"].config.to_dict())
    config.train.kl_weight = 0.1
    model = models["doubling"].model._replace(likelihood=binomial(16, 3, 16))
    weighted = models["doubling"]._replace(config=config, model=model)
    [axes] = plots.training({"mine": weighted}).axes
    assert axes.get_ylabel() == "loss, nats per image" and not axes.child_axes
    [published] = plots.training(models).axes
    assert published.get_ylabel() == "−ELBO, nats per image"


def test_a_users_matplotlibrc_changes_no_plot(models):
    study = study_of(models) | {"names": dict.fromkeys(NAMES, "name"), "likelihood": tiny.DIGITS}
    wanted = plots.png(plots.samples_measured, study)
    with rc_context({"lines.linewidth": 9}):
        assert plots.png(plots.samples_measured, study) == wanted
