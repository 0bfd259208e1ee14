"""The plots. They need matplotlib and scikit-learn, which the extra `report` installs, and which no
other module imports.

A new plot takes a function here and its name in PLOTS.
"""

import contextlib
import io
import json
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np
from matplotlib import colormaps, style
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vnca.likelihoods import as_floats, bits_per_dimension
from vnca.program.data import REINSTALL
from vnca.program.order import fixed_shuffle
from vnca.program.own import reading
from vnca.program.pictures import changed_in_words, shown
from vnca.program.stop import say
from vnca.report.trained import class_names, fingerprints, posterior_means

STUDY = Path(__file__).with_name("study.json")  # measured on the packaged models
COLOURS = colormaps["tab10"](range(10))[:, :3]  # of the classes
# What a study has of each model (None: something).
CURVES = {"wrong": None, "log_px": None}
BOUNDS = dict.fromkeys(("samples", "iwelbo", "stderr", "digits"))
STYLE = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 11,
}


def draw_all(models, run):
    """Draws each plot of the run's data and of the models, {name: trained.TrainedModel}, the run's
    first: yields the name of its file, the bytes of a PNG file, and its title. Of a plot that
    cannot be drawn, for lack of labels, images or measurements, one line says why.

    Plots of measurements need a study.json of the same models, in the workdir or in the package.
    """
    for draw, choose in PLOTS.items():
        name = f"{draw.__name__}.png"
        chosen = {model: models[model] for model in choose(models)}
        if not chosen:
            say(f"no {name}: there is no such model for these images")
            continue
        try:
            subject = find_study(chosen, run.workdir) if draw in MEASURED else chosen
            yield name, png(draw, subject), draw.__doc__
        except ValueError as fault:
            say(f"no {name}: {fault}")


def png(draw, subject):
    """The bytes of a PNG file of the figure draw(subject). `draw` is one of PLOTS."""
    content = io.BytesIO()
    # Without "default", the user's own matplotlibrc would change the plots. The probe does not
    # converge on cells that carry no information.
    quiet = warnings.catch_warnings(action="ignore", category=ConvergenceWarning)
    with style.context(["default", STYLE]), quiet:
        draw(subject).savefig(content, format="png", dpi=100)
    return content.getvalue()


def find_study(models, workdir):
    """The study in `workdir`, or else in the package. Three more keys say how a plot is to call
    things: "names", for each of these models, "wrong", and "classes", a list. The fourth is the
    "likelihood" of the models. Raises ValueError if
    neither is whole and of exactly these models."""
    takes_steps = [name for name, trained in models.items() if trained.model.step]
    whole = {  # what a study of these models has
        "models": {},
        "recovery": {name: {"0": CURVES} for name in takes_steps},
        "stability": dict.fromkeys(takes_steps, CURVES),
        "iwelbo": dict.fromkeys(models, BOUNDS),
    }
    whole = {section: parts for section, parts in whole.items() if parts or section == "models"}
    with reading(STUDY, REINSTALL, ValueError):
        studies = [json.loads(STUDY.read_text())]
    with contextlib.suppress(OSError, ValueError):  # it is missing or damaged
        studies.insert(0, json.loads((workdir / "study.json").read_text()))
    for study in studies:
        if has_keys(study, whole) and fingerprints(models).items() <= study["models"].items():
            names = {name: f"{name}, {trained.data.identity}" for name, trained in models.items()}
            likelihood, data = next((m.model.likelihood, m.data) for m in models.values())
            return study | {
                "names": names,
                "wrong": changed_in_words(likelihood, "wrong"),
                "classes": class_names(data, 256),
                "likelihood": likelihood,
            }
    raise ValueError(f"measure {' and '.join(models)} first, with --mode=study")


def has_keys(value, like):
    """Whether a value of JSON has every key of another one, at every depth."""
    if not isinstance(like, dict):
        return True
    return isinstance(value, dict) and all(
        key in value and has_keys(value[key], like[key]) for key in like
    )


def make_figure(rows, columns, width, height):
    """A figure of width×height inches, and its axes, an array [rows, columns]."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_image(axes, image):
    """Shows an image in 0…1, grey [H, W] or colour [H, W, 3], without ticks."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)


# Each function below that PLOTS names takes some models, {name: TrainedModel}, or a study of them,
# and returns a figure. Its docstring is the title.

# ---- The data ---------------------------------------------------------------------------------


def labels_of(data):
    """The labels of the test images, int [N], each 0…9. Raises ValueError if there are no such."""
    if data.test_labels is None or data.test_labels.max() >= len(COLOURS):
        raise ValueError(f"the test images of the data set {data.name} have no labels 0…9")
    return data.test_labels


def labelled(trained, count):
    """Up to `count` test images of the fixed shuffle, [B, H, W, colours], and their labels, int
    [B]."""
    data = trained.data
    indices = fixed_shuffle(count, len(data.test))
    return as_floats(trained.model.likelihood, data.test[indices]), labels_of(data)[indices]


def data_charts(models):
    """The number of images of each class, and how bright they are."""
    [trained] = models.values()
    data = trained.data
    labels = labels_of(data)
    figure, [[counts, brightness]] = make_figure(1, 2, 11, 3.4)
    figure.suptitle(f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images")
    names = class_names(data, len(COLOURS))
    classes = np.arange(len(names))
    sets = {"training": (-0.2, data.train_labels), "test": (0.2, labels)}
    for name, (place, classes_of_set) in sets.items():
        if classes_of_set is not None:  # the published training set has no labels
            heights = np.bincount(classes_of_set, minlength=len(names))
            counts.bar(classes + place, heights, 0.4, label=name)
    counts.legend(loc="upper center", ncols=2)
    counts.set(ylabel="images", xlabel="class")
    name_classes(counts, names)
    counts.margins(y=0.25)
    likelihood, present = trained.model.likelihood, np.unique(labels)
    means = [
        np.asarray(as_floats(likelihood, data.test[labels == label])).mean(axis=(1, 2, 3))
        for label in present
    ]
    brightness.boxplot(means, positions=present, showfliers=False)
    brightness.set(ylabel="mean of all pixels (test)", xlabel="class")
    name_classes(brightness, names)
    return figure


def name_classes(ax, names):
    """Writes the names of the classes at 0, 1, … on the x-axis, upright if they are long."""
    slanted = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 3 else {}
    ax.set_xticks(range(len(names)), names, **slanted)


def add_bits(ax, likelihood, sign):
    """Of images with more than two levels, adds an axis of bits per dimension to one of nats, of
    bounds (sign 1) or of losses (sign −1)."""
    if likelihood.levels > 1:
        bits = bits_per_dimension(likelihood, sign)  # at one nat
        functions = partial(np.multiply, bits), partial(np.multiply, 1 / bits)
        ax.secondary_yaxis("right", functions=functions).set_ylabel("bits per dimension")


# ---- The models -------------------------------------------------------------------------------


def training(models):
    """Training loss against updates. Each point is the mean over 1% of the run. The loss is −ELBO,
    unless a run gives the KL another weight than 1."""
    figure, [[ax]] = make_figure(1, 1, 7, 4)
    for name, trained in models.items():
        ax.plot(*trained.curve.T, label=name)
    losses = np.concatenate([trained.curve[:, 1] for trained in models.values()])
    if np.isnan(losses).all():
        raise ValueError("no update of a run is on record")
    low, high = np.nanpercentile(losses, (0, 95))  # the first updates are cut off
    is_elbo = all(trained.config.train.kl_weight == 1 for trained in models.values())
    quantity = "−ELBO" if is_elbo else "loss"
    ax.set(xlabel="update", ylabel=f"{quantity}, nats per image", ylim=(low - 5, high))
    if is_elbo:
        add_bits(ax, next(iter(models.values())).model.likelihood, -1)
    ax.legend()
    return figure


def tsne(models, images=5000):
    """t-SNE of up to 5,000 encoded test images, coloured by their true labels."""
    figure, [axes] = make_figure(1, len(models), 6 * len(models), 5.5)
    encoded = [labelled(trained, images) for trained in models.values()]
    for ax, (name, trained), (x, labels) in zip(axes, models.items(), encoded, strict=True):
        z = posterior_means(trained.model, trained.params, x)
        if np.all(z == z[0]):  # scikit-learn would crash, without an exception
            raise ValueError("t-SNE needs latent vectors that differ, and all are equal")
        x, y = TSNE(random_state=0).fit_transform(z).T
        dots = ax.scatter(x, y, c=labels, s=4, vmin=0, vmax=9, cmap="tab10")
        ax.set_title(f"{name}, {trained.data.name}")
        ax.set_axis_off()
        handles, _ = dots.legend_elements(num=None)
        names = class_names(trained.data, 10)
        present = [names[label] for label in np.unique(labels)]
        ax.legend(handles, present, title="class", loc=(1, 0.3))
    return figure


def moments(stages):
    """When a model's growth is looked at: {name: (stage, step)}, as places in what `grow` returns.

    A model that doubles its grid has the first cell, as four copies, and the grid after each stage.
    A model on a grid of fixed size has up to six evenly spaced steps, the first and the last among
    them. stages: the arrays that `grow` returns, or their shapes.
    """
    if len(stages) == 1:
        steps = len(stages[0]) - 1
        return {f"step {t}": (0, t) for t in np.linspace(0, steps, 6).round().astype(int)}
    sides = [stage.shape[2] for stage in stages]
    return {"z": (0, 0), **{f"{n}×{n}": (k, -1) for k, n in enumerate(sides)}}


@partial(jax.jit, static_argnums=(0, 1))
def snapshots(model, places, params, images):
    """The cells of images at these places of their growth: a list of [B, n, n, C]. places None: all
    that `grow` returns."""
    stages = model.grow(params, model.encode(params, images)[0], None)
    return stages if places is None else [stages[stage][step] for stage, step in places]


def sample_cells(grow, images, count):
    """`count` random cells of each image at each moment: NumPy [moments, len(images), count, C].
    grow: images -> a list of [B, n, n, C]."""
    random = np.random.RandomState(0)

    def some(grid):
        cells = np.asarray(grid).reshape(len(grid), -1, grid.shape[-1])
        places = random.randint(cells.shape[1], size=(len(cells), count, 1))
        return np.take_along_axis(cells, places, axis=1)

    parts = []
    for start in range(0, len(images), 20):  # the states of all images would not fit in memory
        grids = grow(images[start : start + 20])
        parts.append([some(grid) for grid in grids])
    return np.concatenate(parts, axis=1)


def probe(models, images=400, cells=16):
    """A linear probe reads the class from single cells. Its accuracy is above each column."""
    figure = Figure(figsize=(6.5 * len(models), 9.6))
    parts = figure.subfigures(1, len(models), squeeze=False)[0]
    for part, (model, trained) in zip(parts, models.items(), strict=True):
        # The first half of the images is for training, the second for testing. The split is by
        # image, so that no image has cells in both halves.
        x, labels = labelled(trained, 2 * images)
        half, y = len(x) // 2, labels.repeat(cells)
        names = class_names(trained.data, 10)
        # The pictures show the first test image of each class.
        classes, first = np.unique(labels[half:], return_index=True)
        when = moments(jax.eval_shape(partial(snapshots, trained.model, None), trained.params, x))
        grow = partial(snapshots, trained.model, tuple(when.values()), trained.params)
        axes = part.subplots(len(classes), len(when) + 1, squeeze=False)
        grids, some = grow(x[half + first]), sample_cells(grow, x, cells)
        for name, column, grid, states in zip(when, axes.T, grids, some, strict=False):
            seen, unseen = np.split(states.reshape(len(y), -1), [half * cells])
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
            classifier.fit(seen, y[: len(seen)])
            column[0].set_title(f"{name}\n{classifier.score(unseen, y[len(seen) :]):.0%}")
            read = classifier.predict(grid.reshape(-1, grid.shape[-1]))
            for ax, image in zip(column, COLOURS[read.reshape(grid.shape[:3])], strict=True):
                show_image(ax, image)
        axes[0, -1].set_title("grown")
        for row, n, image in zip(axes, classes, shown(trained.model, grids[-1]), strict=True):
            style = {"rotation": 0} if len(names[n]) == 1 else {"fontsize": 9}
            row[0].set_ylabel(names[n], color=COLOURS[n], weight="bold", **style)
            show_image(row[-1], image)
        most = np.bincount(labels[half:]).max() / len(labels[half:])
        part.suptitle(
            f"{model}: the class that the probe reads from each cell\n"
            f"({most:.0%} of the test images are of the most frequent class)"
        )
    return figure


# ---- The measurements -------------------------------------------------------------------------


def plot_curves(curves, start, wrong):
    """Plots means over images against steps, with bands of one standard deviation.

    curves: {label: {term: [steps, 2]}}, mean and standard deviation; start: what the steps follow;
    wrong: which pixels are wrong, in words.
    Returns the figure and its two axes, for wrong pixels and for log p(x|z).
    """
    figure, [axes] = make_figure(1, 2, 12, 4)
    terms = {"wrong": wrong, "log_px": "log p(x|z), nats"}
    for ax, (term, words) in zip(axes, terms.items(), strict=True):
        for label, values in curves.items():
            mean, deviation = np.array(values[term], float).T  # None, of diverged cells, is NaN
            ax.fill_between(range(len(mean)), mean - deviation, mean + deviation, alpha=0.12)
            ax.plot(mean, label=label)
        ax.set(xlabel=f"steps {start}", ylabel=words)
    best = max(np.nanmax(np.array(values["log_px"], float)[:, 0]) for values in curves.values())
    # Diverging curves are cut off.
    axes[1].set_ylim(max(axes[1].get_ylim()[0], min(-1000, 4 * best)), 0)
    return figure, axes


def recovery_measured(study):
    """Recovery from damage: wrong pixels and log p(x|z) against steps, for several sizes."""
    [name] = study["names"]
    sizes = study["recovery"][name]
    curves = {f"{size}×{size} cells damaged": curve for size, curve in sizes.items()}
    curves = {"no damage": curves.pop("0×0 cells damaged"), **curves}
    figure, axes = plot_curves(curves, "after the damage", study["wrong"])
    axes[1].legend(loc=(1.02, 0.3))
    return figure


def stability_measured(study):
    """Stability over 500 steps, many more than in training: wrong pixels and log p(x|z)."""
    [name] = study["names"]
    curves = {None: study["stability"][name]}
    figure, axes = plot_curves(curves, "from the initial cells", study["wrong"])
    for ax in axes:
        ax.set(xscale="symlog", xlim=0)
    return figure


def samples_measured(study):
    """IWELBO against the number of importance samples. More samples give a tighter bound."""
    figure, [[ax]] = make_figure(1, 1, 7, 4)
    for model, name in study["names"].items():
        bounds = study["iwelbo"][model]
        ax.plot(bounds["samples"], bounds["iwelbo"], "o-", markersize=3, label=name)
    ax.set(xlabel="samples", ylabel="IWELBO, nats per image", xscale="log")
    add_bits(ax, study["likelihood"], 1)
    ax.set_xticks(bounds["samples"], bounds["samples"])
    ax.minorticks_off()
    ax.legend()
    return figure


def digits_measured(study):
    """IWELBO of each class, without and with cells. Error bars: standard errors over images."""
    figure, [[ax]] = make_figure(1, 1, 8, 4)
    for place, (model, name) in zip((-0.2, 0.2), study["names"].items(), strict=False):
        bounds = study["iwelbo"][model]["digits"]
        if bounds is None:
            raise ValueError(f"the images of the {model} model, {name}, have no labels")
        mean, error = np.array(bounds, float).T  # None, of a class without images: no bar
        classes = np.arange(len(mean))
        ax.bar(classes + place, mean, 0.4, yerr=error, label=name)
    ax.set(xlabel="class", ylabel="IWELBO, nats per image")
    add_bits(ax, study["likelihood"], 1)
    name_classes(ax, study["classes"][: len(classes)])
    figure.legend(loc="outside upper center", ncols=2)
    return figure


# ---- Which models a plot shows ----------------------------------------------------------------


def the_first(*tests):
    """Makes a function of models, {name: TrainedModel}, that returns names: for each of these tests
    that of the first model that passes it, if there is one."""

    def choose(models):
        passed = [[n for n, trained in models.items() if test(trained.model)] for test in tests]
        return [names[0] for names in passed if names]

    return choose


def has_no_cells(model):
    return not model.grow


def has_cells(model):
    return model.grow


def doubles(model):
    return model.grow and not model.step


def takes_single_steps(model):
    return model.step


PLOTS = {
    data_charts: the_first(lambda model: True),
    training: list,
    tsne: the_first(has_no_cells, has_cells),
    probe: the_first(doubles, takes_single_steps),
    recovery_measured: the_first(takes_single_steps),
    stability_measured: the_first(takes_single_steps),
    samples_measured: list,
    digits_measured: the_first(has_no_cells, has_cells),
}
MEASURED = recovery_measured, stability_measured, samples_measured, digits_measured
