"""The interactive page, play.html: two decoders and a hundred test images or more in one file.

The template and the style sheet next to this module draw the page, and the template computes the
steps. This module joins them and fills in the data: a JSON header, and a base64 block of weights,
codes and images.
"""

import base64
import json
import re
import zlib
from pathlib import Path

import jax
import numpy as np

from vnca.images import unpack
from vnca.program.arithmetic import cell_channels
from vnca.program.data import load
from vnca.program.order import fixed_shuffle
from vnca.report import packaged
from vnca.report.plots import class_word

TEMPLATE = Path(__file__).with_name("play.html")
STYLE = Path(__file__).with_name("play.css")
MAX_WEIGHTS = 100_000  # of one decoder: 267 kB of base64, and 100 M multiply-adds for 32×32 cells
INHERIT = (
    "An erased cell inherits its code and position from its neighbours and must redraw its pixel. "
)
TITLE = "A Variational Neural Cellular Automaton (Palm et al., 2022)."
LICENCE = (
    "The digits are from MNIST, by Yann LeCun and Corinna Cortes, with each pixel binarized at "
    "random. They are under CC BY-SA 3.0."
)


def page(models):
    """Returns the text of the page for trained models, {kind: packaged.TrainedModel}.

    The page holds the decoders of both automata, and test images with the means of q(z|x) as their
    codes: ten of each class, of at most ten classes. They are the bundled digits, or, for a model
    trained on one's own images, those images. If a decoder has more than 100,000 weights, the page
    uses the packaged model of that kind instead. The limit is a quarter as high for each doubling
    after the fifth.
    """
    chosen = {kind: choose_model(kind, models[kind]) for kind in ("doubling", "nondoubling")}
    shown, first_of = {}, {}  # of each set of images: what the page shows, the first one's index
    for *_, data in chosen.values():
        if data.identity not in shown:
            first_of[data.identity] = sum(len(images) for images, _, _ in shown.values())
            shown[data.identity] = page_images(data)
    bits = np.concatenate([images for images, _, _ in shown.values()])
    places = np.concatenate([places for _, places, _ in shown.values()])
    header = {"models": {}}
    arrays = []
    origins = []
    for kind, modes in (("doubling", "Grow and Blend"), ("nondoubling", "Wound")):
        config, model, params, origin, data = chosen[kind]
        sizes, weights = decoder_arrays(params["decoder"])
        codes = packaged.posterior_means(model, params, unpack(bits))
        first, (images, _, names) = first_of[data.identity], shown[data.identity]
        header["models"][kind] = (
            sizes
            | colour_levels(model, params, codes[first : first + len(images)])
            | {
                "first": first,
                "end": first + len(images),
                "names": names,
                "latent": model.latent_size,
                "code": cell_channels(config) - model.latent_size,
                "doublings": config.get("doublings", 0),
                "steps": config.get("steps", config.get("steps_per_doubling")),
                "waves": config.get("position_waves", 0),
            }
        )
        arrays += [*weights, codes]
        origins.append(f"{modes}: the {kind} model, {origin}.")
    halves = [np.asarray(x, "<f2").tobytes() for x in arrays]
    block = b"".join([*halves, bits.tobytes()])
    licence = [LICENCE] if "bundled" in shown else []
    header |= {
        "labels": places.tolist(),
        "origin": " ".join([TITLE, *origins, *licence]),
        "adler32": zlib.adler32(block),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("@STYLE@\n", STYLE.read_text(encoding="utf-8"))
    if any(data.name == "own" for *_, data in chosen.values()):
        body, script, rest = text.partition("<script")
        body = re.sub(r"\ba digit\b", "an image", body)
        body = body.replace("Digit", "Image").replace(" digit", " image")
        text = body + script + rest
    text = text.replace("@INHERIT@", INHERIT if header["models"]["nondoubling"]["waves"] else "")
    text = text.replace("@HEADER@", json.dumps(header).replace("<", r"\u003c"))
    return text.replace("@BLOCK@", base64.b64encode(block).decode())


def page_images(data):
    """Up to a hundred test images of a data set for the page.

    Returns their packed bits, uint8 [n, 98]; the number of each one's button, int [n], 0…9 in
    ascending order; and the buttons' names. Images without labels get ten buttons or fewer.
    """
    if data.test_labels is None:
        indices = fixed_shuffle(100, len(data.test))
        places = np.sort(np.arange(len(indices)) % 10)
        return data.test[indices], places, [f"group {n}" for n in range(min(len(indices), 10))]
    classes = np.unique(data.test_labels)[:10].tolist()
    found = [np.flatnonzero(data.test_labels == label)[:10] for label in classes]
    places = np.repeat(np.arange(len(found)), [len(indices) for indices in found])
    names = [f"{class_word(data)} {label}" for label in classes]
    return data.test[np.concatenate(found)], places, names


def colour_levels(model, params, codes):
    """The range that the page maps to colours, for each of channels 1 to 3.

    "middle" is the median over all cells of up to ten grown images. "spread" is half of the
    distance between the 10th and the 90th percentile.
    """
    cells = jax.jit(model.grow, static_argnums=2)(params, codes[::10], 4)[-1][-1]
    channels = np.nan_to_num(cells.reshape(-1, cells.shape[-1])[:, 1:])  # if the run diverged
    low, middle, high = np.percentile(channels, (10, 50, 90), axis=0)
    return {"middle": middle.tolist(), "spread": np.maximum((high - low) / 2, 1e-6).tolist()}


def choose_model(kind, trained):
    """The config.model, model and parameters to show for this kind, their origin in words, and the
    data set of the images to show with them."""
    data = trained.data if trained.data.name == "own" else load("bundled")
    count = count_weights(trained.params)
    grids = 4 ** max(trained.config.model.get("doublings", 5) - 5, 0)  # of 32×32 cells, in its grid
    if count * grids <= MAX_WEIGHTS:
        origin = f"{count:,} weights, from {Path(trained.origin).name}"
        return trained.config.model, trained.model, trained.params, origin, data
    config, model, params, _ = packaged.load(kind)
    cells = f" and {1024 * grids:,} cells" if grids > 1 else ""
    origin = (
        f"{count_weights(params):,} weights, from the package, because the run's model has "
        f"{count:,} weights{cells}, too many for a page"
    )
    return config.model, model, params, origin, load("bundled")


def count_weights(params):
    """The number of weights in the decoder."""
    return sum(x.size for x in jax.tree.leaves(params["decoder"]))


def decoder_arrays(params):
    """The parameters of one step in the page's layout: a dict of sizes, and a list of arrays."""
    blocks = params.get("blocks", [])
    inner = [block[name] for block in blocks for name in ("linear0", "linear1")]
    # The page adds an update to all channels, so the channels that no step changes get zeros.
    kernel, bias = params["residual"]["kernel"], params["residual"]["bias"]
    unchanged = (0, params["perceive"]["kernel"].shape[2] - len(bias))
    update = {"kernel": np.pad(kernel, [(0, 0), unchanged]), "bias": np.pad(bias, unchanged)}
    layers = [params["perceive"], *inner, update]
    arrays = [array for layer in layers for array in pad_to_fours(**layer)]
    channels, hidden = len(arrays[-1]), len(arrays[1])
    return {"channels": channels, "hidden": hidden, "blocks": len(blocks)}, arrays


def pad_to_fours(kernel, bias):
    """Pads the input and output channels of a layer with zeros to multiples of four.

    kernel: [k, k, in, out] or [in, out]; bias: [out]. Returns the kernel as [out / 4, k·k·in, 4],
    the order in which the page reads it, and the bias.
    """
    kernel = np.asarray(kernel).reshape(-1, *kernel.shape[-2:])
    padding = [(0, -n % 4) for n in (0, *kernel.shape[1:])]
    kernel = np.pad(kernel, padding)
    return kernel.reshape(-1, kernel.shape[-1] // 4, 4).swapaxes(0, 1), np.pad(bias, padding[-1])
