"""The trained models in the package: they are what they say, and they know digits."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import jax
import numpy as np
import pytest
import tiny

from vnca.program import evaluate, runs, store
from vnca.program.config import adopt, completed, differences, validate
from vnca.program.learner import is_plain, validate_model

# Nats, of 64 images and 4 samples; seen: -86.4, -99.2 and -88.9.
BOUND = {"doubling": -88, "healing": -101, "baseline": -91}
FACES = {"faces_doubling": -995, "faces_healing": -1025}  # seen: -977 and -1006
CONFIGS = {name: f"small_{name}" for name in BOUND}
CONFIGS |= {"faces_doubling": "small_faces", "faces_healing": "small_faces_healing"}
every_model = pytest.mark.parametrize(  # automata compile for 6 seconds
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "baseline")) for n in BOUND]
)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_command_of_today_made_it_and_would_resume_it(name):
    made = runs.packaged(name)
    config = tiny.committed(CONFIGS[name])
    assert runs.packaged_name(config) == runs.packaged_name(made.config) == name
    assert runs.packaged_names() == sorted(CONFIGS)
    saved = made.config.to_dict()
    adopt(saved, config)
    assert not differences(saved, config)
    validate(made.config)  # it has the fields of today and no others
    validate_model(made.config)
    update, loss = made.curve.T
    # A run that goes on from another one begins low, and rises while the rate does.
    highest = loss.max() if config.train.start_from else loss[0]
    assert update[-1] == config.train.updates and loss[-1] < highest - 20
    assert runs.packaged_path(name).stat().st_size <= 4e6


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "baseline")) for n in BOUND | FACES],
)
def test_without_a_checkpoint_that_of_an_equal_model_is_evaluated_and_it_knows_unseen_images(
    name, tmp_path
):
    config = tiny.committed(CONFIGS[name])
    config.train.learning_rate = 7.0  # not that of the packaged run
    config.eval.update(images=64, samples=4)
    evaluate.evaluate(runs.open_run(config, tmp_path, "evaluate"))
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["iwelbo"] > (BOUND | FACES)[name]
    assert result["checkpoint"] == f"packaged_{name}.npz"
    assert result["config"]["train"] == runs.packaged(name).config.train.to_dict()
    latent_size, config.model.latent_size = config.model.latent_size, 15
    fault = tiny.fault_of(runs.open_run, config, tmp_path, "evaluate")
    assert (
        f"config.model.latent_size is 15, was {latent_size}: restore these fields, or train first"
        in fault
    )


@pytest.mark.parametrize("name", BOUND)
def test_a_packaged_model_is_plain_and_jax_can_take_any_derivative_of_it(name):
    config, model, params, _ = runs.packaged(name)
    fast = runs.packaged(name, fast=True).model
    assert is_plain(model, config) and not is_plain(fast, config)
    z = jax.ShapeDtypeStruct((1, model.latent_size), np.float32)
    decode = partial(model.decode, jax.tree.map(jax.numpy.asarray, params))
    _, slope = jax.eval_shape(lambda z: jax.jvp(decode, (z,), (z,)), z)
    assert slope.shape == (1, 32, 32, 1)
    curvature = jax.eval_shape(jax.hessian(lambda z: decode(z).sum()), z)
    assert curvature.shape == 2 * (1, model.latent_size)
    assert "custom_vjp" not in str(jax.make_jaxpr(decode)(z))


def test_a_packaged_model_takes_the_steps_that_are_asked_for_and_other_fields_are_named(
    tmp_path, capsys
):
    config = tiny.committed("small_healing")
    config.model.update(steps=24, hidden=7)
    run = runs.open_run(config, tmp_path, "figures")
    assert run.learner.model.steps == run.config.model.steps == 24
    assert run.config.model.hidden == 96
    said = capsys.readouterr().out
    assert "this is the packaged healing model; config.model.hidden is 7, was 96\n" in said


def test_another_mode_is_an_error_that_names_those_there_are(tmp_path):
    fault = tiny.fault_of(runs.open_run, tiny.config(), tmp_path / "run", "dream")
    assert "'dream': choose train, evaluate" in fault and not [*tmp_path.iterdir()]


def test_a_packaged_file_that_is_not_there_costs_one_line_that_names_it(tmp_path, monkeypatch):
    path = tmp_path / "packaged_baseline.npz"
    monkeypatch.setattr(runs, "packaged_path", lambda name: path)
    with pytest.raises(FileNotFoundError) as fault:
        runs.packaged("baseline")
    assert tiny.one_line(fault, path)
    fault = tiny.fault_of(runs.open_run, tiny.committed("small_baseline"), tmp_path, "evaluate")
    assert f"has no checkpoint, and {path} is not there: train first" in fault


def test_a_model_is_packed_and_what_a_killed_pack_has_left_goes(tmp_path):
    config, arrays = store.load(runs.packaged_path("baseline"))
    (tmp_path / "run").mkdir()
    store.save(store.checkpoint(tmp_path / "run", 7), config, arrays)
    (tmp_path / f".model.npz.0123{store.TEMPORARY}").touch()
    path = runs.pack(tmp_path / "run", tmp_path / "model.npz")
    found = runs.find(path, "baseline")
    assert found.config == completed(config) and found.arrays.keys() == arrays.keys()
    assert {*tmp_path.iterdir()} == {tmp_path / "run", path}
    store.save(path, {"seed": 0}, {})  # as the header of a progress file is
    assert f"{path} is not a checkpoint" in tiny.fault_of(runs.pack, path)


WRONG = {  # arguments of python -m vnca.program.…: what the line says
    "runs": "vnca.program.runs WORKDIR [FILE]: missing",
    "runs a b c": "vnca.program.runs WORKDIR [FILE]: too many",
    "runs nowhere": "WORKDIR=nowhere: there is no checkpoint",
    "data": "vnca.program.data IDX_DIR: missing",
    "data nowhere": "nowhere: No such file",
}


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("given", WRONG)
def test_a_wrong_argument_of_a_module_that_is_run_is_one_line(given, monkeypatch):
    module, *arguments = given.split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"vnca.program.{module}", run_name="__main__")
    assert tiny.one_line(end, "error: ", WRONG[given])  # Python prints it; its status is 1 then


@pytest.mark.slow  # each compiles for 6 seconds
@every_model
def test_the_ten_lines_of_the_readme_encode_decode_and_sample(name):
    text = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    program, names = text.split("```python\n")[1].split("```")[0], {}
    assert program.replace("\n\n", "\n").count("\n") <= 10
    exec(program.replace('packaged("doubling")', f'packaged("{name}")'), names)
    assert names["samples"].shape == names["logits"].shape == (8, 32, 32, 1)
    assert len(names["grids"]) == {"doubling": 5, "healing": 1, "baseline": 0}[name]
    right = np.mean((names["logits"] > 0) == (names["digits"] > 0.5))
    assert right > 0.93


# ---- The package ---------------------------------------------------------------------------------


LOADS = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
sys.modules["configs"] = sys.modules["main"] = None  # of a checkout: they are not in a wheel
import vnca
for found in pkgutil.walk_packages(vnca.__path__, "vnca."):
    module = importlib.import_module(found.name)
    assert module.__file__.startswith(sys.argv[1]), module
from vnca.program import data, runs
for name in runs.packaged_names():
    runs.packaged(name)
print(len(data.load("bundled").train))
data.load("faces", None, runs.packaged("faces_doubling").model.likelihood)
"""


@pytest.mark.slow  # builds a wheel, for 5 seconds
def test_a_wheel_elsewhere_has_all_modules_models_and_digits(tmp_path):
    # From a copy, since building leaves files behind.
    kept = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "tests", "__pycache__")
    shutil.copytree(tiny.ROOT, tmp_path / "checkout", ignore=kept)
    environment = {"env": os.environ | {"PYTHONPATH": ""}, "cwd": tmp_path}
    wheel = "pip --disable-pip-version-check wheel --quiet --no-index --no-deps ./checkout"
    command = [sys.executable, "-m", *wheel.split(), "--no-build-isolation"]
    subprocess.check_call(command, **environment)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 20_000_000
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    packed, there = (
        {path.relative_to(root) for path in root.glob("vnca/**/*.*") if path.suffix != ".pyc"}
        for root in (tmp_path / "site", tmp_path / "checkout")
    )
    assert packed == there
    shutil.rmtree(tmp_path / "checkout")
    command = [sys.executable, "-I", "-c", LOADS, tmp_path / "site"]
    assert subprocess.check_output(command, **environment) == b"60000\n"
