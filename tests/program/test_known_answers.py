"""The packaged models give what a NumPy program without any of this code gives in float64."""

from pathlib import Path

import known_answers as independent
import numpy as np
import pytest
import tiny

from vnca.program import check, runs
from vnca.program.config import KINDS
from vnca.program.method import make_method

every_kind = pytest.mark.parametrize(
    "kind", ["baseline", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[:2])]
)


@pytest.mark.slow  # test_check.py has that of the baseline, in the fast form
@pytest.mark.parametrize("plain", [True, False])
def test_the_packaged_models_give_the_known_answers_in_float32(plain, tmp_path):
    config = tiny.config()
    run = runs.Run(config, tmp_path, plain, topology=None, method=make_method(config, plain))
    results = [result for result in check.known_answers(run) if result.what == "known answers"]
    names = {
        name.split("/")[0]: len(result.figures) for result in results for name in result.figures
    }
    assert names == {"doubling": 4, "nondoubling": 5, "baseline": 4}
    assert all(0 < result.deviation < result.tolerance == 5e-6 for result in results)


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


def test_the_numpy_program_imports_nothing_of_the_package_or_of_jax():
    source = Path(independent.__file__).read_text(encoding="utf-8")
    assert {name.split(".")[0] for name in tiny.imported(source)} == {"json", "pathlib", "numpy"}


def test_the_file_is_small():
    assert check.KNOWN_ANSWERS.stat().st_size < 16_000
