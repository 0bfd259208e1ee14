"""A model of one's own, in a file of its own, of small images in three colours: the reports go by
what it can do."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from vnca import models
from vnca.program import runs
from vnca.program.learner import make_learner
from vnca.program.pictures import prior_samples, shown
from vnca.report import study
from vnca.report.figures import figures
from vnca.report.operations import operations
from vnca.report.summary import summary
from vnca.training import init_state

MINE = '''
from functools import lru_cache

import jax
import jax.numpy as jnp

from vnca import layers
from vnca.model import encoder_init, fixed_grid_model


@lru_cache
def make(
    nn, likelihood, latent_size: int, encoder_width: int, steps: int, train_steps: tuple,
    gain: float,
):
    """An automaton whose cells are logits and z, and whose steps are one convolution."""
    channels = likelihood.outputs + latent_size

    def init(key):
        encoder_key, decoder_key = jax.random.split(key)
        return {
            "encoder": encoder_init(encoder_key, likelihood, encoder_width, latent_size),
            "decoder": layers.conv_init(decoder_key, 3, channels, channels),
        }

    def initial_cells(z):
        grid = len(z), likelihood.size, likelihood.size, latent_size
        cells = jnp.broadcast_to(z[:, None, None], grid)
        return jnp.pad(cells, [(0, 0)] * 3 + [(likelihood.outputs, 0)])

    def step(params, s):
        return s + gain * jnp.tanh(nn.conv(params["decoder"], s, padding=1))

    return fixed_grid_model(
        nn, likelihood, latent_size, init, initial_cells, step, steps, train_steps
    )
'''
FIELDS = {
    "name": "mine",
    "likelihood": "binomial",
    "size": 16,
    "colours": 3,
    "levels": 15,
    "latent_size": 4,
    "encoder_width": 1,
    "steps": 2,
    "train_steps": (2, 3),
    "gain": 0.5,
}
PARAMS = 75 * 1 + 25 * (1 * 2 + 2 * 4 + 4 * 8 + 8 * 16) + 31 + 16 * 8 + 8 + 9 * 7 * 7 + 7
# On 16×16 … 1×1 cells, and a linear map of the last one.
ENCODER = 16**2 * 75 * 1 + 25 * (8**2 * 2 + 4**2 * 8 + 2**2 * 32 + 1 * 128) + 16 * 8
STEP = 16**2 * 9 * 7 * 7
IMAGES = np.random.RandomState(0).randint(256, size=(80, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config of the model, whose file is found as if it were in vnca/models/."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setattr(models, "mine", None, raising=False)  # so that it is forgotten after this
    labels = np.arange(80) % 4
    images = {"train": IMAGES, "test": IMAGES, "train_labels": labels, "test_labels": labels}
    np.savez(tmp_path / "images.npz", **images)
    made = tiny.config("nondoubling", eval__images=4, eval__samples=2, eval__chunk=4)
    made.model = ConfigDict(FIELDS)
    made.data.name, made.data.dir = "own", str(tmp_path / "images.npz")
    made.train.damage_size = 8
    yield made
    sys.modules.pop("vnca.models.mine", None)


def test_its_parameters_and_its_work_are_counted(config, tmp_path, capsys):
    summary(runs.open_run(config, tmp_path / "run", "summary"))
    lines = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    numbers = [int(words[-1].replace(",", "")) for words in lines if words[-1][0].isdigit()]
    work = ENCODER, 2 * STEP, ENCODER + 2 * STEP, ENCODER + 3 * STEP  # T = 2, and in training 3
    update = 2 * 32 * 3 * (ENCODER + 3 * STEP)
    pool = 64 // jax.device_count() * (4 * 16**2 * 7 + 4)
    memory = 4 * PARAMS, 8 * PARAMS, pool, 80 * 16**2 * 3
    wanted = PARAMS, *work, update, *memory
    start = numbers.index(PARAMS)
    assert tuple(numbers[start : start + len(wanted)]) == wanted


def test_its_operations_add_up(config, tmp_path):
    operations(runs.open_run(config, tmp_path / "run", "operations"))
    text = (tmp_path / "run" / "operations.txt").read_text()
    update, evaluation = (
        [int(line.split()[0].replace(",", "")) for line in part.splitlines()[:4]]
        for part in text.split(" operations\n")[1:]
    )
    strided = ENCODER - 16**2 * 75 - 16 * 8
    # Training takes 3 steps, and 2 or 3 of them count as 3. The image itself has no gradient.
    parts = [32 * 3 * (ENCODER + 3 * STEP), -32 * 16**2 * 75, 32 * 3 * strided]
    assert update == [*parts, sum(parts)]
    assert evaluation == [ENCODER + 2 * STEP, 0, 0, ENCODER + 2 * STEP]


@pytest.mark.slow  # draws every picture and plot
def test_it_is_studied_and_shown_as_what_it_can_do(config, tmp_path, monkeypatch, capsys):
    plots = pytest.importorskip("vnca.report.plots")
    monkeypatch.setattr(study, "PRIOR_SAMPLES", 4)
    places = SimpleNamespace(fit_transform=lambda codes: codes[:, :2])  # t-SNE takes seconds
    monkeypatch.setattr(plots, "TSNE", lambda **_: places)
    workdir = tmp_path / "run"
    with tiny.fast_compilation():
        run = runs.open_run(config, workdir)
        state = init_state(run.learner, run.config, run.data.train)
        runs.save(run, jax.device_get(state), keep=1)
        run.unlock()
        study.study(runs.open_run(config, workdir, "study"))
        figures(runs.open_run(config, workdir, "figures"))
    found = json.loads((workdir / "study.json").read_text())
    assert list(found["recovery"]["mine"]) == ["0", "2", "4", "6", "8", "10"]
    # No packaged model is for such images.
    sections = "healing", "stability", "iwelbo", "reconstruction"
    assert [list(found[section]) for section in sections] == [["mine"]] * 4
    drawn = {path.name for path in workdir.glob("figures/*")}
    assert {f"{draw.__name__}.png" for draw in plots.PLOTS} - drawn == {"training.png"}
    assert {name.removeprefix("mine_") for name in drawn if name.startswith("mine_")} == {
        "samples.png", "sampled_pixels.png", "reconstructions.png", "growth.png", "recovery.png",
        "channels.png", "recovery_animated.png", "stability.png", "arrays.npz",
    }  # fmt: skip
    said = capsys.readouterr().out.replace("has no checkpoint", "")
    assert said.count("no ") == 2 and "no training.png: no update of a run is on record" in said
    arrays = np.load(workdir / "figures" / "mine_arrays.npz")
    model = make_learner(config, plain=True).model
    samples = model.decode(state.params, prior_samples(0, 32, 4))
    np.testing.assert_allclose(arrays["samples"], shown(model, samples), atol=1e-5)
    assert arrays["samples"].shape == (32, 16, 16, 3)
