"""The check of a machine passes where it computes right, and fails where a part of it is broken."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax
from ml_collections import ConfigDict

from vnca import training
from vnca.fast import cpu, tpu
from vnca.models import healing
from vnca.program import check, machine, runs
from vnca.program.config import flatten
from vnca.program.learner import make_learner

pytestmark = pytest.mark.usefixtures("quickly_compiled")
slow = pytest.mark.slow


def fitted(name="baseline", **fields):
    config = tiny.config(name, **fields)
    machine.fit(config)
    return config


# ---- Faults --------------------------------------------------------------------------------------


def compared(part):
    """The results of a part of the check, which is named, or of the comparison of the fast form of
    a model with the plain method, for training in bfloat16; "tpu" is the doubling one's there, and
    "colour" the healing one's for images of 16×16 pixels in colour."""
    if part in (KNOWN, LOSSES):
        return getattr(check, part)(SimpleNamespace(plain=False))
    on = {"platform": "tpu", "device_kind": "TPU v5 lite"} if part == "tpu" else {}
    name = {"tpu": "doubling", "colour": "healing"}.get(part, part)
    config = fitted(name, train__dtype="bfloat16")
    if part == "colour":
        config.model.update(size=16, colours=3, levels=16)
        config.train.damage_size = 8
    return check.fast_against_plain(make_learner(config, **on), config)


def scaled(by):
    return lambda right, *args: jax.tree.map(lambda x: by * x, right(*args))


def twice_in_training(right, x, *args):
    as_trained = jax.config.jax_default_matmul_precision == "default" and x.dtype == jnp.bfloat16
    return right(x, *args) * (1 + as_trained)


def scaled_on_a_device(by):
    return lambda *args: scaled(jnp.where(lax.axis_index("devices") == 5, by, 1))(*args)


def inherits_wrongly(right, nn, *args):
    inherited, alive = right(nn, *args)
    return inherited * (1.5 if nn is cpu else 1), alive


def rolled(right, x, *args):
    return right(jnp.roll(x, 1, axis=1), *args)


def changed_loss(right, text):
    record = right(text)
    record["losses"][7] *= 1.001
    return record


KNOWN, LOSSES = "known_answers", "twenty_losses"
FAULTS = {  # what is broken: (part, an array that is beyond its tolerance, function, wrong one)
    "an ELU wrong near 0": (
        "baseline",
        "mean",
        cpu,
        "_expm1",
        lambda right, x: jnp.where(x > -0.1, 1.02 * x, right(x)),
    ),
    "a gradient 1% off": (
        "baseline",
        "gradient/encoder/conv2/kernel",
        cpu,
        "_kernel_gradient",
        scaled(1.01),
    ),
    "a bias twice": (
        "baseline",
        "mean",
        cpu,
        "add_bias",
        lambda right, params, y: right({"bias": 2 * params["bias"]}, y),
    ),
    "twice the gradient": ("doubling", "norm", cpu, "batch_gradient", scaled(2)),
    "a wrong step after damage": ("healing", "step", healing, "inherit", inherits_wrongly),
    "rows shifted on a TPU": ("tpu", "mean", tpu, "_shift", rolled),
    "twice in the dtype of training": ("baseline", "logits", cpu, "product", twice_in_training),
    "a device 3e-6 off": (KNOWN, "mean", check, "answers", scaled_on_a_device(1.000003)),
    "weights 1e-5 off": (KNOWN, "baseline/mean", runs.Saved, "restore", scaled(1.00001)),
    "a loss on record 0.1% off": (LOSSES, "7", json, "loads", changed_loss),
    "no mean over the devices": (LOSSES, "19", lax, "pmean", lambda right, tree, axis: tree),
}
QUICK = ["a device 3e-6 off"]


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[slow] * (f not in QUICK)) for f in FAULTS]
)
def test_a_fault_of_the_form_the_devices_or_the_package_is_found(fault, monkeypatch, tmp_path):
    part, array, module, function, wrong = FAULTS[fault]
    if part == LOSSES:  # of a tiny model in place of the quickstart's
        monkeypatch.setattr(check, "QUICKSTART", tmp_path / "losses.json")
        check.record(tiny.config("baseline", train__updates_per_call=20))
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args, **_: wrong(right, *args))
    monkeypatch.setattr(runs, "packaged_names", lambda: ["baseline"])
    assert any(r.figures.get(array, 0) > r.tolerance for r in compared(part))


@slow  # the mode's test has known answers and losses
@pytest.mark.parametrize(
    "part", ["doubling", "nondoubling", "healing", "growing", "baseline", "tpu", "colour"]
)
def test_a_form_that_computes_right_passes(part):
    result = next(compared(part))
    assert 0 < result.deviation < 1e-5


def test_micro_batches_are_those_of_training():
    def gradient(_, x):
        return {}, (jnp.zeros(3), jnp.full(len(x), len(x)))

    for share, most in (4, 32), (16, 4), (20, 8):
        config = fitted(train__batch_size=share * jax.device_count(), train__micro_batch=most)
        config = check.reduced(config)
        first, second = (
            training.accumulate(config.train.micro_batch, gradient, {}, jnp.zeros(batch))[2][0]
            for batch in (share, config.train.batch_size)
        )
        assert first == second


@pytest.mark.parametrize("by, passes", [(1.00001, True), (1.001, False)])
def test_a_loss_of_the_quickstart_may_be_a_ten_thousandth_off(monkeypatch, by, passes):
    losses = json.loads(check.QUICKSTART.read_text())["losses"]
    losses[7] *= by
    monkeypatch.setattr(check, "first_losses", lambda *_: losses)
    [found] = check.twenty_losses(SimpleNamespace(plain=False))
    assert found.passed == passes


def test_the_losses_on_record_are_of_the_quickstart_as_it_is():
    record = json.loads(check.QUICKSTART.read_text())
    assert flatten(ConfigDict(record["config"])) == flatten(tiny.committed("quickstart"))


# ---- Before training and measurements on an accelerator ------------------------------------------

CONFIG = fitted()
FAST, PLAIN = (make_learner(CONFIG, plain) for plain in (False, True))


@pytest.mark.parametrize(
    "fast, plain, other, used, words",
    [
        (1.05, 1, 0, FAST, ""),
        (1.5, 1, 0, PLAIN, "logits deviates by 0.5 (at most 0.1)"),
        (np.nan, 1, 0, PLAIN, "logits deviates by inf (at most 0.1)"),
        (1, 1, np.inf, PLAIN, "logits deviates by inf (at most 0.1)"),  # on another host
        ("UNIMPLEMENTED: it", 1, 0, PLAIN, "the device refuses it (UNIMPLEMENTED: it), which"),
        ("RESOURCE_EXHAUSTED: 3", 1, 0, None, "(RESOURCE_EXHAUSTED: 3): stop other programs"),
        (1, "UNIMPLEMENTED: it", 0, None, "(UNIMPLEMENTED: it): stop other programs"),
    ],
)
def test_a_fast_form_is_used_on_a_cpu_or_if_it_agrees_in_trainings_precision(
    monkeypatch, capsys, fast, plain, other, used, words
):
    def computed(learner, _, precision):
        found = plain if learner == PLAIN else fast
        if isinstance(found, str):
            raise jax.errors.JaxRuntimeError(f"{found}\nand more")
        return {"logits": found if precision == "default" else 1.0}

    monkeypatch.setattr(check, "computed", computed)
    monkeypatch.setattr(machine, "gather", lambda local: np.append(local, other))
    assert check.trusted(FAST, CONFIG) == FAST
    monkeypatch.setattr(check, "is_accelerator", lambda: True)
    assert check.trusted(PLAIN, CONFIG) == PLAIN
    assert not capsys.readouterr().out  # nothing was compared
    if used:
        assert check.trusted(FAST, CONFIG) == used
        _, *said = capsys.readouterr().out.splitlines()  # after what takes so long
    else:
        said = [tiny.fault_of(check.trusted, FAST, CONFIG)]
    assert len(said) == bool(words) and words in "".join(said)


# ---- The mode ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, other, failed",
    [
        (1e-4, 0, ""),
        (
            np.inf,
            0,
            "1 of 3 comparisons failed: fast against plain. Train and evaluate with --plain",
        ),
        (np.inf, 2, "2 of 3 comparisons failed: fast against plain; known answers. Run it again "),
    ],
)
def test_what_failed_is_said_with_a_remedy_and_written(
    monkeypatch, tmp_path, capsys, form, other, failed
):
    for part, off in ("fast_against_plain", form), (KNOWN, other), (LOSSES, 0):
        found = check.result(part.replace("_", " "), {"bias": off, "norm": 1e-9}, 1e-3)
        monkeypatch.setattr(check, part, lambda *_, found=found: [found])
    run = runs.Run(CONFIG, tmp_path, False, None)
    fault = tiny.fault_of(check.check, run) if failed else check.check(run)
    assert failed in (fault or "")
    assert "fast against plain: bias deviates by" in capsys.readouterr().out
    written = json.loads((tmp_path / "check.json").read_text(), parse_constant=pytest.fail)
    assert written["passed"] == (not failed)
    found = [(r["passed"], r["figures"]["bias"]) for r in written["results"]]
    assert found == [(not failed, None if failed else form), (not other, other), (True, 0)]


def test_a_model_without_known_answers_is_told_so(monkeypatch, tmp_path, capsys):
    for part in "fast_against_plain", KNOWN, LOSSES:
        monkeypatch.setattr(check, part, lambda *_: [])
    for name, is_told in ("baseline", False), ("nondoubling", True):
        check.check(runs.Run(fitted(name), tmp_path, False, None))
        told = f"the model {name} has no known answers: its fast form is compared with"
        assert (told in capsys.readouterr().out) == is_told


@pytest.mark.parametrize("file", ["KNOWN_ANSWERS", "QUICKSTART"])
def test_a_missing_or_damaged_record_is_one_line_before_the_work(file, monkeypatch, tmp_path):
    work = (pytest.fail("it is at work") for _ in range(1))
    monkeypatch.setattr(check, "fast_against_plain", lambda *_: work)
    monkeypatch.setattr(runs, "packaged_names", list)
    whole, path = getattr(check, file).read_bytes(), tmp_path / "record"
    monkeypatch.setattr(check, file, path)
    for content in None, whole[:-9], b"{}":
        if content:
            path.write_bytes(content)
        fault = tiny.fault_of(check.check, runs.Run(CONFIG, tmp_path, False, None))
        assert fault.startswith(f"{path}: ") and fault.endswith("; reinstall the package")


BROKEN = """
from vnca.fast import cpu
from vnca.program import check, runs
right = cpu.elu
cpu.elu = lambda x: float("nan") * right(x)
# Of others, and of real losses, the plain method takes minutes.
runs.packaged_names = lambda: ["baseline"]
losses = check.json.loads(check.QUICKSTART.read_text())["losses"]
check.first_losses = lambda config, plain, count: losses if plain else losses[::-1]
"""
ACCELERATOR = BROKEN + "check.is_accelerator = lambda: True"


@slow
@pytest.mark.parametrize(
    "modes, before, flag, words",
    [
        (["train", "evaluate"], ACCELERATOR, "--noplain", "warning: the plain method is used"),
        (["check"], "", "--noplain", "ok     loss after n updates"),
        (["check"], BROKEN, "--plain", "ok     loss after n updates"),
        (["check"], BROKEN, "--noplain", "FAILED loss after n updates"),
    ],
)
def test_a_fast_form_that_is_broken_is_not_used_or_ends_the_check_with_one_line_and_status_1(
    tmp_path, modes, before, flag, words
):
    for mode in modes:
        with tiny.Command(
            f"--workdir={tmp_path}", f"--mode={mode}", flag, before=before, devices=2,
            train__updates=2, eval__images=8, eval__samples=2,
        ) as command:  # fmt: skip
            assert command.end(600) == ("FAILED" in words), command.complained()
            assert words in command.printed()
            assert command.complained().count("\n") == ("FAILED" in words)
