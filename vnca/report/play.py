"""The page to play with, play.html: two decoders and a hundred test digits in one file.

The template beside this module draws the page and does the automaton's arithmetic; here it gets
what it draws: a header in JSON, and a block of numbers in base64.
"""

import base64
import json
import zlib
from pathlib import Path

import jax
import numpy as np

from vnca.images import unpack
from vnca.program.arithmetic import cell_channels
from vnca.program.data import load
from vnca.report import packaged

TEMPLATE = Path(__file__).with_name("play.html")
MOST_WEIGHTS = 100_000  # of a decoder: 267 kB of the page's 500, and 100 M multiply-adds a step
INHERIT = "An erased cell gets code and position from its neighbours, and must draw anew. "
TITLE = "A Variational Neural Cellular Automaton (Palm et al., 2022)."
LICENCE = (
    "The digits are of MNIST, by Yann LeCun and Corinna Cortes, each pixel drawn once as black or "
    "white; they are under CC BY-SA 3.0."
)


def page(shown):
    """The page's text, of trained models by kind (packaged.TrainedModel): both automata's decoders,
    the packaged one where there are more than 100,000 weights; and ten bundled test digits of each
    label, with the means of q(z|x) as their codes."""
    bundled = load("bundled")
    chosen = [np.flatnonzero(bundled.test_labels == label)[:10] for label in range(10)]
    bits = bundled.test[np.concatenate(chosen)]
    header, numbers, origins = {"models": {}}, [], []
    for kind, words in (("doubling", "Grow and Blend"), ("nondoubling", "Wound")):
        config, model, params, origin = playable(kind, shown[kind])
        sizes, layers = decoder(params["decoder"])
        codes, waves = packaged.codes(model, params, unpack(bits)), config.get("position_waves", 0)
        header["models"][kind] = (
            sizes
            | levels(model, params, codes)
            | {
                "latent": model.latent_size,
                "code": cell_channels(config) - model.latent_size,
                "doublings": config.get("doublings", 0),
                "steps": config.get("steps", config.get("steps_per_doubling")),
                "waves": waves,
            }
        )
        numbers += [*layers, codes]
        origins.append(f"{words}: the {kind} model, {origin}.")
    halves = [np.asarray(x, "<f2").tobytes() for x in numbers]
    block = b"".join([*halves, bits.tobytes()])
    header |= {
        "labels": np.repeat(np.arange(10), 10).tolist(),
        "origin": " ".join([TITLE, *origins, LICENCE]),
        "adler32": zlib.adler32(block),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("@INHERIT@", INHERIT if header["models"]["nondoubling"]["waves"] else "")
    text = text.replace("@HEADER@", json.dumps(header).replace("<", r"\u003c"))
    return text.replace("@BLOCK@", base64.b64encode(block).decode())


def levels(model, params, codes):
    """What the colours of channels 1 to 3 are measured by: the median over all cells of grown
    digits, and half of the distance between their 10th and their 90th percentile."""
    cells = jax.jit(model.grow, static_argnums=2)(params, codes[::10], 4)[-1][-1]
    channels = np.nan_to_num(cells.reshape(-1, cells.shape[-1])[:, 1:])  # of a run that diverged
    low, middle, high = np.percentile(channels, (10, 50, 90), axis=0)
    return {"middle": middle.tolist(), "spread": np.maximum((high - low) / 2, 1e-6).tolist()}


def playable(kind, trained):
    """The config.model, model and parameters that the page has of this kind, and words for them."""
    weights = count(trained.params)
    if weights <= MOST_WEIGHTS:
        words = f"{weights:,} weights, from {Path(trained.origin).name}"
        return trained.config.model, trained.model, trained.params, words
    config, model, params, _ = packaged.load(kind)
    words = f"{count(params):,} weights, which comes with the package: that of the run has "
    return config.model, model, params, words + f"{weights:,}, too many for a page"


def count(params):
    """How many weights the decoder has."""
    return sum(x.size for x in jax.tree.leaves(params["decoder"]))


def decoder(params):
    """The parameters of a step as the page has them: its sizes, and arrays one after the other."""
    blocks = params.get("blocks", [])
    inner = [block[name] for block in blocks for name in ("linear0", "linear1")]
    # To channels that no step changes it adds 0.
    kernel, bias = params["residual"]["kernel"], params["residual"]["bias"]
    same = (0, params["perceive"]["kernel"].shape[2] - len(bias))
    update = {"kernel": np.pad(kernel, [(0, 0), same]), "bias": np.pad(bias, same)}
    layers = [params["perceive"], *inner, update]
    arrays = [array for layer in layers for array in in_fours(**layer)]
    channels, hidden = len(arrays[-1]), len(arrays[1])
    return {"channels": channels, "hidden": hidden, "blocks": len(blocks)}, arrays


def in_fours(kernel, bias):
    """A kernel [k, k, in, out] or [in, out] and its bias, with channels of zeros that make in and
    out multiples of four; the kernel as [out / 4, k·k·in, 4], the order in which the page sums."""
    kernel = np.asarray(kernel).reshape(-1, *kernel.shape[-2:])
    _, more_in, more_out = more = [(0, -n % 4) for n in (0, *kernel.shape[1:])]
    kernel = np.pad(kernel, more)
    return kernel.reshape(-1, kernel.shape[-1] // 4, 4).swapaxes(0, 1), np.pad(bias, more_out)
