"""Trained models that come with the package: a small one of each kind, made from bundled digits.

`python -m vnca.report.packaged WORKDIR` packs what a run has trained in place of the one of its
kind: the parameters of its newest checkpoint as float16, its config, and its training curve.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vnca.models import Model
from vnca.program import VncaError, checkpoint
from vnca.program.config import KINDS, kind_of
from vnca.program.data import Dataset
from vnca.program.data import load as load_data
from vnca.program.hosts import agree
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_method, make_model
from vnca.program.metrics import CURVE_POINTS, training_curve
from vnca.program.workdir import trained_params


class Packaged(NamedTuple):
    """A trained model, and how it came to be."""

    config: ConfigDict  # of the run that made it
    model: Model
    params: dict  # float32, of values that float16 holds
    curve: np.ndarray  # float32 [100, 2]: update, and the loss (nats) up to it since the last point


def path(kind):
    """The file of the packaged model of this kind."""
    return Path(__file__).with_name(f"packaged_{kind}.npz")


def load(kind, make_method=make_method):
    """The packaged model: "doubling", "nondoubling" or "baseline".

    Raises VncaError for another kind, and for a file that is damaged.
    """
    if kind not in KINDS:
        raise VncaError(f"there is no packaged model {kind!r}: choose {', '.join(KINDS)}")
    try:
        config, restore = checkpoint.load(path(kind))
        config = ConfigDict(config)
        shapes = jax.eval_shape(make_model(config.model).init, jax.random.key(0))
        halves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float16), shapes)
        state = restore({"params": halves, "curve": np.zeros((CURVE_POINTS, 2), np.float32)})
    except VncaError as fault:
        raise VncaError(f"reinstall the package: {fault}") from fault
    params = jax.tree.map(np.float32, state["params"])
    return Packaged(config, make_method(config).model, params, state["curve"])


def stand_in(kind):
    """What evaluation takes where there is no checkpoint: config, parameters, and their file."""
    ready = load(kind)
    return ready.config, ready.params, path(kind)


def pack(workdir):
    """Makes what the run in `workdir` has trained the packaged model of its kind; returns the path.

    Raises VncaError where there is no checkpoint.
    """
    found = checkpoint.newest(workdir)
    if not found:
        raise VncaError(f"{workdir} has no checkpoint")
    _, config, restore = found
    shapes = jax.eval_shape(make_model(ConfigDict(config).model).init, jax.random.key(0))
    halves = jax.tree.map(np.float16, restore({"params": shapes})["params"])
    target = path(kind_of(config["model"]["name"]))
    state = {"params": halves, "curve": training_curve(Path(workdir, "metrics.jsonl"))}
    checkpoint.write_state(target, state, config)
    return target


class TrainedModel(NamedTuple):
    """A trained model and the digits to show it on."""

    config: ConfigDict
    model: Model
    params: dict
    data: Dataset
    curve: np.ndarray  # as of a packaged model
    origin: str  # the file of its parameters


def trained_models(config, workdir, log, make_method=make_method):
    """A TrainedModel of each kind, by its name: the run in `workdir` with its own test set, where
    there is a checkpoint and of its kind; else the packaged model, with the bundled digits.

    Raises VncaError where the checkpoint is of another config.
    """
    found, bundled = {}, load_data("bundled")
    own = agree(lambda: bool(checkpoint.paths(workdir))) and kind_of(config.model.name)
    for kind in KINDS:
        if kind == own:
            settled, data, file, params = trained_params(config, workdir, log, stand_in)
            curve = training_curve(Path(workdir, "metrics.jsonl"))
            model = make_method(settled).model
            found[kind] = TrainedModel(settled, model, params, data, curve, str(file))
        else:
            made, model, params, curve = load(kind, make_method)
            made.eval.chunk = config.eval.chunk  # not that of the machine that trained it
            made = fit_to_machine(made)
            found[kind] = TrainedModel(made, model, params, bundled, curve, path(kind).name)
        log(f"{kind}: {found[kind].origin}{'' if kind == own else ' (comes with the package)'}")
    return found


def codes(model, params, images):
    """The means of q(z|x) of images [N, 32, 32, 1], NumPy [N, latent]."""
    encode = jax.jit(model.encode)
    parts = [encode(params, images[i : i + 500])[0] for i in range(0, len(images), 500)]
    return np.concatenate(parts)


def identity(shown):
    """What tells trained models from others: {kind: [SHA-256 of parameters, name of data]}."""
    return {kind: [checkpoint.params_sha256(s.params), s.data.name] for kind, s in shown.items()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m vnca.report.packaged WORKDIR")
    try:
        print(pack(sys.argv[1]))
    except (OSError, VncaError) as fault:
        sys.exit(f"error: {fault}")
