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

from vnca.models import unpack
from vnca.program.data import load
from vnca.report.trained import packaged_model, posterior_means

TEMPLATE = Path(__file__).with_name("play.html")
STYLE = Path(__file__).with_name("play.css")
# Multiply-adds of a step: those of 100,000 weights, 267 kB in base64, on 32×32 cells.
MAX_PRODUCTS = 100_000 * 1024
MODES = {"doubling": "Grow and Blend", "nondoubling": "Wound"}
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
    """Returns the text of the page for trained models, {kind: trained.TrainedModel}.

    The page holds the decoders of both automata, and test images with the means of q(z|x) as their
    codes: ten of each class, of at most ten classes. They are the bundled digits, or, for a model
    trained on one's own images, those images. If a decoder has more than 100,000 weights, or fewer
    on a grid of more than 32×32 cells, the page uses the packaged model of that kind instead, in
    its plain form if `plain`.
    """
    header, blocks, origins = {}, [], [TITLE]
    for kind, modes in MODES.items():
        config, model, params, data, _, origin = choose_model(kind, models[kind], plain)
        sizes, weights = decoder_arrays(params["decoder"])
        images, labels = page_images(data)
        codes = posterior_means(model, params, unpack(images))
        header[kind] = {
            **sizes,
            **colour_levels(model, params, codes),
            "images": data.identity,
            "labels": labels,
            "latent": model.latent_size,
            "code": config.model.get("channels", model.latent_size) - model.latent_size,
            "doublings": config.model.get("doublings", 0),
            "steps": config.model.get("steps", config.model.get("steps_per_doubling")),
            "waves": config.model.get("position_waves", 0),
        }
        blocks += [*(np.asarray(x, "<f2").tobytes() for x in (*weights, codes)), images.tobytes()]
        origins.append(f"{modes}: the {kind} model, {origin}.")
    block, sets = b"".join(blocks), [model["images"] for model in header.values()]
    origins += [LICENCE] * ("bundled" in sets)
    header = {"models": header, "origin": " ".join(origins), "adler32": zlib.adler32(block)}
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, content in {
        "@STYLE@\n": STYLE.read_text(encoding="utf-8"),
        "@OTHER@": OTHER * (sets != ["bundled"] * 2),
        "@INHERIT@": INHERIT * ("position_waves" in config.model),  # the last one, nondoubling
        "@HEADER@": json.dumps(header).replace("<", r"\u003c"),
        "@BLOCK@": base64.b64encode(block).decode(),
    }.items():
        text = text.replace(name, content)
    return text


def page_images(data):
    """Ten test images of each class, of at most ten classes.

    Returns their packed bits, uint8 [n, 98], and for each image which of the page's ten buttons
    shows it, a list of 0…9 in ascending order.
    """
    labels = class_labels(data)
    found = [np.flatnonzero(labels == label)[:10] for label in np.unique(labels)[:10]]
    return data.test[np.concatenate(found)], [i for i, of in enumerate(found) for _ in of]


def class_labels(data):
    """The labels of the test images, int [N]. Those without labels are dealt to ten classes."""
    return np.arange(len(data.test)) % 10 if data.test_labels is None else data.test_labels


def colour_levels(model, params, codes):
    """The range that the page maps to colours, for each of channels 1 to 3.

    "middle" is the median over all cells of up to ten grown images. "spread" is half of the
    distance between the 10th and the 90th percentile.
    """
    cells = jax.jit(model.grow, static_argnums=2)(params, codes[::10], 4)[-1][-1]
    cells = np.nan_to_num(cells[..., 1:])  # the run may have diverged
    low, middle, high = np.percentile(cells, (10, 50, 90), axis=(0, 1, 2))
    return {"middle": middle.tolist(), "spread": np.maximum((high - low) / 2, 1e-6).tolist()}


def choose_model(kind, trained, plain):
    """The TrainedModel to show for this kind, with its origin in words, and the data set of the
    images to show with it."""
    weights = sum(x.size for x in jax.tree.leaves(trained.params["decoder"]))
    if weights * 4 ** trained.config.model.get("doublings", 5) > MAX_PRODUCTS:
        origin = "from the package, because the run's model is too large for a page"
        return packaged_model(kind, plain)._replace(origin=origin)
    origin = f"{weights:,} weights, from {Path(trained.origin).name}"
    # The published images have no licence to be handed on, so the page has the bundled ones.
    data = trained.data if trained.data.name == "own" else load("bundled")
    return trained._replace(data=data, origin=origin)


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
