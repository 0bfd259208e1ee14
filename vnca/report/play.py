"""The interactive page, play.html: two decoders, and test images for each, in one file.

The template and the style sheet next to this module draw the page, and the template computes the
steps. This module joins them and fills in the data: a JSON header, and a base64 block of weights,
codes and images.
"""

import base64
import json
import zlib
from pathlib import Path

import jax
import numpy as np

from vnca.likelihoods import as_floats
from vnca.program import runs
from vnca.program.data import load
from vnca.report.trained import class_labels, packaged_model, posterior_means

TEMPLATE = Path(__file__).with_name("play.html")
STYLE = Path(__file__).with_name("play.css")
# Multiply-adds of a step: those of 100,000 weights, 267 kB in base64, on 32×32 cells.
MAX_PRODUCTS = 100_000 * 1024
PARTS = {  # of the page: the models whose steps its script computes, and what it lets one do
    "growing": (("doubling",), "Grow and Blend"),
    "healing": (("nondoubling", "healing"), "Wound"),
}
INHERIT = (
    "An erased cell inherits its code and position from its neighbours and must redraw its pixel. "
)
OTHER = " This page is written for digits, but your model draws other images."
TITLE = "A Variational Neural Cellular Automaton (Palm et al., 2022)."
LICENCE = (
    "The digits are from MNIST, by Yann LeCun and Corinna Cortes, with each pixel binarized at "
    "random. They are under CC BY-SA 3.0."
)


def page(models, plain=False):
    """Returns the text of the page for trained models, {name: trained.TrainedModel}.

    The page holds the decoders of two automata, one that doubles its grid and one on a grid of
    fixed size, and test images with the means of q(z|x) as their codes: ten of each class, of at
    most ten classes. They are the bundled digits, or, for a model trained on one's own images,
    those images. The page uses the packaged model of the part, in its plain form if `plain`, if a
    decoder has more than 100,000 weights, or fewer on a grid of more than 32×32 cells, or if it
    draws something else than black and white images of 32×32 pixels.
    """
    parts = {part: choose_model(models, names, plain) for part, (names, _) in PARTS.items()}
    header, blocks, origins = {}, [], [TITLE]
    for part, trained in parts.items():
        entry, content = page_part(trained)
        header[part] = entry
        blocks.append(content)
        origins.append(
            f"{PARTS[part][1]}: the {trained.config.model.name} model, {trained.origin}."
        )
    block = b"".join(blocks)
    sets = [entry["images"] for entry in header.values()]
    if "bundled" in sets:
        origins.append(LICENCE)
    header = {"models": header, "origin": " ".join(origins), "adler32": zlib.adler32(block)}
    inherits = "position_waves" in parts["healing"].config.model
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, content in {
        "@STYLE@\n": STYLE.read_text(encoding="utf-8"),
        "@OTHER@": "" if set(sets) == {"bundled"} else OTHER,
        "@INHERIT@": INHERIT if inherits else "",
        "@HEADER@": json.dumps(header).replace("<", r"\u003c"),
        "@BLOCK@": base64.b64encode(block).decode(),
    }.items():
        text = text.replace(name, content)
    return text


def page_part(trained):
    """What the page's header says of a TrainedModel, a dict; and the bytes of its weights, the
    codes of its images, and the images, 32×32 bits each."""
    config, model, params, data, _, _ = trained
    sizes, weights = decoder_arrays(params["decoder"])
    images, buttons = page_images(data)
    codes = posterior_means(model, params, as_floats(model.likelihood, images))
    entry = {
        **sizes,
        **colour_levels(model, params, codes),
        "images": data.identity,
        "labels": buttons,
        "latent": model.latent_size,
        "code": config.model.get("channels", model.latent_size) - model.latent_size,
        "doublings": config.model.get("doublings", 0),
        "steps": config.model.get("steps", config.model.get("steps_per_doubling")),
        "waves": config.model.get("position_waves", 0),
    }
    arrays = [np.asarray(array, "<f2").tobytes() for array in (*weights, codes)]
    return entry, b"".join([*arrays, images.tobytes()])


def page_images(data):
    """Ten test images of each class, of at most ten classes.

    Returns them as they are stored, uint8 [n, row], and for each image which of the page's ten
    buttons shows it, a list of 0…9 in ascending order.
    """
    labels = class_labels(data)
    of_classes = [np.flatnonzero(labels == label)[:10] for label in np.unique(labels)[:10]]
    buttons = [button for button, images in enumerate(of_classes) for _ in images]
    return data.test[np.concatenate(of_classes)], buttons


def colour_levels(model, params, codes):
    """The range that the page maps to colours, for each of channels 1 to 3.

    "middle" is the median over all cells of up to ten grown images. "spread" is half of the
    distance between the 10th and the 90th percentile.
    """
    cells = jax.jit(model.grow, static_argnums=2)(params, codes[::10], 4)[-1][-1]
    cells = np.nan_to_num(cells[..., 1:])  # the run may have diverged
    low, middle, high = np.percentile(cells, (10, 50, 90), axis=(0, 1, 2))
    return {"middle": middle.tolist(), "spread": np.maximum((high - low) / 2, 1e-6).tolist()}


def choose_model(models, names, plain):
    """The TrainedModel to show in a part of the page, with its origin in words, and the data set of
    the images to show with it: the first of `models` with one of these names, or a packaged one."""
    trained = next(models[name] for name in models if name in names)
    likelihood = trained.model.likelihood
    weights = sum(x.size for x in jax.tree.leaves(trained.params["decoder"]))
    cells = 4 ** trained.config.model.get("doublings", 5)
    reason = None
    if (likelihood.size, likelihood.colours, likelihood.levels) != (32, 1, 1):
        reason = "draws other images than the page"
    elif weights * cells > MAX_PRODUCTS:
        reason = "is too large for a page"
    if reason:
        name = next(name for name in names if name in runs.packaged_names())
        origin = f"from the package, because the run's model {reason}"
        return packaged_model(name, plain)._replace(origin=origin)
    # The published images have no licence to be handed on, so the page has the bundled ones.
    data = trained.data if trained.data.name == "own" else load("bundled")
    return trained._replace(
        data=data, origin=f"{weights:,} weights, from {Path(trained.origin).name}"
    )


def decoder_arrays(params):
    """The parameters of one step in the page's layout: a dict of sizes, and a list of arrays."""
    perceive, residual, blocks = params["perceive"], params["residual"], params.get("blocks", [])
    channels, hidden = (n + -n % 4 for n in perceive["kernel"].shape[2:])
    layers = [(perceive, channels, hidden)]
    layers += [(block[n], hidden, hidden) for block in blocks for n in ("linear0", "linear1")]
    # The page adds an update to all channels, so the channels that no step changes get zeros.
    layers += [(residual, hidden, channels)]
    arrays = [array for layer in layers for array in pad(*layer)]
    return {"channels": channels, "hidden": hidden, "blocks": len(blocks)}, arrays


def pad(layer, inputs, outputs):
    """Pads the input and output channels of a layer with zeros to these numbers, multiples of four.

    layer: its kernel, [k, k, in, out] or [in, out], and its bias, [out]. Returns the kernel as
    [outputs / 4, k·k·inputs, 4], the order in which the page reads it, and the bias.
    """
    kernel, bias = np.asarray(layer["kernel"]), layer["bias"]
    kernel = kernel.reshape(-1, *kernel.shape[-2:])
    missing = outputs - len(bias)
    kernel = np.pad(kernel, [(0, 0), (0, inputs - kernel.shape[1]), (0, missing)])
    return kernel.reshape(-1, outputs // 4, 4).swapaxes(0, 1), np.pad(bias, (0, missing))
