"""The packaged models give what a NumPy program without any of this code gives in float64."""

from pathlib import Path
from types import SimpleNamespace

import known_answers as independent
import numpy as np
import pytest
import tiny

from vnca.program import check, runs


def test_each_packaged_model_has_known_answers():
    with np.load(check.KNOWN_ANSWERS, allow_pickle=False) as file:
        assert sorted({name.split("/")[0] for name in file}) == runs.packaged_names()


def test_a_packaged_model_without_known_answers_is_left_out(monkeypatch):
    opened = []
    monkeypatch.setattr(runs, "packaged_names", lambda: ["baseline", "mine"])
    monkeypatch.setattr(runs, "packaged", opened.append)
    check.known_answers(SimpleNamespace(plain=True))
    assert opened == ["baseline"]


@pytest.mark.slow  # each compiles for 3 to 6 seconds
@pytest.mark.parametrize("name", independent.DECODERS)
@pytest.mark.parametrize("is_plain", [True, False])
def test_the_packaged_models_give_the_known_answers_in_float32(name, is_plain, monkeypatch):
    monkeypatch.setattr(runs, "packaged_names", lambda: [name])
    found, _ = check.known_answers(SimpleNamespace(plain=is_plain))
    assert len(found.figures) == (5 if name.endswith("healing") else 4)
    assert found.deviation < 5e-6, found.figures


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "baseline")) for n in independent.DECODERS],
)
def test_the_file_is_what_the_numpy_program_writes(name):
    with np.load(check.KNOWN_ANSWERS, allow_pickle=False) as file:
        stored = {key: x for key, x in file.items() if key.startswith(f"{name}/")}
    computed = independent.answers(name)
    assert stored.keys() == {f"{name}/{part}" for part in computed}
    for part, expected in computed.items():
        found = stored[f"{name}/{part}"]
        assert found.dtype == np.float64 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=part)


def test_the_numpy_program_imports_nothing_of_the_package_or_of_jax_and_its_file_is_small():
    source = Path(independent.__file__).read_text(encoding="utf-8")
    assert {name.split(".")[0] for name in tiny.imported(source)} == {
        "json",
        "math",
        "pathlib",
        "numpy",
    }
    assert check.KNOWN_ANSWERS.stat().st_size < 5_333 * len(independent.DECODERS)
