"""The figures of the study that are plots, with matplotlib and scikit-learn, where these are
installed: the extra `report`."""

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
from vnca.report.packaged import codes, identity
from vnca.report.pictures import probabilities

NAMES = {"doubling": "DoublingVNCA", "nondoubling": "NonDoublingVNCA", "baseline": "BaselineVAE"}
STUDY = Path(__file__).with_name("study.json")  # of the packaged models


def draw_all(models, workdir, write, log):
    """Draws each plot of the models (packaged.TrainedModel by kind), for write(name, PNG, title).

    Those of what was measured need a study.json of the same models, in `workdir` or the package.
    What is missing, packages or study, `log` is told in a line, with the command for it.
    """
    try:
        check_packages()
    except VncaError as fault:
        log(f"no plots: {fault}")
        return
    data = next((s.data for s in models.values() if s.data.name != "bundled"), None)
    data = data or models["doubling"].data  # that of a run, or of all
    drawn = [("data_examples", examples, data), ("data_charts", charts, data)]
    drawn += [(draw.__name__, draw, models) for draw in (training, tsne, probe)]
    for draw, kinds in (
        (recovery_measured, ["nondoubling"]),
        (stability_measured, ["nondoubling"]),
        (samples_measured, list(models)),
        (digits_measured, ["baseline", "doubling"]),
    ):
        study = measured({kind: models[kind] for kind in kinds}, workdir)
        if study:
            drawn.append((draw.__name__, draw, study))
        else:
            log(f"no {draw.__name__}.png: first measure {' and '.join(kinds)}, by --mode=study")
    for name, draw, of in drawn:
        write(name, png(draw, of), draw.__doc__)


def measured(models, workdir):
    """The study of these very models: that in `workdir`, or the packaged one, or None."""
    models = identity(models)
    for path in (Path(workdir, "study.json"), STUDY):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            study = json.loads(path.read_text())
            if models.items() <= study["models"].items():
                return study
    return None


def check_packages():
    """Raises VncaError where the packages of the extra `report` are not installed."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as fault:
        raise VncaError(
            f"{fault.name} is missing: python -m pip install -e '.[report]' installs it"
        ) from fault


def png(draw, of):
    """The bytes of a PNG file of draw(of), where `draw` is one of the functions below.

    Raises VncaError where the packages of the extra `report` are not installed.
    """
    check_packages()
    from matplotlib import rc_context
    from sklearn.exceptions import ConvergenceWarning

    content = io.BytesIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a probe of cells that know nothing
        draw(of).savefig(content, format="png", dpi=100, metadata={"Software": None})
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


def page(rows, columns, width, height):
    """A figure and its axes, [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def show(axes, image):
    """An image in 0…1, grey [H, W] or colours [H, W, 3], without ticks."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


# ---- The data ---------------------------------------------------------------------------------


def examples(data):
    """Ten test images of each digit, and the mean of all of them."""
    figure, axes = page(10, 11, 7.7, 7)
    for digit in range(10):
        images = np.asarray(unpack(data.test[data.test_labels == digit])[..., 0])
        for ax, image in zip(axes[digit], [*images[:10], images.mean(axis=0)], strict=True):
            show(ax, image)
    axes[0, 10].set_title("mean")
    return figure


def charts(data):
    """How many images there are of each digit, and how many of their pixels are lit."""
    figure, [[counts, lit]] = page(1, 2, 11, 3.4)
    figure.suptitle(f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images")
    sets = {"training": data.train_labels, "test": data.test_labels}
    for i, (name, labels) in enumerate(sets.items()):
        if labels is not None:  # as those of the published training set
            counts.bar(np.arange(10) - 0.2 + 0.4 * i, np.bincount(labels), 0.4, label=name)
    counts.legend(loc="upper center", ncols=2)
    counts.set(ylabel="images", xlabel="digit", xticks=range(10))
    counts.margins(y=0.25)
    pixels = np.unpackbits(data.test, axis=1).sum(axis=1)
    by_digit = [pixels[data.test_labels == digit] for digit in range(10)]
    lit.boxplot(by_digit, tick_labels=range(10), showfliers=False)
    lit.set(ylabel="lit pixels of 784 (test)", xlabel="digit", ylim=0)
    return figure


# ---- The models -------------------------------------------------------------------------------


def training(models):
    """Training loss (−ELBO) against updates, mean of each hundredth of the run."""
    figure, [[ax]] = page(1, 1, 7, 4)
    for kind, trained in models.items():
        ax.plot(*trained.curve.T, label=f"{NAMES[kind]}, {trained.data.name}")
    losses = np.concatenate([trained.curve[:, 1] for trained in models.values()])
    ax.set(xlabel="update", ylabel="−ELBO, nats an image")
    if not np.all(np.isnan(losses)):  # the first updates leave the page
        ax.set_ylim(np.nanmin(losses) - 5, np.nanpercentile(losses, 95))
    ax.legend()
    return figure


def tsne(models, images=5000):
    """t-SNE of 5,000 encoded test digits, coloured by their true labels."""
    from sklearn.manifold import TSNE

    figure, axes = page(1, 2, 12, 5.5)
    for ax, kind in zip(axes[0], ("baseline", "doubling"), strict=True):
        trained = models[kind]
        data, numbers = trained.data, fixed_shuffle(images, len(trained.data.test))
        z = codes(trained.model, trained.params, unpack(data.test[numbers]))
        places = TSNE(init="pca", random_state=0).fit_transform(z)
        dots = ax.scatter(*places.T, c=data.test_labels[numbers], s=4, cmap="tab10", vmin=0, vmax=9)
        ax.set_title(f"{NAMES[kind]}, {data.name}")
        ax.set_axis_off()
    figure.legend(*dots.legend_elements(num=None), loc="outside right center", title="digit")
    return figure


def moments(model, params, images):
    """The cells of these images at some moments of their growth: a list of [B, n, n, C]; of the
    non-doubling model, after the steps that `steps_of` says."""
    stages = model.grow(params, model.encode(params, images)[0], None)
    if model.steps:
        return [stages[0][t] for t in steps_of(model)]
    return [stages[0][0], *(stage[-1] for stage in stages)]


def steps_of(model):
    """Six of the steps of the non-doubling model's growth, evenly, with the first and the last."""
    return sorted({round(model.steps * i / 5) for i in range(6)})


def cells_of(trained, images, cells, shown):
    """For each moment, its name; states of so many random cells of each image, [N, cells, C]; and
    the whole grids of the images at the places `shown`, in order, [len(shown), n, n, C]."""
    model, random, some, whole = trained.model, np.random.RandomState(0), [], []
    look = jax.jit(partial(moments, model))
    for i in range(0, len(images), 20):  # all states of more would not fit into memory
        grids = jax.device_get(look(trained.params, images[i : i + 20]))
        flat = [grid.reshape(len(grid), -1, grid.shape[-1]) for grid in grids]
        places = [random.randint(f.shape[1], size=(len(f), cells, 1)) for f in flat]
        some.append([np.take_along_axis(*pair, axis=1) for pair in zip(flat, places, strict=True)])
        here = [n - i for n in sorted(shown) if i <= n < i + len(grids[0])]
        whole.append([grid[here] for grid in grids])
    sizes = [grid.shape[1] for grid in whole[0]]
    names = [f"step {t}" for t in steps_of(model)] if model.steps else None
    names = names or ["z", *(f"{n}×{n}" for n in sizes[1:])]
    parts = (map(np.concatenate, zip(*of, strict=True)) for of in (some, whole))
    return list(zip(names, *parts, strict=True))


def probe(models, images=400, cells=16):
    """What a linear probe reads from the state of single cells, and how often it is right."""
    from matplotlib import colormaps
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    figure, axes = page(1, 2, 13, 9.6)
    colours = colormaps["tab10"](range(10))[:, :3]
    for ax, kind in zip(axes[0], ("doubling", "nondoubling"), strict=True):
        # Split by image: cells of one image are in one half alone.
        data = models[kind].data
        numbers = fixed_shuffle(2 * images, len(data.test))
        labels = data.test_labels[numbers]
        # Of each digit, the first of the other half; their order is kept below.
        shown = [images + list(labels[images:]).index(digit) for digit in range(10)]
        found = cells_of(models[kind], unpack(data.test[numbers]), cells, shown)
        order = np.argsort(np.argsort(shown))
        columns, titles = [], []
        for name, some, whole in found:
            whole = whole[order]
            x, y = some.reshape(-1, some.shape[-1]), labels.repeat(cells)
            half = images * cells
            reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
            reader.fit(x[:half], y[:half])
            titles.append(f"{name}\n{reader.score(x[half:], y[half:]):.0%}")
            belief = reader.predict(whole.reshape(-1, whole.shape[-1]))
            columns.append(colours[belief].reshape(*whole.shape[:3], 3))
        columns.append(probabilities(whole[..., :1])[..., None].repeat(3, -1))
        titles.append("grown")
        size = whole.shape[1]
        columns = [c.repeat(size // c.shape[1], 1).repeat(size // c.shape[2], 2) for c in columns]
        sheet = np.pad(columns, [(0, 0)] * 2 + [(1, 1)] * 2 + [(0, 0)], constant_values=1)
        show(ax, sheet.transpose(1, 2, 0, 3, 4).reshape(10 * (size + 2), -1, 3))
        ax.set_title(f"{NAMES[kind]}: the digit that each cell believes in", fontsize=12)
        middle = (size + 2) * np.arange(10) + size // 2 + 1
        ax.set_xticks(middle[: len(titles)], titles)
        ax.set_yticks(middle, range(10))
        for label, colour in zip(ax.get_yticklabels(), colours, strict=True):
            label.set(color=colour, weight="bold")
    return figure


# ---- What was measured ------------------------------------------------------------------------


TERMS = {"wrong": "wrong pixels, of 1,024", "log_px": "log p(x|z), nats"}


def band(ax, values, label=None):
    """Means over images against steps, with a band of one standard deviation; values [steps, 2]."""
    mean, deviation = np.array(values).T
    ax.fill_between(range(len(mean)), mean - deviation, mean + deviation, alpha=0.12)
    ax.plot(mean, label=label)


def recovery_measured(study):
    """Damage and recovery, measured: wrong pixels and log p(x|z) against steps, by square lost."""
    figure, axes = page(1, 2, 12, 4)
    for ax, term in zip(axes[0], TERMS, strict=True):
        for size, curves in study["recovery"].items():
            band(ax, curves[term], "nothing lost" if size == "0" else f"{size}×{size} lost")
        ax.set(xlabel="steps after the damage", ylabel=TERMS[term])
    axes[0, 1].set_ylim(max(axes[0, 1].get_ylim()[0], -500), 0)  # what diverges leaves the page
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def stability_measured(study):
    """The non-doubling model far beyond its training: wrong pixels and log p(x|z) against steps."""
    figure, axes = page(1, 2, 12, 4)
    for ax, term in zip(axes[0], TERMS, strict=True):
        band(ax, study["stability"][term])
        ax.set(xlabel="steps from the seed", ylabel=TERMS[term], xscale="symlog")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 1].set_ylim(-1000, 0)
    return figure


def samples_measured(study):
    """How the bound tightens with the number of importance samples."""
    figure, [[ax]] = page(1, 1, 7, 4)
    for kind, found in study["iwelbo"].items():
        label = f"{NAMES[kind]}, {study['models'][kind][1]}"
        ax.plot(found["samples"], found["iwelbo"], "o-", markersize=3, label=label)
    ax.set(xlabel="samples", ylabel="IWELBO, nats", xscale="log")
    ax.set_xticks(found["samples"], found["samples"])
    ax.minorticks_off()
    ax.legend()
    return figure


def digits_measured(study):
    """IWELBO of each digit, doubling against baseline; bars: standard error over images."""
    figure, [[ax]] = page(1, 1, 8, 4)
    for i, kind in enumerate(("baseline", "doubling")):
        mean, error = np.array(study["iwelbo"][kind]["digits"], float).T  # None: NaN, no bar
        label = f"{NAMES[kind]}, {study['models'][kind][1]}"
        ax.bar(np.arange(10) - 0.2 + 0.4 * i, mean, 0.4, yerr=error, label=label)
    ax.set(xlabel="digit", ylabel="IWELBO, nats", xticks=range(10))
    figure.legend(loc="outside upper center", ncols=2)
    return figure
