"""The trained models in the package: they are what they say, and they know digits."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import glyphs
import numpy as np
import pytest
import tiny

from vnca.program import VncaError, evaluate, runs, store
from vnca.program.config import KINDS, adopt, check, differences
from vnca.program.data import load
from vnca.program.metrics import training_curve
from vnca.program.order import fixed_shuffle

# Nats, of 64 images and 4 samples; seen: -88.6, -99.2 and -88.9.
BOUND = {"doubling": -90, "nondoubling": -101, "baseline": -91}


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_of_today_made_it_and_would_resume_it(kind):
    made = runs.packaged(kind)
    config = tiny.committed(f"small_{kind}")
    saved = made.config.to_dict()
    adopt(saved, config)
    assert not differences(saved, config)
    check(made.config)  # it has the fields of today and no others
    assert made.curve[-1, 0] == config.train.updates and (np.diff(made.curve[:, 0]) > 0).all()
    assert made.curve[-10:, 1].mean() < made.curve[:10, 1].mean() - 20
    assert sum(runs.packaged_path(other).stat().st_size for other in KINDS) <= 12e6


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    "kind",
    ["baseline", *(pytest.param(k, marks=pytest.mark.slow) for k in ("doubling", "nondoubling"))],
)
def test_it_knows_digits_that_it_has_not_seen(kind):
    _, model, params, _ = runs.packaged(kind)
    test, numbers = load("bundled").test, fixed_shuffle(64, 10_000)
    parts = evaluate.image_bounds(model, params, test, numbers, 4, 8, 0)
    assert np.concatenate([*parts])[:, 0].mean() > BOUND[kind]


def test_what_is_packed_is_the_newest_of_a_run_to_half_precision(tmp_path):
    config = tiny.config("healing").to_dict()
    whole = np.random.RandomState(0).standard_normal((3, 5)).astype(np.float32)
    for update in 5, 9:
        arrays = {"params/decoder/x": update * whole, "moments/mean/decoder/x": whole}
        store.save(store.checkpoint(tmp_path, update), config, arrays)
    record = {"loss": 590.5, "reconstruction": 1.0, "kl": 1.0, "grad_norm": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"update": 1} | record))
    command = [sys.executable, "-m", "vnca.program.runs", tmp_path, tmp_path / "packed.npz"]
    subprocess.run(command, check=True, cwd=tiny.ROOT)
    header, packed = store.load(tmp_path / "packed.npz")
    assert header == json.loads(json.dumps(config))
    assert packed.keys() == {"params/decoder/x", "curve"}
    np.testing.assert_array_equal(packed["params/decoder/x"], (9 * whole).astype(np.float16))
    np.testing.assert_array_equal(packed["curve"], training_curve(tmp_path / "metrics.jsonl"))


def test_without_a_checkpoint_the_packaged_model_of_an_equal_config_is_evaluated(tmp_path, capsys):
    images, _ = glyphs.draw(20, seed=0)
    np.savez(tmp_path / "mine.npz", train=images, test=images)
    config = tiny.committed("small_baseline")
    config.eval.update(images=8, samples=2)
    config.train.learning_rate = 7.0  # not that of the packaged run
    config.data.update(name="own", dir=str(tmp_path / "mine.npz"))
    evaluate.evaluate(runs.open_run(config, tmp_path / "run", "evaluate"))
    said = capsys.readouterr().out
    assert "has no checkpoint: this is the packaged baseline model" in said
    assert "packaged_baseline.npz was trained on other images: config.data.name is 'own'" in said
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert result["checkpoint"] == "packaged_baseline.npz"
    assert result["config"]["train"] == runs.packaged("baseline").config.train.to_dict()
    config.model.latent_size = 31
    with pytest.raises(VncaError, match="has no checkpoint: train first"):
        runs.open_run(config, tmp_path / "run", "evaluate")


def test_another_kind_is_an_error_that_names_those_there_are():
    with pytest.raises(VncaError, match="'tripling': choose doubling, nondoubling, baseline"):
        runs.packaged("tripling")


@pytest.mark.parametrize("kind", KINDS)
def test_the_ten_lines_of_the_readme_encode_decode_and_sample(kind):
    text = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    names, first = {}, 'packaged("doubling")'
    [program] = [p for p in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if first in p]
    assert len([line for line in program.splitlines() if line]) <= 10 and f'"{kind}"' in program
    exec(program.replace(first, f'packaged("{kind}")'), names)
    assert names["samples"].shape == names["logits"].shape == (8, 32, 32, 1)
    assert len(names["grids"]) == {"doubling": 5, "nondoubling": 1, "baseline": 0}[kind]
    right = np.mean((names["logits"] > 0) == (names["digits"] > 0.5))
    assert np.mean(abs(names["logits"]) > 2) > 0.8 and right > 0.93


# ---- The package ---------------------------------------------------------------------------------


def test_every_folder_of_code_and_every_file_of_data_is_declared():
    declared = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = [p for p in (tiny.ROOT / "vnca").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    names = {path.parent: ".".join(path.parent.relative_to(tiny.ROOT).parts) for path in found}
    assert {*names.values()} == {*declared["packages"]}
    for folder, name in names.items():
        globs = ["*.py", *declared["package-data"].get(name, [])]
        packed = {path for glob in globs for path in folder.glob(glob)}
        assert packed == {path for path in found if path.parent == folder}


LOADS = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
sys.modules["configs"] = sys.modules["main"] = None  # of a checkout: they are not in a wheel
import vnca
for found in pkgutil.walk_packages(vnca.__path__, "vnca."):
    module = importlib.import_module(found.name)
    assert module.__file__.startswith(sys.argv[1]), module
from vnca.program import config, data, runs
for kind in config.KINDS:
    runs.packaged(kind)
print(len(data.load("bundled").train))
"""


@pytest.mark.slow
def test_a_wheel_elsewhere_has_all_modules_models_and_digits(tmp_path):
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
