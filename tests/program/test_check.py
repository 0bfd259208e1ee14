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

from vnca import healing, pool, training
from vnca.fast import cpu, tpu
from vnca.program import check, machine, runs, store
from vnca.program.config import flatten
from vnca.program.method import make_method

pytestmark = pytest.mark.usefixtures("quickly_compiled")
slow = pytest.mark.slow


def fitted(name="baseline", **fields):
    config = tiny.config(name, **fields)
    machine.fit(config)
    return config


def run_of(folder, plain=False):
    return runs.Run(fitted(), folder, plain, None, make_method(fitted(), plain))


def failed(results):
    return {r.what: r.figures for r in results if not r.deviation <= r.tolerance}


def put_in(patch, module, name, wrong):
    """A fault: wrong(right, *args) in place of a module's function right(*args)."""
    right = getattr(module, name)
    patch.setattr(module, name, lambda *args, **_: wrong(right, *args))


def scaled(by):
    return lambda right, *args: jax.tree.map(lambda x: by * x, right(*args))


def faults(table, *quick):
    """The names of a table's faults, of which all but these are slow."""
    return [pytest.param(name, marks=[] if name in quick else slow) for name in table]


# ---- Fast against plain --------------------------------------------------------------------------


def inherits_wrongly(right, nn, *args):
    inherited, alive = right(nn, *args)
    return inherited * (1.5 if nn is cpu else 1), alive


def without_gradient(right, params, y):
    return right({"bias": lax.stop_gradient(params["bias"])}, y)


def rolled(right, x, *args):
    return right(jnp.roll(x, 1, axis=1), *args)


FAULTS = {  # what is broken: (model, function, an array that is beyond the tolerance)
    "an ELU wrong near 0": (
        *("baseline", cpu, "_expm1", "mean"),
        lambda right, x: jnp.where(x > -0.1, 1.02 * x, right(x)),
    ),
    "a gradient 1% off": (
        *("baseline", cpu, "_kernel_gradient", "gradient/encoder/conv2/kernel"),
        scaled(1.01),
    ),
    "a bias's gradient lost": (
        *("baseline", cpu, "add_bias", "gradient/decoder/linear/bias"),
        without_gradient,
    ),
    "a layer rounded to 1%": (
        *("baseline", cpu, "product", "logits"),
        lambda right, *args: lax.reduce_precision(right(*args), 8, 6),
    ),
    "a gradient not finite": ("baseline", cpu, "_kernel_gradient", "norm", scaled(np.nan)),
    "pixels shifted": ("baseline", cpu, "_patches", "mean", rolled),
    "twice the gradient": ("doubling", cpu, "batch_gradient", "norm", scaled(2)),
    "a wrong step after damage": ("healing", healing, "inherit", "step", inherits_wrongly),
    "rows shifted on a TPU": ("tpu", tpu, "_shift", "mean", rolled),
}


@pytest.mark.parametrize("fault", faults(FAULTS, "a gradient 1% off"))
def test_a_fault_of_the_fast_form_is_found(fault, monkeypatch):
    name, module, function, array, wrong = FAULTS[fault]
    put_in(monkeypatch, module, function, wrong)
    [figures] = failed(compared(name)).values()
    assert figures[array] > check.TOLERANCES["highest"]


def compared(name):
    config = fitted("doubling" if name == "tpu" else name)
    kind = {"platform": "tpu", "device_kind": "TPU v5 lite"} if name == "tpu" else {}
    return check.fast_against_plain(make_method(config, **kind), config)


@slow
@pytest.mark.parametrize("name", ["doubling", "nondoubling", "healing", "baseline", "tpu"])
def test_a_form_that_computes_right_passes(name):
    [result] = compared(name)
    assert 0 < result.deviation < 1e-5


def test_an_accelerator_is_checked_in_float32_and_as_in_training(monkeypatch):
    config, found = fitted(train__dtype="bfloat16"), []
    method = make_method(config)._replace(
        gradient=lambda model, config, state, *_: (state.params, jnp.zeros(3), ())
    )
    monkeypatch.setattr(check, "make_method", lambda *_, **__: method)
    monkeypatch.setattr(check, "is_accelerator", lambda: True)
    monkeypatch.setattr(training, "computed_in", lambda model, dtype: found.append(dtype) or model)
    put_in(
        monkeypatch, check, "answers",
        lambda *_: found.append(jax.config.jax_default_matmul_precision) or {},
    )  # fmt: skip
    assert not failed(check.fast_against_plain(method, config))
    assert found == ["float32", "highest"] * 2 + ["bfloat16", "default"] * 2


def test_micro_batches_are_those_of_training():
    def size(config, batch):
        sizes = []

        def gradient(params, x):
            sizes.append(len(x))
            return params, (jnp.zeros(3), ())

        training.accumulate(config.train.micro_batch, gradient, {}, jnp.zeros(batch))
        return sizes[0]

    for share, most in (4, 32), (12, 12), (16, 4), (24, 16), (20, 8), (64, 16), (3, 3):
        config = fitted(train__batch_size=share * jax.device_count(), train__micro_batch=most)
        reduced = check.reduced(config)
        assert size(reduced, reduced.train.batch_size) == size(config, share)


def test_no_parameter_of_the_comparison_is_zero():
    for name in "doubling", "nondoubling", "healing", "baseline":
        params = check.drawn_params(make_method(fitted(name)).model)
        assert all(np.all(x) for x in jax.tree.leaves(params))


# ---- Before training and measurements on an accelerator ------------------------------------------


def refused(reason):
    return jax.errors.JaxRuntimeError(f"{reason}\nand more")


def trusted(patch, fast, plain=1.0, is_accelerator=True, method=None):
    """The form that is trusted where the two compute these logits, or fail so."""

    def computed(method, *_):
        logits = {PLAIN: plain}.get(method, fast)
        if isinstance(logits, Exception):
            raise logits
        return {"logits": logits}

    patch.setattr(check, "is_accelerator", lambda: is_accelerator)
    patch.setattr(check, "computed", computed)
    return check.trusted(method or FAST, fitted())


FAST, PLAIN = (make_method(fitted(), plain) for plain in (False, True))


@pytest.mark.parametrize(
    "fast, words",
    [
        (1.5, "logits deviates by 0.5 (at most 0.001)"),
        (np.nan, "logits deviates by inf"),
        (refused("UNIMPLEMENTED: a layout"), "refuses it (UNIMPLEMENTED: a layout), which"),
    ],
)
def test_where_the_fast_form_deviates_the_plain_one_is_used(monkeypatch, capsys, fast, words):
    assert trusted(monkeypatch, fast) == PLAIN
    _, warning = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: the plain method is used") and words in warning


def test_a_form_is_used_if_it_agrees_or_is_the_plain_one_or_on_a_cpu(monkeypatch, capsys):
    assert trusted(monkeypatch, fast=1.0001) == FAST
    assert capsys.readouterr().out.count("\n") == 1  # what takes so long
    assert trusted(monkeypatch, fast=np.nan, method=PLAIN) == PLAIN
    assert trusted(monkeypatch, fast=np.nan, is_accelerator=False) == FAST
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "fast, plain",
    [(refused("RESOURCE_EXHAUSTED: 3 GB"), 1.0), (1.0, refused("FAILED_PRECONDITION: no DNN"))],
)
def test_a_device_that_can_compare_nothing_is_an_error_with_a_remedy(monkeypatch, fast, plain):
    fault = tiny.fault_of(trusted, monkeypatch, fast, plain)
    assert "stop other programs" in fault and "--plain" in fault and "and more" not in fault


def test_a_host_that_finds_no_fault_follows_one_that_does(monkeypatch):
    monkeypatch.setattr(machine, "gather", lambda local: np.append(local, np.inf))
    assert trusted(monkeypatch, fast=1.0) == PLAIN


BROKEN = """
from vnca.fast import cpu
from vnca.program import check
right = cpu._kernel_gradient
cpu._kernel_gradient = lambda *args: 1.5 * right(*args)
"""


@slow
def test_training_and_evaluation_go_on_by_the_plain_method(tmp_path):
    found, fields = [], {"train__updates": 10, "eval__images": 8, "eval__samples": 2}
    accelerator = BROKEN + "check.is_accelerator = lambda: True"
    for before, flag, warnings in ("", "--plain", 0), (accelerator, "--noplain", 1):
        workdir = tmp_path / flag
        for mode in "train", "evaluate":
            args = f"--workdir={workdir}", f"--mode={mode}", flag
            with tiny.Command(*args, name="baseline", before=before, **fields) as command:
                assert command.end() == 0, command.complained()
                assert command.printed().count("warning: the plain method") == warnings
        losses = [record["loss"] for record in tiny.metrics(workdir)[0]]
        found.append((losses, json.loads((workdir / "evaluation.json").read_text())["iwelbo"]))
    assert found[0] == found[1]
    assert losses[::9] == pytest.approx(tiny.LOSSES["baseline"][:2], rel=1e-5)


# ---- Known answers on every device ---------------------------------------------------------------


def warped(by):
    def wrong(right, *args):
        is_warped = lax.axis_index("devices") == 5
        return scaled(1 + by * is_warped)(right, *args)

    return wrong


def changed_weight(right, kind):
    made = right(kind)
    made.params["encoder"]["conv0"]["kernel"][2, 2, 0, 0] *= 1.01
    return made


def changed_pixel(right, name):
    bits = right(name).test.copy()
    bits[3, 49] ^= 1
    return SimpleNamespace(test=bits)


ANSWERS, EACH, ROWS = "known answers", "baseline on each device", "rows of a pool"
KNOWN_FAULTS = {  # what is broken: (function, what fails)
    "nothing": (check, "answers", scaled(1), []),
    "a device 1e-4 off": (check, "answers", warped(1e-4), [ANSWERS, EACH]),
    "a device 3e-6 off": (check, "answers", warped(3e-6), [EACH]),
    "a weight 1% off": (runs, "packaged", changed_weight, [ANSWERS]),
    "a flipped pixel": (check, "load", changed_pixel, [ANSWERS]),
    "an ELU 1e-4 off": (
        *(cpu, "_expm1", lambda right, x: 1.0001 * right(x)),
        [ANSWERS],
    ),
    "rows go astray": (pool, "local", lambda right, *args: right(*args) ^ 1, [ROWS]),
    "sums go astray": (
        *(lax, "psum_scatter", lambda right, x, axis: right(x[::-1], axis, tiled=True)),
        [ROWS],
    ),
}


@pytest.mark.parametrize("fault", faults(KNOWN_FAULTS, "a device 3e-6 off", "rows go astray"))
def test_a_fault_of_a_device_or_the_package_is_found(fault, monkeypatch, tmp_path):
    *wrong, expected = KNOWN_FAULTS[fault]
    monkeypatch.setattr(check, "KINDS", () if expected == [ROWS] else ("baseline",))
    put_in(monkeypatch, *wrong)
    assert [*failed(check.known_answers(run_of(tmp_path)))] == expected


# ---- Twenty losses -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The record of a tiny model in place of the quickstart's."""
    path = tmp_path_factory.mktemp("record") / "quickstart.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "QUICKSTART", path)
        check.record(tiny.config(train__updates_per_call=10))
    losses = json.loads(path.read_text())["losses"]
    assert [losses[n - 1] for n in (1, 10, 20)] == pytest.approx(tiny.LOSSES["doubling"], rel=1e-5)
    return path


def loaded(name, change):
    def wrong(right, path):
        header, arrays = right(path)
        arrays[name] = np.asarray(change(arrays[name]), arrays[name].dtype)
        return header, arrays

    return wrong


def changed_loss(right, text):
    record = right(text)
    if "losses" in record:  # not the header of the state
        record["losses"][7] *= 1.001
    return record


LOSSES, STATE = "loss after n updates, highest", "a state, saved and loaded"
BIT = loaded("moments/mean/decoder/residual/kernel", lambda x: np.nextafter(x, np.inf))
LOSS_FAULTS = {
    "nothing": (json, "loads", lambda right, text: right(text), []),
    "a loss on record 0.1% off": (json, "loads", changed_loss, [LOSSES]),
    "no mean over the devices": (lax, "pmean", lambda right, tree, axis: tree, [LOSSES]),
    "a moment's last bit": (store, "load", BIT, [STATE]),
    "an update too many": (store, "load", loaded("update", lambda x: x + 1), [LOSSES, STATE]),
}


@pytest.mark.parametrize("fault", faults(LOSS_FAULTS, "an update too many"))
def test_a_fault_of_training_on_all_devices_is_found(fault, recorded, monkeypatch, tmp_path):
    *wrong, expected = LOSS_FAULTS[fault]
    monkeypatch.setattr(check, "QUICKSTART", recorded)
    put_in(monkeypatch, *wrong)
    assert [*failed(check.twenty_losses(run_of(tmp_path)))] == expected
    assert not [*tmp_path.iterdir()]  # the state that was saved is gone


def test_the_losses_on_record_are_of_the_quickstart_as_it_is():
    record = json.loads(check.QUICKSTART.read_text())
    assert flatten(ConfigDict(record["config"])) == flatten(tiny.committed("quickstart"))
    assert len(record["losses"]) == 20 and np.isfinite(record["losses"]).all()


# ---- The mode ------------------------------------------------------------------------------------


@slow
def test_the_plain_method_has_no_fault_of_the_fast_form(monkeypatch, tmp_path):
    put_in(monkeypatch, cpu, "elu", scaled(1.5))
    monkeypatch.setattr(check, "KINDS", ("baseline",))
    seen, run = [], run_of(tmp_path, plain=True)
    put_in(monkeypatch, check, "quickstart", lambda right, config, plain, *_: seen.append(plain))
    assert not failed(check.fast_against_plain(run.method, run.config))
    assert not failed(check.known_answers(run))
    with pytest.raises(TypeError):  # there are no losses to compare
        [*check.twenty_losses(run)]
    assert seen == [True]


@pytest.mark.parametrize(
    "form, other, remedy",
    [(1e-4, 0, None), (np.inf, 0, "Train and evaluate with --plain"), (1, 2, "Run it again with")],
)
def test_what_failed_is_said_with_a_remedy_and_written(
    monkeypatch, tmp_path, capsys, form, other, remedy
):
    what = "fast against plain, highest"
    for part, off in ("fast_against_plain", form), ("known_answers", other), ("twenty_losses", 0):
        results = [check.result(what if off is form else part, {"bias": off, "norm": 1e-9}, 1e-3)]
        monkeypatch.setattr(check, part, lambda *_, results=results: results)
    if remedy:
        fault = tiny.fault_of(check.check, run_of(tmp_path))
        assert f"{2 if other else 1} of 3 comparisons failed: {what}" in fault and remedy in fault
    else:
        check.check(run_of(tmp_path))
    _, line, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith("FAILED" if remedy else "ok") and f"{what}: bias deviates by" in line
    found = json.loads((tmp_path / "check.json").read_text(), parse_constant=pytest.fail)
    assert (found["passed"], found["devices"]) == (not remedy, jax.device_count())
    assert [r["passed"] for r in found["results"]] == [not remedy, not other, True]
    off = None if form == np.inf else form
    assert found["results"][0]["figures"] == {"bias": off, "norm": 1e-9}


@slow
def test_this_machine_computes_right(tmp_path):
    with tiny.Command("--mode=check", f"--workdir={tmp_path}", devices=2) as command:
        assert command.end(600) == 0, command.complained()
        assert command.printed().count("ok ") == 10 and "FAILED" not in command.printed()
    assert json.loads((tmp_path / "check.json").read_text())["passed"]


@slow
def test_a_machine_that_computes_wrongly_ends_the_check_with_one_line_and_status_1(tmp_path):
    args = "--mode=check", f"--workdir={tmp_path}"
    with tiny.Command(*args, before=BROKEN + "check.KINDS = ()") as command:
        assert command.end(600) == 1
        [line] = command.complained().splitlines()
    assert "fast against plain, highest; loss after n updates, highest. Run it again" in line
