"""The plots of the study. They need matplotlib and scikit-learn, the packages of the extra
`report`."""

import contextlib
import io
import json
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np

from vnca.images import unpack
from vnca.program import VncaError
from vnca.program.order import fixed_shuffle
from vnca.report.packaged import fingerprints, posterior_means
from vnca.report.pictures import probabilities

SHOWN_CLASSES = 30  # at most, where each class takes a row


class NotEnough(VncaError):
    """The data set has too few images or no labels for a plot."""


NAMES = {  # of config.model.name
    "doubling": "DoublingVNCA",
    "nondoubling": "NonDoublingVNCA",
    "healing": "HealingVNCA",
    "baseline": "BaselineVAE",
}
STUDY = Path(__file__).with_name("study.json")  # measured on the packaged models


def draw_all(models, workdir, write, log):
    """Draws each plot of the models, {kind: packaged.TrainedModel}, and calls write(name, bytes of
    a PNG file, title).

    The plots of measurements need a study.json of the same models, in `workdir` or in the package.
    If packages or measurements are missing, `log` gets one line with the command that provides
    them.
    """
    try:
        check_packages()
    except VncaError as fault:
        log(f"no plots: {fault}")
        return
    data = next((m.data for m in models.values() if m.data.name != "bundled"), None)
    data = data or models["doubling"].data  # the data of a run, or else the bundled digits
    plots = [("data_examples", examples, data), ("data_charts", charts, data)]
    plots += [(draw.__name__, draw, models) for draw in (training, tsne, probe)]
    for draw, kinds in (
        (recovery_measured, ["nondoubling"]),
        (stability_measured, ["nondoubling"]),
        (samples_measured, list(models)),
        (digits_measured, ["baseline", "doubling"]),
    ):
        study = find_study({kind: models[kind] for kind in kinds}, workdir)
        if study:
            plots.append((draw.__name__, draw, study))
        else:
            log(f"no {draw.__name__}.png: measure {' and '.join(kinds)} first, with --mode=study")
    for name, draw, subject in plots:
        try:
            write(name, png(draw, subject), draw.__doc__)
        except NotEnough as fault:
            log(f"no {name}.png: {fault}")


def find_study(models, workdir):
    """The study of exactly these models, with their names, or None.

    It comes from `workdir`, or else from the package.
    """
    wanted = fingerprints(models)
    names = {kind: model_name(trained) for kind, trained in models.items()}
    for path in (Path(workdir, "study.json"), STUDY):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            study = json.loads(path.read_text())
            if wanted.items() <= study["models"].items():
                return study | {"names": names}
    return None


def model_name(trained):
    """The name of a trained model's architecture, as README has it."""
    return NAMES[trained.config.model.name]


def check_packages():
    """Raises VncaError if the packages of the extra `report` are not installed."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as fault:
        raise VncaError(
            f"{fault.name} is missing: install it with python -m pip install -e '.[report]'"
        ) from fault


def png(draw, subject):
    """The bytes of a PNG file of the figure draw(subject). `draw` is one of the functions below.

    Raises VncaError if the packages of the extra `report` are not installed.
    """
    check_packages()
    from matplotlib import style
    from sklearn.exceptions import ConvergenceWarning

    content = io.BytesIO()
    # Without "default", the user's own matplotlibrc would change the plots.
    with style.context(["default", STYLE]), warnings.catch_warnings():
        # The probe does not converge on cells that carry no information.
        warnings.simplefilter("ignore", ConvergenceWarning)
        draw(subject).savefig(content, format="png", dpi=100, metadata={"Software": None})
    return content.getvalue()


STYLE = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 11,
}


def make_figure(rows, columns, width, height):
    """A figure of width×height inches, and its axes, an array [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_image(axes, image):
    """Shows an image in 0…1, grey [H, W] or colour [H, W, 3], without ticks."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


# Each function below that draw_all names takes a data set, the models or a study, and returns a
# figure. Its docstring is the title.

# ---- The data ---------------------------------------------------------------------------------


def classes_of(data):
    """The classes of the test images in ascending order. Raises NotEnough if they are not known."""
    if data.test_labels is None:
        raise NotEnough(f"the test images of the data set {data.name} have no labels")
    return np.unique(data.test_labels).tolist()


def class_word(data):
    """What a class of this data set is called on an axis."""
    return "class" if data.name == "own" else "digit"


def class_colours(count):
    """One colour for each of the classes 0…count − 1: [count, 3]."""
    from matplotlib import colormaps

    if count <= 10:
        return colormaps["tab10"](range(count))[:, :3]
    return colormaps["turbo"](np.linspace(0, 1, count))[:, :3]


def examples(data):
    """Ten test images of each class, and the mean of all test images of that class."""
    classes = classes_of(data)[:SHOWN_CLASSES]
    figure, axes = make_figure(len(classes), 11, 7.7, 0.7 * len(classes))
    for row, label in zip(axes, classes, strict=True):
        images = np.asarray(unpack(data.test[data.test_labels == label])[..., 0])
        for ax, image in zip(row, images[:10], strict=False):
            show_image(ax, image)
        show_image(row[10], images.mean(axis=0))
        for ax in row[len(images) : 10]:  # a class may have fewer than ten images
            ax.set_axis_off()
    axes[0, 10].set_title("mean")
    return figure


def charts(data):
    """The number of images of each class, and the number of their pixels that are 1."""
    classes, word = classes_of(data), class_word(data)
    figure, [[counts, ones]] = make_figure(1, 2, 11, 3.4)
    figure.suptitle(f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images")
    sets = {"training": data.train_labels, "test": data.test_labels}
    for i, (name, labels) in enumerate(sets.items()):
        if labels is not None:  # the published training set has no labels
            images = np.bincount(labels)
            counts.bar(np.arange(len(images)) - 0.2 + 0.4 * i, images, 0.4, label=name)
    counts.legend(loc="upper center", ncols=2)
    counts.set(ylabel="images", xlabel=word)
    counts.margins(y=0.25)
    pixels = np.unpackbits(data.test, axis=1).sum(axis=1)
    by_class = [pixels[data.test_labels == label] for label in classes]
    ones.boxplot(by_class, positions=classes, showfliers=False, manage_ticks=False)
    ones.set(ylabel="pixels that are 1, of 784 (test)", xlabel=word, ylim=0)
    if len(classes) <= SHOWN_CLASSES:
        counts.set_xticks(classes)
        ones.set_xticks(classes)
    return figure


# ---- The models -------------------------------------------------------------------------------


def training(models):
    """Training loss (−ELBO) against updates. Each point is the mean over 1% of the run."""
    figure, [[ax]] = make_figure(1, 1, 7, 4)
    for trained in models.values():
        ax.plot(*trained.curve.T, label=model_name(trained))
    losses = np.concatenate([trained.curve[:, 1] for trained in models.values()])
    ax.set(xlabel="update", ylabel="−ELBO, nats per image")
    if not np.all(np.isnan(losses)):  # the first updates are cut off
        ax.set_ylim(np.nanmin(losses) - 5, np.nanpercentile(losses, 95))
    ax.legend()
    return figure


def tsne(models, images=5000):
    """t-SNE of up to 5,000 encoded test images, coloured by their true labels."""
    from sklearn.manifold import TSNE

    figure, axes = make_figure(1, 2, 12, 5.5)
    shown = [models[kind] for kind in ("baseline", "doubling")]
    for data in (trained.data for trained in shown):
        classes_of(data)
        if len(data.test) < 4:
            raise NotEnough(f"t-SNE needs 4 test images or more, and there are {len(data.test)}")
    one_set = shown[0].data.identity == shown[1].data.identity
    for ax, trained in zip(axes[0], shown, strict=True):
        data = trained.data
        indices = fixed_shuffle(images, len(data.test))
        z = posterior_means(trained.model, trained.params, unpack(data.test[indices]))
        if np.all(z == z[0]):  # scikit-learn would crash, without an exception
            raise NotEnough("t-SNE needs latent vectors that differ, and all are equal")
        start = "pca" if z.shape[1] > 1 else "random"
        neighbours = min(30, (len(z) - 1) / 3)  # scikit-learn's default, unless there are few
        x, y = TSNE(init=start, random_state=0, perplexity=neighbours).fit_transform(z).T
        most = data.test_labels.max()
        colours = {"cmap": "tab10", "vmax": 9} if most < 10 else {"cmap": "turbo", "vmax": most}
        dots = ax.scatter(x, y, c=data.test_labels[indices], s=4, vmin=0, **colours)
        ax.set_title(f"{model_name(trained)}, {data.name}")
        ax.set_axis_off()
        if not one_set or ax is axes[0, 1]:
            legend = figure.legend if one_set else ax.legend
            place = {"loc": "outside right center"} if one_set else {"loc": "best"}
            names = dots.legend_elements(num=None)
            columns = -(-len(names[0]) // SHOWN_CLASSES)
            legend(*names, **place, title=class_word(data), ncols=columns)
    return figure


def snapshots(model, params, images):
    """The cells of these images at several times of their growth: a list of [B, n, n, C].

    A doubling model gives four copies of the first cell, and the grid after each stage. A model on
    a grid of fixed size gives the grid after each of `snapshot_steps`.
    """
    stages = model.grow(params, model.encode(params, images)[0], None)
    if model.steps:
        return [stages[0][t] for t in snapshot_steps(model)]
    return [stages[0][0], *(stage[-1] for stage in stages)]


def snapshot_steps(model):
    """Up to six evenly spaced steps, with the first and the last step of `decode`."""
    return sorted({round(model.steps * i / 5) for i in range(6)})


def sample_cells(trained, images, count, shown):
    """Random cells of all images, and whole grids of some, at each snapshot of their growth.

    count: the number of cells of each image; shown: the indices, in `images`, of the images whose
    grids are returned. Returns a list of tuples, one for each snapshot: its name, states
    [B, count, C], and grids [len(shown), n, n, C] in ascending order of the indices.
    """
    model, random = trained.model, np.random.RandomState(0)
    take_snapshots = jax.jit(partial(snapshots, model))
    cells, grids = [], []  # of each batch, a list over snapshots
    for start in range(0, len(images), 20):  # the states of all images would not fit in memory
        batch = jax.device_get(take_snapshots(trained.params, images[start : start + 20]))
        flat = [grid.reshape(len(grid), -1, grid.shape[-1]) for grid in batch]
        positions = [random.randint(f.shape[1], size=(len(f), count, 1)) for f in flat]
        pairs = zip(flat, positions, strict=True)
        cells.append([np.take_along_axis(f, position, axis=1) for f, position in pairs])
        chosen = [i - start for i in sorted(shown) if start <= i < start + len(batch[0])]
        grids.append([grid[chosen] for grid in batch])
    if model.steps:
        names = [f"step {t}" for t in snapshot_steps(model)]
    else:
        sizes = [grid.shape[1] for grid in grids[0]]
        names = ["z", *(f"{n}×{n}" for n in sizes[1:])]
    cells = map(np.concatenate, zip(*cells, strict=True))
    grids = map(np.concatenate, zip(*grids, strict=True))
    return list(zip(names, cells, grids, strict=True))


def probe(models, images=400, cells=16):
    """A linear probe reads the class from single cells. Its accuracy is below each column."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    figure, axes = make_figure(1, 2, 13, 9.6)
    for ax, kind in zip(axes[0], ("doubling", "nondoubling"), strict=True):
        # The first half of the images is for training, the second for testing. The split is by
        # image, so that no image has cells in both halves.
        data = models[kind].data
        colours = class_colours(max(classes_of(data)) + 1)
        half = min(images, len(data.test) // 2)
        indices = fixed_shuffle(2 * half, len(data.test))
        labels = data.test_labels[indices]
        # The pictures show the first test image of each class, of at most ten. Grids come in
        # ascending order of the images, and `order` sorts them by class.
        classes = np.unique(labels[half:])[:10].tolist()
        if len(np.unique(labels[:half])) < 2:
            raise NotEnough(f"the probe needs images of two classes among {half}, half of the test")
        shown = [half + list(labels[half:]).index(label) for label in classes]
        order = np.argsort(np.argsort(shown))
        columns, titles = [], []
        for name, states, grids in sample_cells(
            models[kind], unpack(data.test[indices]), cells, shown
        ):
            grids = grids[order]
            x, y = states.reshape(-1, states.shape[-1]), labels.repeat(cells)
            fitted = half * cells
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
            classifier.fit(x[:fitted], y[:fitted])
            titles.append(f"{name}\n{classifier.score(x[fitted:], y[fitted:]):.0%}")
            found = classifier.predict(grids.reshape(-1, grids.shape[-1]))
            columns.append(colours[found].reshape(*grids.shape[:3], 3))
        columns.append(probabilities(grids[..., :1])[..., None].repeat(3, -1))
        titles.append("grown")
        size = grids.shape[1]
        columns = [c.repeat(size // c.shape[1], 1).repeat(size // c.shape[2], 2) for c in columns]
        sheet = np.pad(columns, [(0, 0)] * 2 + [(1, 1)] * 2 + [(0, 0)], constant_values=1)
        show_image(ax, sheet.transpose(1, 2, 0, 3, 4).reshape(len(classes) * (size + 2), -1, 3))
        word = class_word(data)
        name = model_name(models[kind])
        ax.set_title(f"{name}: the {word} that the probe reads from each cell", fontsize=12)
        middle = (size + 2) * np.arange(max(len(classes), len(titles))) + size // 2 + 1
        ax.set_xticks(middle[: len(titles)], titles)
        ax.set_yticks(middle[: len(classes)], classes)
        for label, colour in zip(ax.get_yticklabels(), colours[classes], strict=True):
            label.set(color=colour, weight="bold")
    return figure


# ---- The measurements -------------------------------------------------------------------------


TERMS = {"wrong": "wrong pixels, of 1,024", "log_px": "log p(x|z), nats"}


def plot_band(ax, values, label=None):
    """Plots the mean over images against steps, with a band of one standard deviation.

    values: [steps, 2], mean and standard deviation.
    """
    mean, deviation = np.array(values, float).T  # None, of cells that diverged, becomes NaN
    ax.fill_between(range(len(mean)), mean - deviation, mean + deviation, alpha=0.12)
    ax.plot(mean, label=label)


def recovery_measured(study):
    """Recovery from damage: wrong pixels and log p(x|z) against steps, for several sizes."""
    figure, axes = make_figure(1, 2, 12, 4)
    for ax, term in zip(axes[0], TERMS, strict=True):
        for size, curves in study["recovery"].items():
            label = "no damage" if size == "0" else f"{size}×{size} cells damaged"
            plot_band(ax, curves[term], label)
        ax.set(xlabel="steps after the damage", ylabel=TERMS[term])
    axes[0, 1].set_ylim(max(axes[0, 1].get_ylim()[0], -500), 0)  # diverging curves are cut off
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def stability_measured(study):
    """Stability over 500 steps, many more than in training: wrong pixels and log p(x|z)."""
    figure, axes = make_figure(1, 2, 12, 4)
    for ax, term in zip(axes[0], TERMS, strict=True):
        plot_band(ax, study["stability"][term])
        ax.set(xlabel="steps from the initial cells", ylabel=TERMS[term], xscale="symlog")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 1].set_ylim(-1000, 0)
    return figure


def samples_measured(study):
    """IWELBO against the number of importance samples. More samples give a tighter bound."""
    figure, [[ax]] = make_figure(1, 1, 7, 4)
    for kind, result in study["iwelbo"].items():
        label = f"{study['names'][kind]}, {study['models'][kind][1]}"
        ax.plot(result["samples"], result["iwelbo"], "o-", markersize=3, label=label)
    ax.set(xlabel="samples", ylabel="IWELBO, nats per image", xscale="log")
    ax.set_xticks(result["samples"], result["samples"])
    ax.minorticks_off()
    ax.legend()
    return figure


def digits_measured(study):
    """IWELBO of each class, doubling and baseline. Error bars show standard errors over images."""
    figure, [[ax]] = make_figure(1, 1, 8, 4)
    most, word = 0, "digit"
    for i, kind in enumerate(("baseline", "doubling")):
        name, bounds = study["models"][kind][1], study["iwelbo"][kind]["digits"]
        if bounds is None:
            raise NotEnough(f"the images of the {kind} model, {name}, have no labels")
        mean, error = np.array(bounds, float).T  # null becomes NaN: no bar
        ax.bar(np.arange(len(mean)) - 0.2 + 0.4 * i, mean, 0.4, yerr=error,
               label=f"{study['names'][kind]}, {name}")  # fmt: skip
        most = max(most, len(mean))
        word = "class" if name.startswith("own") else word
    ax.set(xlabel=word, ylabel="IWELBO, nats per image")
    if most <= SHOWN_CLASSES:
        ax.set_xticks(range(most))
    figure.legend(loc="outside upper center", ncols=2)
    return figure
