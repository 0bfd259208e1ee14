"""The packaged models give what a NumPy program without any of this code gives in float64."""

from functools import cache, partial
from pathlib import Path

import jax
import known_answers as independent
import numpy as np
import pytest
import tiny

from vnca import layers
from vnca.program.check import deviations
from vnca.program.data import load
from vnca.program.method import make_method
from vnca.report import known_answers, packaged

BITS = load("bundled").test[: known_answers.IMAGES]
# The other method is that of accelerators or of a CPU: the check of a machine compares both.
SLOW = pytest.mark.slow
METHODS = [True, pytest.param(False, marks=SLOW)]
every_kind = pytest.mark.parametrize(
    "kind", ["baseline", *(pytest.param(k, marks=SLOW) for k in ("doubling", "nondoubling"))]
)


@cache
def of_package(kind, is_plain=True):
    return packaged.load(kind, partial(make_method, plain=is_plain))


@cache
def compiled(kind, is_plain=True):
    return jax.jit(partial(known_answers.answers, of_package(kind, is_plain).model))


@every_kind
@pytest.mark.parametrize("is_plain", METHODS)
def test_the_packaged_models_give_the_known_answers_in_float32(kind, is_plain):
    made = of_package(kind, is_plain)
    found = compiled(kind, is_plain)(made.params, BITS)
    found = deviations(found, known_answers.load(kind))
    assert len(found) == (5 if kind == "nondoubling" else 4)
    assert max(found.values()) < known_answers.TOLERANCE, found


@every_kind
def test_the_file_is_what_the_numpy_program_writes(kind):
    stored, computed = known_answers.load(kind), independent.answers(kind)
    assert stored.keys() == computed.keys()
    for name, array in stored.items():
        assert array.dtype == np.float64 and array.shape == computed[name].shape
        np.testing.assert_allclose(array, computed[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_the_numpy_program_imports_nothing_of_the_package_or_of_jax():
    source = Path(independent.__file__).read_text(encoding="utf-8")
    assert {name.split(".")[0] for name in tiny.imported(source)} == {"json", "pathlib", "numpy"}


def test_the_file_is_small():
    assert known_answers.FILE.stat().st_size < 16_000


@pytest.mark.parametrize(
    "fault", ["weight", "pixel", "answer", "noise", pytest.param("activation", marks=SLOW)]
)
def test_a_small_fault_is_beyond_the_tolerance(fault, monkeypatch):
    made, known = of_package("baseline"), known_answers.load("baseline")
    params, bits, compute = (
        jax.tree.map(np.array, made.params),
        np.array(BITS),
        compiled("baseline"),
    )
    if fault == "weight":
        params["encoder"]["conv0"]["kernel"][2, 2, 0, 0] *= 1.01
    if fault == "pixel":
        bits[3, 49] ^= 1
    if fault == "answer":
        known["logits"][5, 2] += 1e-3
    if fault == "activation":
        monkeypatch.setattr(layers, "elu", lambda x: jax.nn.elu(x, 1.0001))
        compute = jax.jit(partial(known_answers.answers, made.model))
    if fault == "noise":
        noise = known_answers.noise(made.model.latent_size)[::-1]
        monkeypatch.setattr(known_answers, "noise", lambda _: noise)
        compute = jax.jit(partial(known_answers.answers, made.model))
    found = deviations(compute(params, bits), known)
    assert max(found.values()) > 2 * known_answers.TOLERANCE, found


def test_what_is_not_a_number_is_infinitely_far_from_the_answer():
    known = {"logits": np.ones((16, 6))}
    found = {"logits": np.ones((16, 6), np.float32)}
    assert deviations(found, known) == {"logits": 0.0}
    found["logits"][3, 2] = np.nan
    assert deviations(found, known) == {"logits": np.inf}
