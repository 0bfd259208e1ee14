"""The report of models that were trained on one's own images, with labels and without."""

import io
import json
import re

import glyphs
import numpy as np
import pytest
import tiny
from matplotlib.image import imread

from vnca.images import unpack
from vnca.program import VncaError, data
from vnca.report import figures, packaged, play, plots, study

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KINDS = {"doubling": 3, "nondoubling": 4, "baseline": 2}  # and the pictures that training draws


def own_data(count, labels=None):
    """A data set of glyphs with `count` test images, whose training images have no labels."""
    train, test = (
        np.packbits((glyphs.draw(n, seed)[0] > 0).reshape(n, -1), axis=1)
        for n, seed in ((9, 1), (count, 2))
    )
    labels = None if labels is None else np.array(labels, np.uint8)
    return data.Dataset("own", train, test, None, labels)


@pytest.fixture(scope="module")
def tiny_models():
    return {kind: tiny.in_place_of_packaged(kind) for kind in KINDS}


def trained(tiny_models, *kinds, dataset):
    """Tiny models of every kind. Those of these kinds are of one's own images."""
    bundled = data.load("bundled")
    return {
        kind: packaged.TrainedModel(
            m.config, m.model, m.params, dataset if kind in kinds else bundled,
            np.stack([np.arange(1, 101), np.linspace(200, 100, 100)], axis=1), "own.npz",
        )
        for kind, m in tiny_models.items()
    }  # fmt: skip


def is_picture(page):
    return imread(io.BytesIO(page)).std() > 0.05


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(np.arange(40) % 3, id="three"),
        pytest.param(100 + np.arange(40) % 14, id="fourteen", marks=pytest.mark.slow),
        pytest.param(np.r_[7, np.zeros(39)], id="one of its own", marks=pytest.mark.slow),
    ],
)
def test_the_plots_of_the_data_have_its_classes(labels):
    subject = own_data(40, labels)
    classes = np.unique(subject.test_labels)
    assert plots.classes_of(subject) == classes.tolist()
    figure = plots.charts(subject)
    for axes in figure.axes:
        assert axes.get_xlabel() == "class"
        np.testing.assert_array_equal(axes.get_xticks(), classes)
    figure = plots.examples(subject)
    assert len(figure.axes) == 11 * len(classes)
    shown = [axes for axes in figure.axes if axes.images]
    counts = [min(np.sum(subject.test_labels == label), 10) + 1 for label in classes]
    assert len(shown) == sum(counts)
    assert is_picture(plots.png(plots.examples, subject))
    assert is_picture(plots.png(plots.charts, subject))


def test_what_needs_labels_is_left_out_with_a_line_each(tiny_models, tmp_path, monkeypatch):
    def drawn(models):
        pages, lines = {}, []
        plots.draw_all(models, tmp_path, lambda n, png, _: pages.update({n: png}), lines.append)
        return pages.keys(), lines

    # The plots of what is known are in test_plots.py.
    monkeypatch.setattr(plots, "tsne", lambda models: plots.classes_of(models["doubling"].data))
    monkeypatch.setattr(plots, "probe", plots.tsne)
    models = trained(tiny_models, "doubling", dataset=own_data(40))
    identity = packaged.fingerprints(models)
    bound = {"samples": [1, 2], "iwelbo": [-99, -98], "digits": [[-90.0, 1.0]] * 10}
    result = {"models": identity, "recovery": {}, "stability": {}}
    result["iwelbo"] = dict.fromkeys(KINDS, bound) | {"doubling": bound | {"digits": None}}
    (tmp_path / "study.json").write_text(json.dumps(result))
    for name in ("recovery_measured", "stability_measured"):
        monkeypatch.setattr(plots, name, lambda _: plots.make_figure(1, 1, 1, 1)[0])
    names, lines = drawn(models)
    assert {"training", "samples_measured"} <= names
    assert sum("own have no labels" in line for line in lines) == 4
    [line] = [line for line in lines if line.startswith("no digits_measured.png")]
    assert models["doubling"].data.identity in line and "have no labels" in line
    for line in lines:
        assert line.startswith("no ") and "\n" not in line


def test_tsne_is_drawn_of_few_images_of_many_classes(tiny_models):
    models = trained(tiny_models, "doubling", dataset=own_data(12, np.arange(12) + 3))
    figure = plots.tsne(models, images=40)
    (dots,) = figure.axes[1].collections
    assert dots.get_array().max() == 14 and len(dots.get_offsets()) == 12
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, True]
    assert figure.axes[1].get_legend().get_title().get_text() == "class"
    with pytest.raises(plots.NotEnough, match="4 test images or more, and there are 3"):
        plots.tsne(trained(tiny_models, "doubling", dataset=own_data(3, [0, 1, 2])))


def test_the_probe_takes_half_of_few_images_and_their_classes(tiny_models, monkeypatch):
    def cells_of(subject, images, cells, shown):
        asked.append((len(images), shown))
        states = np.random.RandomState(0).normal(size=(len(images), cells, 2))
        return [("only", states, np.zeros((len(shown), 32, 32, 2)))]

    asked = []
    monkeypatch.setattr(plots, "sample_cells", cells_of)
    dataset = own_data(41, 60 + np.arange(41) % 3)
    figure = plots.probe(trained(tiny_models, "doubling", dataset=dataset), cells=3)
    assert [count for count, _ in asked] == [40, 800] and len(asked[0][1]) == 3
    assert all(n >= 20 for n in asked[0][1])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["60", "61", "62"]
    with pytest.raises(VncaError, match="two classes among 20"):
        plots.probe(trained(tiny_models, "doubling", dataset=own_data(40, np.zeros(40))))


def test_the_bound_is_split_by_the_classes_that_there_are():
    weights = np.random.RandomState(0).normal(size=(6, 2))
    dataset = own_data(6, [4, 4, 2, 4, 2, 2])
    found = study.summarize_bounds(weights, *study.known_labels(dataset, 6))
    assert len(found["digits"]) == 5 and found["digits"][0] == found["digits"][3] == [None, None]
    order = np.random.RandomState(0).permutation(6)
    each = np.logaddexp.reduce(weights, axis=1) - np.log(2)
    fours = each[dataset.test_labels[order] == 4]
    assert found["digits"][4][0] == pytest.approx(fours.mean(), abs=1e-3)
    assert study.summarize_bounds(weights, *study.known_labels(own_data(6), 6))["digits"] is None


def test_a_study_of_more_images_than_a_test_set_has_is_refused(tiny_models, tmp_path, monkeypatch):
    models = trained(tiny_models, "baseline", dataset=own_data(6))
    monkeypatch.setattr(study, "trained_models", lambda *_: models)
    config = tiny.config(eval__images=7)
    with pytest.raises(VncaError, match="config.eval.images=7: the set has no more than 6"):
        study.study(config, tmp_path, print)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pictures_of_training_are_drawn_of_one_test_image(tiny_models, kind):
    _, model, params, _ = tiny_models[kind]
    pages = figures.training_pictures(model, params, unpack(own_data(1).test), 0)
    assert len(pages) == KINDS[kind]
    assert all(is_picture(page) for page in pages.values())


def header(text):
    return json.loads(re.search(r'id="header">(.*?)</script>', text)[1])


def visible(text):
    """What a reader of the page sees, without its programs."""
    return re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S)


def test_the_page_shows_each_model_the_images_that_it_was_trained_on(tiny_models):
    labels = 20 + np.arange(40) % 3
    text = play.page(trained(tiny_models, "doubling", dataset=own_data(40, labels)))
    found = header(text)
    doubling, nondoubling = (found["models"][kind] for kind in ("doubling", "nondoubling"))
    assert (doubling["first"], doubling["end"]) == (0, 30)
    assert (nondoubling["first"], nondoubling["end"]) == (30, 130)
    assert doubling["names"] == ["class 20", "class 21", "class 22"]
    assert nondoubling["names"] == [f"digit {n}" for n in range(10)]
    assert found["labels"] == [n // 10 for n in [*range(30), *range(100)]]
    assert "MNIST" in found["origin"]  # of the other model's digits
    assert not re.search("digit", visible(text).replace('"digits', ""), re.I)


def test_the_page_of_images_without_labels_groups_them(tiny_models):
    models = trained(tiny_models, "doubling", "nondoubling", dataset=own_data(13))
    found = header(play.page(models))
    assert found["labels"] == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9]
    assert found["models"]["doubling"]["names"] == [f"group {n}" for n in range(10)]
    assert "MNIST" not in found["origin"]
    few = header(play.page(trained(tiny_models, "nondoubling", dataset=own_data(2))))
    assert few["models"]["nondoubling"]["names"] == ["group 0", "group 1"]
