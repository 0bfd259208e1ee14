"""The packaged models give what a NumPy program without any of this code gives in float64."""

from pathlib import Path
from types import SimpleNamespace

import known_answers as independent
import numpy as np
import pytest
import tiny

from vnca.program import check
from vnca.program.config import KINDS

every_kind = pytest.mark.parametrize(
    "kind", ["baseline", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[:2])]
)


@every_kind
@pytest.mark.parametrize("is_plain", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_packaged_models_give_the_known_answers_in_float32(kind, is_plain, monkeypatch):
    monkeypatch.setattr(check, "KINDS", [kind])
    found, _ = check.known_answers(SimpleNamespace(plain=is_plain))
    assert len(found.figures) == (5 if kind == "nondoubling" else 4)
    assert found.deviation < 5e-6, found.figures


@every_kind
def test_the_file_is_what_the_numpy_program_writes(kind):
    with np.load(check.KNOWN_ANSWERS, allow_pickle=False) as file:
        stored = {name: x for name, x in file.items() if name.startswith(kind)}
    computed = independent.answers(kind)
    assert stored.keys() == {f"{kind}/{name}" for name in computed}
    for name, expected in computed.items():
        found = stored[f"{kind}/{name}"]
        assert found.dtype == np.float64 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=name)


def test_the_numpy_program_imports_nothing_of_the_package_or_of_jax_and_its_file_is_small():
    source = Path(independent.__file__).read_text(encoding="utf-8")
    assert {name.split(".")[0] for name in tiny.imported(source)} == {"json", "pathlib", "numpy"}
    assert check.KNOWN_ANSWERS.stat().st_size < 16_000
