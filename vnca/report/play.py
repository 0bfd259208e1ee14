"""The interactive page, play.html: decoders, and test images for each, in one file.

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
from ml_collections import ConfigDict

from vnca.likelihoods import as_floats
from vnca.model import make_likelihood
from vnca.program import runs
from vnca.program.data import load
from vnca.report.trained import class_labels, class_names, packaged_model, posterior_means

TEMPLATE = Path(__file__).with_name("play.html")
STYLE = Path(__file__).with_name("play.css")
# Multiply-adds of a step: those of 100,000 weights, 267 kB in base64, on 32×32 cells.
MAX_PRODUCTS = 100_000 * 1024
PARTS = {  # of a set of images: the models whose steps the script computes, and what it lets one do
    "growing": (("doubling",), "Grow and Blend"),
    "healing": (("nondoubling", "healing"), "Wound"),
}
SETS = {"bundled": "Digits", "faces": "Faces", "own": "Your images"}  # their names on the page
TITLE = "A Variational Neural Cellular Automaton (Palm et al., 2022)."
LICENCES = {
    "bundled": "The digits are from MNIST, by Yann LeCun and Corinna Cortes, with each pixel "
    "binarized at random. They are under CC BY-SA 3.0.",
    "faces": "The faces were drawn with DiceBear's style Pixel Art, which is under CC0 1.0.",
}


def page(models, plain=False):
    """Returns the text of the page for trained models, {name: trained.TrainedModel}, all of which
    have one Likelihood.

    For each Likelihood, first that of `models` and then those of the packaged models, the page has
    a set of images: up to two automata, one that doubles its grid and one on a grid of fixed size,
    and test images with the means of q(z|x) as their codes. These are ten of each class, of at most
    ten classes: images of the package, or, for a model trained on one's own images, those images.
    If a decoder of `models` has more than 100,000 weights, or fewer on a grid of more than 32×32
    cells, the packaged model takes its place, if there is one. plain: packaged models in their
    plain form.
    """
    sets, blocks, origins, data_names = [], [], [TITLE], set()
    for group in by_likelihood(models):
        chosen = {part: choose_model(group, names, plain) for part, (names, _) in PARTS.items()}
        chosen = {part: trained for part, trained in chosen.items() if trained}
        parts = {}
        for part, trained in chosen.items():
            parts[part], content = page_part(trained)
            blocks.append(content)
            data_names.add(trained.data.name)
            origins.append(
                f"{SETS[trained.data.name]}, {PARTS[part][1]}: the {trained.config.model.name} "
                f"model, {trained.origin}."
            )
        if parts:
            sets.append({"name": SETS[next(iter(chosen.values())).data.name], "models": parts})
    block = b"".join(blocks)
    origins += [text for name, text in LICENCES.items() if name in data_names]
    header = {"sets": sets, "origin": " ".join(origins), "adler32": zlib.adler32(block)}
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, content in {
        "@STYLE@\n": STYLE.read_text(encoding="utf-8"),
        "@HEADER@": json.dumps(header).replace("<", r"\u003c"),
        "@BLOCK@": base64.b64encode(block).decode(),
    }.items():
        text = text.replace(name, content)
    return text


def by_likelihood(models):
    """Groups of models for the same images: pairs of TrainedModels, a list, and the names of the
    packaged models that are made for these images. The group of `models` is first."""
    own = list(models.values())
    groups = {own[0].model.likelihood: (own, [])}
    for name in runs.packaged_names():
        config = ConfigDict(runs.find("packaged", name).config)
        _, packaged = groups.setdefault(make_likelihood(config.model), ([], []))
        packaged.append(name)
    return list(groups.values())


def page_part(trained):
    """What the page's header says of a TrainedModel, a dict; and the bytes of its weights, the
    codes of its images, and the images as they are stored."""
    config, model, params, data, _, _ = trained
    likelihood = model.likelihood
    sizes, weights = decoder_arrays(params["decoder"], likelihood.outputs)
    images, buttons = page_images(data)
    codes = posterior_means(model, params, as_floats(likelihood, images))
    labels = np.unique(class_labels(data))[:10]
    names = class_names(data, 256)
    entry = {
        **sizes,
        **colour_levels(model, params, codes),
        "size": likelihood.size,
        "outputs": likelihood.outputs,
        "levels": likelihood.levels,
        "images": data.identity,
        "labels": buttons,
        "names": [names[label] for label in labels],
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

    Returns them as they are stored, uint8 [n, stored_bytes], and for each image which of the page's
    ten buttons shows it, a list of 0…9 in ascending order.
    """
    labels = class_labels(data)
    of_classes = [np.flatnonzero(labels == label)[:10] for label in np.unique(labels)[:10]]
    buttons = [button for button, images in enumerate(of_classes) for _ in images]
    return data.test[np.concatenate(of_classes)], buttons


def colour_levels(model, params, codes):
    """The range that the page maps to colours, for each of the three channels after the logits.

    "middle" is the median over all cells of up to ten grown images. "spread" is half of the
    distance between the 10th and the 90th percentile. A channel that is not there has 0 and 1e-6.
    """
    outputs = model.likelihood.outputs
    cells = jax.jit(model.grow, static_argnums=2)(params, codes[::10], outputs + 3)[-1][-1]
    cells = np.nan_to_num(cells[..., outputs:])  # the run may have diverged
    cells = np.pad(cells, [(0, 0)] * 3 + [(0, 3 - cells.shape[-1])])
    low, middle, high = np.percentile(cells, (10, 50, 90), axis=(0, 1, 2))
    return {"middle": middle.tolist(), "spread": np.maximum((high - low) / 2, 1e-6).tolist()}


def choose_model(group, names, plain):
    """The TrainedModel to show in a part of the page, with its origin in words, and the data set of
    the images to show with it: the first of a group of `by_likelihood` with one of these names of
    models, or a packaged one. None if there is none."""
    models, packaged = group
    trained = next((m for m in models if m.config.model.name in names), None)
    if trained and trained.config.model.likelihood != "binomial":
        return None  # the script computes no other
    if trained and trained.data.name == "celeba":
        return None  # a page has images in it, and these may not be handed on
    reason = ""
    if trained:
        weights = sum(x.size for x in jax.tree.leaves(trained.params["decoder"]))
        cells = 4 ** trained.config.model.get("doublings", 0)
        if weights * max(cells, trained.model.likelihood.size**2) <= MAX_PRODUCTS:
            if trained.data.name == "larochelle":
                # These images have no licence to be handed on, so the page has the bundled ones.
                bundled = load("bundled", None, trained.model.likelihood)
                trained = trained._replace(data=bundled)
            return trained._replace(origin=f"{weights:,} weights, from {Path(trained.origin).name}")
        reason = ", because the run's model is too large for a page"
    for name in packaged:
        if name.split("_")[-1] in names:
            return packaged_model(name, plain)._replace(origin=f"from the package{reason}")


def decoder_arrays(params, outputs):
    """The parameters of one step in the page's layout: a dict of sizes, and a list of arrays. The
    cells have at least three channels after their `outputs` logits."""
    perceive, residual, blocks = params["perceive"], params["residual"], params.get("blocks", [])
    channels, hidden = perceive["kernel"].shape[2:]
    channels, hidden = (n + -n % 4 for n in (max(channels, outputs + 3), hidden))
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
