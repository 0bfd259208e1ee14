"""What the reports show: the run's trained model, and the packaged models beside it."""

from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vnca.model import Model, make_likelihood
from vnca.program import data, runs
from vnca.program.check import trusted
from vnca.program.learner import make_learner, param_shapes
from vnca.program.metrics import training_curve
from vnca.program.stop import say
from vnca.program.trees import sha256


class TrainedModel(NamedTuple):
    """A trained model, and the images to show it with."""

    config: ConfigDict
    model: Model
    params: dict
    data: data.Dataset
    curve: np.ndarray  # float32 [100, 2]: update, and mean loss (nats) since the previous point
    origin: str  # the file that holds its parameters


def trained_models(run):
    """The run's model with the run's images, and the packaged models of other names that are made
    for such images, with the images of the package: {config.model.name: TrainedModel}, the run's
    first."""
    own = run.config.model.name
    models = {own: trained_model(run.saved, run.config, run.data, run.plain)}
    for packaged in runs.packaged_names():
        config = ConfigDict(runs.find("packaged", packaged).config)
        name = config.model.name
        if name != own and make_likelihood(config.model) is models[own].model.likelihood:
            models[name] = packaged_model(packaged, run.plain)
            models[name].config.eval.chunk = run.config.eval.chunk  # as --config.eval.chunk has it
    for name, trained in models.items():
        say(f"{name}: {trained.origin}, {trained.data.name} images")
    return models


def packaged_model(name, plain):
    """The packaged TrainedModel of a name, with the images of the package that it is made for."""
    saved = runs.find("packaged", name)
    config = ConfigDict(saved.config)
    images = data.load(config.data.name, None, make_likelihood(config.model))
    return trained_model(saved, config, images, plain)


def trained_model(saved, config, images, plain):
    """The TrainedModel of a config, with the parameters that were saved (runs.Saved)."""
    model = trusted(make_learner(config, plain), config).model
    params = saved.restore("params/", param_shapes(model))
    curve = saved.arrays.get("curve")
    if curve is None:
        curve = training_curve(saved.path.with_name("metrics.jsonl"))
    packaged = runs.packaged_path(runs.packaged_name(config))
    origin = packaged.name if saved.path == packaged else str(saved.path)
    return TrainedModel(config, model, params, images, curve, origin)


def class_labels(data):
    """The labels of the test images, int [N]. Those without labels are dealt to ten classes."""
    return np.arange(len(data.test)) % 10 if data.test_labels is None else data.test_labels


def class_names(data, count):
    """What classes 0, 1, … count − 1 are called: a list of strings."""
    return list(data.class_names or map(str, range(count)))[:count]


def posterior_means(model, params, x):
    """The means of q(z|x) of images x [N, H, W, colours]: NumPy float32 [N, latent]."""
    encode = jax.jit(model.encode)
    starts = range(0, len(x), 500)
    return np.concatenate([encode(params, x[i : i + 500])[0] for i in starts])


def fingerprints(models):
    """Identifies trained models by {name: [SHA-256 of the parameters, identity of the data]}."""
    return {name: [sha256(m.params), m.data.identity] for name, m in models.items()}
