"""What the reports show: one trained model of each kind, the run's own or a packaged one."""

from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vnca.models import Model
from vnca.program import data, runs
from vnca.program.check import trusted
from vnca.program.config import KINDS, kind_of
from vnca.program.method import make_method, param_shapes
from vnca.program.metrics import training_curve
from vnca.program.progress import sha256
from vnca.program.stop import say


class TrainedModel(NamedTuple):
    """A trained model, and the images to show it with."""

    config: ConfigDict
    model: Model
    params: dict
    data: data.Dataset
    curve: np.ndarray  # float32 [100, 2]: update, and mean loss (nats) since the previous point
    origin: str  # the file that holds its parameters


def trained_models(run):
    """One trained model of each kind: {kind: TrainedModel}.

    The run's is the model of its kind, with the run's images. The other kinds are the packaged
    models, with the bundled digits.
    """
    models = {}
    for kind in KINDS:
        if kind == kind_of(run.config.model.name):
            shown = trained_model(run.found, run.config, run.data, run.plain)
        else:
            shown = packaged_model(kind, run.plain)
            shown.config.eval.chunk = run.config.eval.chunk  # as --config.eval.chunk has it, if set
        say(f"{kind}: {shown.origin}, {shown.data.name} images")
        models[kind] = shown
    return models


def packaged_model(kind, plain):
    """The packaged TrainedModel of a kind, with the bundled digits."""
    found = runs.find("packaged", kind)
    return trained_model(found, ConfigDict(found.config), data.load("bundled"), plain)


def trained_model(found, config, images, plain):
    """The TrainedModel of a config, with the parameters that were found (runs.Found)."""
    model = trusted(make_method(config, plain), config).model
    params = found.restore("params/", param_shapes(model))
    curve = found.arrays.get("curve")
    if curve is None:
        curve = training_curve(found.path.with_name("metrics.jsonl"))
    packaged = runs.packaged_path(kind_of(config.model.name))
    origin = packaged.name if found.path == packaged else str(found.path)
    return TrainedModel(config, model, params, images, curve, origin)


def posterior_means(model, params, images):
    """The means of q(z|x) of images [N, 32, 32, 1]: NumPy float32 [N, latent]."""
    encode = jax.jit(model.encode)
    starts = range(0, len(images), 500)
    return np.concatenate([encode(params, images[i : i + 500])[0] for i in starts])


def fingerprints(models):
    """Identifies trained models by {kind: [SHA-256 of the parameters, identity of the data]}."""
    return {kind: [sha256(m.params), m.data.identity] for kind, m in models.items()}
