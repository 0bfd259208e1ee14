"""Trained models in the package: a small one of each kind, trained on the bundled digits.

`python -m vnca.report.packaged WORKDIR` replaces the packaged model of a kind by the model that a
run has trained. It stores the parameters of the run's newest checkpoint as float16, its config, and
its training curve.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vnca.models import Model
from vnca.program import VncaError, check, checkpoint
from vnca.program.config import KINDS, kind_of
from vnca.program.data import Dataset
from vnca.program.data import load as load_data
from vnca.program.hosts import agree
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_method, make_model, param_shapes
from vnca.program.metrics import CURVE_POINTS, training_curve
from vnca.program.workdir import trained_params


class Packaged(NamedTuple):
    """A trained model from the package, and how it was trained."""

    config: ConfigDict  # of the run that trained it
    model: Model
    params: dict  # float32, rounded to float16
    curve: np.ndarray  # float32 [100, 2]: update, and mean loss (nats) since the previous point


def path(kind):
    """The file of the packaged model of this kind."""
    return Path(__file__).with_name(f"packaged_{kind}.npz")


def load(kind, make_method=make_method):
    """Loads a packaged model: "doubling", "nondoubling" or "baseline".

    Raises VncaError for another kind and for a damaged file.
    """
    if kind not in KINDS:
        raise VncaError(f"there is no packaged model {kind!r}: choose {', '.join(KINDS)}")
    try:
        config, restore = checkpoint.load(path(kind))
        config = ConfigDict(config)
        shapes = param_shapes(make_model(config.model))
        halves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float16), shapes)
        state = restore({"params": halves, "curve": np.zeros((CURVE_POINTS, 2), np.float32)})
    except VncaError as fault:
        raise VncaError(f"reinstall the package: {fault}") from fault
    params = jax.tree.map(np.float32, state["params"])
    return Packaged(config, make_method(config).model, params, state["curve"])


def stand_in(kind):
    """The packaged model that replaces a missing checkpoint: its config, parameters and file."""
    packaged = load(kind)
    return packaged.config, packaged.params, path(kind)


def pack(workdir):
    """Makes the trained model in `workdir` the packaged model of its kind. Returns the file's path.

    Raises VncaError if there is no checkpoint.
    """
    found = checkpoint.newest(workdir)
    if not found:
        raise VncaError(f"{workdir} has no checkpoint")
    _, config, restore = found
    shapes = param_shapes(make_model(ConfigDict(config).model))
    halves = jax.tree.map(np.float16, restore({"params": shapes})["params"])
    target = path(kind_of(config["model"]["name"]))
    state = {"params": halves, "curve": training_curve(Path(workdir, "metrics.jsonl"))}
    checkpoint.write_state(target, state, config)
    return target


class TrainedModel(NamedTuple):
    """A trained model, and the images to show it with."""

    config: ConfigDict
    model: Model
    params: dict
    data: Dataset
    curve: np.ndarray  # as in Packaged
    origin: str  # the file that holds its parameters


def trained_models(config, workdir, log, make_method=make_method, which=None):
    """One trained model of each kind: {kind: TrainedModel}.

    If `workdir` has a checkpoint, or `which` names one (`checkpoint.named`), it is the model of its
    kind, with its own test set. The other kinds are the packaged models, with the bundled digits.
    Without a checkpoint, the config's kind is a packaged model as well. If the config names other
    images, these are shown with it. Raises VncaError if the checkpoint belongs to another config,
    or if other images are named and the packaged model has another config.model.
    """
    found, bundled = {}, load_data("bundled")
    images_named = config.data.name in ("larochelle", "own") or config.data.get("dir")
    own = bool(which or images_named) or agree(lambda: bool(checkpoint.paths(workdir)))
    if not own:
        log(f"{workdir} has no checkpoint: these are the packaged models")
    own = own and kind_of(config.model.name)
    for kind in KINDS:
        if kind == own:
            fitted, data, file, params = trained_params(config, workdir, log, stand_in, which)
            if file == path(kind):
                curve = load(kind).curve
            else:
                curve = training_curve(Path(file).with_name("metrics.jsonl"))
        else:
            packaged_config, _, params, curve = load(kind)
            packaged_config.eval.chunk = config.eval.chunk  # the saved one fits another machine
            fitted = fit_to_machine(packaged_config)
            data, file = bundled, path(kind)
        model = check.trusted(make_method(fitted), fitted, log).model
        packed = file == path(kind)
        origin = file.name if packed else str(file)
        found[kind] = TrainedModel(fitted, model, params, data, curve, origin)
        log(f"{kind}: {origin}{' (packaged model)' if packed else ''}, {data.name} images")
    return found


def posterior_means(model, params, images):
    """The means of q(z|x) of images [N, 32, 32, 1]: NumPy float32 [N, latent]."""
    encode = jax.jit(model.encode)
    means = [encode(params, images[i : i + 500])[0] for i in range(0, len(images), 500)]
    return np.concatenate(means)


def fingerprints(models):
    """Identifies trained models by {kind: [SHA-256 of the parameters, identity of the data]}."""
    return {
        kind: [checkpoint.params_sha256(m.params), m.data.identity] for kind, m in models.items()
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m vnca.report.packaged WORKDIR")
    try:
        print(pack(sys.argv[1]))
    except (OSError, VncaError) as fault:
        sys.exit(f"error: {fault}")
