"""The trained models in the package: they are what they say, and they know digits."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import glyphs
import jax
import numpy as np
import pytest
import reference
import tiny

from vnca.program import VncaError, checkpoint, evaluate
from vnca.program.config import adopt, differences, flatten
from vnca.program.data import load
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_model
from vnca.program.metrics import training_curve
from vnca.program.order import fixed_shuffle
from vnca.report import packaged
from vnca.training import State

pytestmark = pytest.mark.usefixtures("quickly_compiled")

# Nats, of 64 images and 4 samples; seen: -88.6, -99.2 and -88.9.
BOUND = {"doubling": -90, "nondoubling": -101, "baseline": -91}


@pytest.fixture(params=packaged.KINDS)
def kind(request):
    return request.param


def test_a_committed_config_made_it(kind):
    config = importlib.import_module(f"configs.small_{kind}").get_config()
    made, said = flatten(packaged.load(kind).config), flatten(config)
    for field, value in said.items():  # what is unset there was fitted to the machine
        assert made[field] == value or value is None or field.startswith("eval."), field
    assert {f for f in made if f.startswith("model.")} <= set(said)  # or no command finds it


@pytest.mark.parametrize(
    "kind",
    ["baseline", *(pytest.param(k, marks=pytest.mark.slow) for k in ("doubling", "nondoubling"))],
)
def test_it_knows_digits_that_it_has_not_seen(kind):
    _, model, params, _ = packaged.load(kind)
    test, numbers = load("bundled").test, fixed_shuffle(64, 10_000)
    parts = evaluate.image_bounds(model, params, test, numbers, 4, 8, 0)
    assert np.concatenate(list(parts))[:, 0].mean() > BOUND[kind]


def test_its_curve_ends_with_its_training_and_lower_than_it_began(kind):
    config, _, _, curve = packaged.load(kind)
    assert curve[-1, 0] == config.train.updates and np.all(np.diff(curve[:, 0]) > 0)
    assert curve[-10:, 1].mean() < curve[:10, 1].mean() - 20


def test_all_together_are_at_most_12_megabytes():
    assert sum(packaged.path(kind).stat().st_size for kind in packaged.KINDS) <= 12e6


def test_what_is_packed_is_the_run_to_half_precision(tmp_path, monkeypatch):
    config = fit_to_machine(tiny.config("baseline", train__updates=5))
    shapes = jax.eval_shape(make_model(config.model).init, jax.random.key(0))
    params = reference.numbers_like(shapes, 1, 0.2)
    checkpoint.save(tmp_path, State(params, {}, np.int32(5), ()), config.to_dict(), 1)
    losses = [590.5, 580.25, 570.0, 560.0, 550.5]
    lines = [json.dumps({"update": n, "loss": loss}) for n, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    monkeypatch.setattr(packaged, "path", lambda kind: tmp_path / f"packaged_{kind}.npz")
    assert packaged.pack(tmp_path) == tmp_path / "packaged_baseline.npz"
    loaded = packaged.load("baseline")
    for x, whole in zip(*map(jax.tree.leaves, (loaded.params, params)), strict=True):
        assert x.dtype == np.float32 and not np.array_equal(x, whole)
        np.testing.assert_array_equal(x, whole.astype(np.float16))
    np.testing.assert_allclose(loaded.curve[[0, 99]], [[1, losses[0]], [5, losses[4]]], rtol=1e-6)
    assert checkpoint.load(tmp_path / "packaged_baseline.npz")[0]["train"]["updates"] == 5


def test_the_packaged_nondoubling_model_is_the_healing_one_of_the_small_config():
    made, small = packaged.load("nondoubling").config, tiny.committed("small_nondoubling")
    assert made.model.name == "healing" and flatten(made.model) == flatten(small.model)
    assert differences(made.to_dict(), adopt(made.to_dict(), small)) == []


def test_a_healing_run_is_shown_and_packed_as_the_nondoubling_model(tmp_path, monkeypatch):
    config = fit_to_machine(tiny.config("healing"))
    shapes = jax.eval_shape(make_model(config.model).init, jax.random.key(0))
    params = reference.numbers_like(shapes, 1, 0.2)
    for update in 5, 9:
        checkpoint.save(tmp_path, State(params, {}, np.int32(update), ()), config.to_dict(), 2)
    shown = packaged.trained_models(config, tmp_path, lambda _: None)
    assert shown["nondoubling"].origin.endswith("checkpoint_00000009.npz")
    shown = packaged.trained_models(config, tmp_path, lambda _: None, which="5")
    assert list(shown) == ["doubling", "nondoubling", "baseline"]
    assert shown["nondoubling"].config.model.name == "healing"
    assert shown["nondoubling"].origin.endswith("checkpoint_00000005.npz")
    monkeypatch.setattr(packaged, "path", lambda kind: tmp_path / f"packaged_{kind}.npz")
    assert packaged.pack(tmp_path).name == "packaged_nondoubling.npz"
    assert packaged.load("nondoubling").config.model.name == "healing"


def test_a_run_without_metrics_has_a_curve_of_nothing(tmp_path):
    assert np.isnan(training_curve(tmp_path / "metrics.jsonl")).all()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"update": 1, "test_iwelbo": -3.0}\n{"upd')
    assert np.isnan(training_curve(tmp_path / "metrics.jsonl")).all()


def test_evaluation_without_a_checkpoint_takes_the_packaged_model_and_says_so(tmp_path):
    config = importlib.import_module("configs.small_baseline").get_config()
    config.eval.update(images=8, samples=2)
    config.train.learning_rate = 7.0  # not that of the packaged run
    lines = []
    evaluate.evaluate(config, tmp_path / "new", lines.append, packaged.stand_in)
    assert lines[0].endswith("has no checkpoint: this is the packaged baseline model")
    assert not any("warning" in line for line in lines)
    result = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert result["checkpoint"] == "packaged_baseline.npz" and result["iwelbo"] > -130
    made = packaged.load("baseline").config
    assert result["config"]["train"] == made.train.to_dict()
    images, _ = glyphs.draw(20, seed=0)
    np.savez(tmp_path / "mine.npz", train=images, test=images)
    config.data.update(name="own", dir=str(tmp_path / "mine.npz"))
    evaluate.evaluate(config, tmp_path / "own", lines.append, packaged.stand_in)
    assert any("baseline.npz was trained on other images (bundled)" in line for line in lines)
    config.model.latent_size = 31
    with pytest.raises(VncaError, match="train first.*configs/small_baseline.py"):
        evaluate.evaluate(config, tmp_path / "other", lines.append, packaged.stand_in)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def own_images(tmp_path):
    """A file of one's own images: glyphs."""
    images, labels = glyphs.draw(20, seed=0)
    np.savez(tmp_path / "mine.npz", train=images, test=images, test_labels=labels)
    return str(tmp_path / "mine.npz")


def test_without_a_checkpoint_the_packaged_model_is_shown_with_the_images_that_are_named(
    tmp_path, own_images
):
    config, lines = tiny.committed("small_baseline"), []
    found = packaged.trained_models(config, tmp_path / "run", lines.append)
    assert lines[0] == f"{tmp_path}/run has no checkpoint: these are the packaged models"
    assert {trained.data.name for trained in found.values()} == {"bundled"}
    config.data.update(name="own", dir=own_images)
    lines.clear()
    named = packaged.trained_models(config, tmp_path / "run", lines.append)
    assert len(named["baseline"].data.test) == 20 and named["baseline"].data.name == "own"
    assert {named[kind].data.name for kind in ("doubling", "nondoubling")} == {"bundled"}
    assert "baseline: packaged_baseline.npz (packaged model), own images" in lines
    for part in ("params", "curve"):
        jax.tree.map(
            np.testing.assert_array_equal,
            getattr(named["baseline"], part),
            getattr(found["baseline"], part),
        )


@pytest.mark.parametrize("name", ["doubling", "quickstart"])
def test_images_that_are_named_for_a_model_that_is_not_there_are_refused(
    tmp_path, own_images, name
):
    config = tiny.committed(name)
    config.data.update(name="own", dir=own_images)
    for _ in range(2):
        with pytest.raises(VncaError, match="has no checkpoint: train first"):
            packaged.trained_models(config, tmp_path / "run", lambda line: None)
        config.data.update(name="auto")  # the folder alone names them, too


def test_a_damaged_packaged_model_asks_for_the_package_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "path", lambda kind: tmp_path / "packaged_baseline.npz")
    (tmp_path / "packaged_baseline.npz").write_bytes(b"PK")
    with pytest.raises(VncaError, match="^reinstall the package: .*packaged_baseline.npz"):
        packaged.load("baseline")


def test_the_curve_of_a_run_is_that_beside_its_checkpoint(tmp_path):
    config = fit_to_machine(tiny.config("baseline"))
    shapes = jax.eval_shape(make_model(config.model).init, jax.random.key(0))
    params = reference.numbers_like(shapes, 1, 0.2)
    checkpoint.save(tmp_path, State(params, {}, np.int32(2), ()), config.to_dict(), 1)
    lines = [json.dumps({"update": n, "loss": 100.0 * n}) + "\n" for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    elsewhere = tmp_path / "elsewhere"
    [file] = tmp_path.glob("checkpoint_*.npz")
    for workdir, which in ((tmp_path, None), (elsewhere, str(file))):
        found = packaged.trained_models(config, workdir, lambda line: None, which=which)
        np.testing.assert_array_equal(
            found["baseline"].curve, training_curve(file.with_name("metrics.jsonl"))
        )
        assert np.nanmax(found["baseline"].curve) == 200


def test_every_folder_of_code_and_every_file_of_data_is_declared():
    declared = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in of_package("vnca")}
    assert {".".join(f.relative_to(tiny.ROOT).parts) for f in folders} == set(declared["packages"])
    for folder in folders:
        globs = declared["package-data"].get(".".join(folder.relative_to(tiny.ROOT).parts), [])
        packed = {path for glob in ["*.py", *globs] for path in folder.glob(glob)}
        assert packed == {path for path in of_package(folder) if path.parent == folder}


def of_package(folder):
    """The files of a package of this checkout."""
    found = (tiny.ROOT / folder).rglob("*")
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


LOADS = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
sys.modules["configs"] = sys.modules["main"] = None  # of a checkout: they are not in a wheel
import vnca
for found in pkgutil.walk_packages(vnca.__path__, "vnca."):
    module = importlib.import_module(found.name)
    assert module.__file__.startswith(sys.argv[1]), module
import vnca.program.command, vnca.program.data, vnca.report.packaged as packaged
assert "train.batch_size" in vnca.program.config.FIELDS
for kind in packaged.KINDS:
    packaged.load(kind)
print(len(vnca.program.data.load("bundled").train))
"""


@pytest.mark.slow
def test_all_modules_of_a_wheel_elsewhere_are_imported_and_its_models_and_digits_loaded(tmp_path):
    # From a copy, since building leaves files behind.
    kept = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "tests", "__pycache__")
    shutil.copytree(tiny.ROOT, tmp_path / "checkout", ignore=kept)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    alone = ["--no-index", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"PYTHONPATH": ""}
    for command in (
        [*pip, "wheel", "--quiet", *alone, "--wheel-dir", tmp_path, tmp_path / "checkout"],
        [*pip, "install", "--quiet", *alone, "--target", tmp_path / "site", "vnca",
         "--find-links", tmp_path],
    ):  # fmt: skip
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    shutil.rmtree(tmp_path / "checkout")
    said = subprocess.run(
        [sys.executable, "-I", "-c", LOADS, tmp_path / "site"],
        check=True, env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout == "60000\n"


def test_another_kind_is_an_error_that_names_those_there_are():
    with pytest.raises(VncaError, match="'tripling': choose doubling, nondoubling, baseline"):
        packaged.load("tripling")


# By default the automata, since test_it_knows_digits_that_it_has_not_seen then takes the baseline.
@pytest.mark.parametrize(
    "kind", ["doubling", "nondoubling", pytest.param("baseline", marks=pytest.mark.slow)]
)
def test_the_ten_lines_of_the_readme_encode_decode_and_sample(kind):
    text = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    program, _ = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in program.splitlines() if line]) <= 10
    assert program.count('load("doubling")') == 1 and f'"{kind}"' in program
    names = {}
    exec(program.replace('load("doubling")', f'load("{kind}")'), names)
    latents = {"doubling": 64, "nondoubling": 16, "baseline": 32}[kind]
    assert names["mean"].shape == (8, latents) and names["logits"].shape == (8, 32, 32, 1)
    assert names["samples"].shape == (8, 32, 32, 1) and names["samples"].min() >= 0
    sides = {"doubling": [2, 4, 8, 16, 32], "nondoubling": [32], "baseline": []}
    assert [grid.shape[2] for grid in names["grids"]] == sides[kind]
    sure = np.mean(abs(names["logits"]) > 2)  # of pixels: it has an opinion, as a trained model has
    right = np.mean((names["logits"] > 0) == (names["digits"] > 0.5))
    assert sure > 0.8 and right > 0.93
