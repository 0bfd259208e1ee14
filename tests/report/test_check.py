"""The check of a machine passes where it computes right, and fails where a part of it is broken."""

import json
import os
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import vnca.program.train
from vnca import healing, pool, training
from vnca.fast import cpu, tpu
from vnca.program import VncaError, checkpoint, evaluate
from vnca.program import check as trust
from vnca.program.config import flatten
from vnca.program.data import load
from vnca.program.method import make_method
from vnca.report import check, known_answers, packaged

pytestmark = pytest.mark.usefixtures("quickly_compiled")

DATA = load("bundled")
MODELS = ["doubling", "nondoubling", "healing", "baseline"]
every_model = pytest.mark.parametrize("name", MODELS)


def results_of(part, config, make_method=make_method):
    """{what: whether it passed} of one part."""
    config = check.prepared(config)
    with tempfile.TemporaryDirectory() as folder:
        found = [*check.PARTS[part](config, DATA, make_method, folder)]
    return {what: check.Result(part, what, f, limit, 0.0).passed for what, f, limit in found}


def for_tpu(config, plain=False):
    """The method that a TPU would use, lowered as a CPU's program."""
    if plain:
        return make_method(config, plain=True)
    return make_method(config, platform="tpu", device_kind="TPU v5 lite")


# ---- A machine that computes right ---------------------------------------------------------------


@pytest.mark.slow  # a broken gradient, below, shows that all else agrees
@every_model
def test_the_fast_form_agrees_with_the_plain_method(name):
    found = results_of("fast against plain", tiny.config(name))
    assert len(found) == 6 and all(found.values())


@pytest.mark.slow
def test_the_form_of_a_tpu_agrees_with_the_plain_method():
    found = results_of("fast against plain", tiny.config("nondoubling"), for_tpu)
    assert len(found) == 6 and all(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["doubling", "nondoubling"])
def test_eight_devices_pass(name):
    found = results_of("devices", tiny.config(name))
    assert len(found) == 3 and all(found.values())


@pytest.mark.slow
def test_an_interruption_changes_no_bit():
    assert results_of("interrupted", tiny.config("nondoubling")) == {
        "ten updates and ten more": True
    }


@pytest.mark.slow
def test_the_whole_check_writes_its_table_and_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "QUICKSTART", recorded(tmp_path))
    monkeypatch.setattr(check.packaged, "KINDS", ("baseline",))
    lines = []
    check.check(tiny.config(), tmp_path / "new", lines.append)
    found = json.loads((tmp_path / "new" / "check.json").read_text())
    assert found["passed"] and found["devices"] == 8 and found["jax"] == jax.__version__
    assert {r["part"] for r in found["results"]} == set(check.PARTS)
    assert not [text for text in lines if "FAILED" in text]
    for r in found["results"]:
        assert sum(text.startswith(f"ok     {r['part']}: {r['what']}: ") for text in lines) == 1
        assert sum(text.startswith(f"{r['part']}: {r['what']} ") for text in lines) == 1


# ---- Broken parts --------------------------------------------------------------------------------


def test_a_broken_kernel_gradient_is_found(monkeypatch):
    right = cpu._kernel_gradient
    monkeypatch.setattr(cpu, "_kernel_gradient", lambda *args: right(*args) * 1.01)
    found = results_of("fast against plain", tiny.config("baseline"))
    assert [what for what, passed in found.items() if not passed] == ["gradients, highest"]


@pytest.mark.slow
def test_a_method_with_a_broken_gradient_of_its_own_is_found(monkeypatch):
    def doubled(*args):
        grads, *others = training.batch_gradient(*args)
        return jax.tree.map(lambda g: 2 * g, grads), *others

    monkeypatch.setattr(cpu, "batch_gradient", doubled)
    found = results_of("fast against plain", tiny.config())
    assert [what for what, passed in found.items() if not passed] == ["gradients, highest"]


def test_a_cell_that_inherits_wrongly_is_found(monkeypatch):
    right = healing.inherit

    def wrong(nn, kept, waves):
        inherited, alive = right(nn, kept, waves)
        return inherited * (1.5 if nn is cpu else 1), alive

    monkeypatch.setattr(healing, "inherit", wrong)
    found = results_of("fast against plain", tiny.config("healing"))
    assert [what for what, passed in found.items() if not passed] == [
        "decoder, highest",
        "gradients, highest",
    ]


@pytest.mark.slow
def test_a_broken_shift_of_a_cpu_is_found(monkeypatch):
    right = cpu._patches
    monkeypatch.setattr(cpu, "_patches", lambda *args: jnp.roll(right(*args), 1, axis=2))
    assert not all(results_of("fast against plain", tiny.config()).values())


@pytest.mark.slow
def test_a_broken_shift_of_a_tpu_is_found(monkeypatch):
    right = tpu._shift

    def off_by_a_row(x, *args):
        return right(jnp.roll(x, 1, axis=1), *args)

    monkeypatch.setattr(tpu, "_shift", off_by_a_row)
    found = results_of("fast against plain", tiny.config(), for_tpu)
    assert not found["encoder, highest"] and not found["gradients, highest"]


@pytest.mark.slow
def test_a_broken_reduction_is_found(monkeypatch):
    monkeypatch.setattr(jax.lax, "pmean", lambda tree, axis: tree)
    found = results_of("devices", tiny.config())
    assert [what for what, passed in found.items() if not passed] == ["a batch split over all"]


def test_a_row_of_the_pool_that_goes_astray_is_found(monkeypatch):
    right = pool.local
    monkeypatch.setattr(pool, "local", lambda rows, count: right(rows, count) ^ 1)
    assert max(check.pool_rows().values()) > 0.1


def test_a_device_that_computes_otherwise_is_found(monkeypatch):
    right = check.values

    def warped(*args):
        device = jax.lax.axis_index("devices")
        return jax.tree.map(lambda x: x * (1 + 1e-4 * (device == 5)), right(*args))

    monkeypatch.setattr(check, "values", warped)
    monkeypatch.setattr(jax, "pmap", partial(jax.pmap, axis_name="devices"))
    found = check.same_answers(make_method(tiny.config()), check.prepared(tiny.config()), DATA)
    assert all(off == pytest.approx(1e-4, rel=0.1) for off in found.values())


def test_a_wrong_stored_answer_is_found(monkeypatch):
    monkeypatch.setattr(check.packaged, "KINDS", ("baseline",))
    right = known_answers.load("baseline")
    assert results_of("known answers", tiny.config()) == {"baseline, highest": True}
    wrong = right | {"nats": right["nats"] + [0, 0, 0.01]}
    monkeypatch.setattr(known_answers, "load", lambda kind: wrong)
    assert results_of("known answers", tiny.config()) == {"baseline, highest": False}


@pytest.mark.slow
def test_a_wrong_recorded_loss_is_found(tmp_path, monkeypatch):
    file = recorded(tmp_path)
    record = json.loads(file.read_text())
    record["losses"][7] += 1.0
    file.write_text(json.dumps(record))
    monkeypatch.setattr(check, "QUICKSTART", file)
    assert results_of("short training", tiny.config()) == {"20 losses, highest": False}


@pytest.mark.slow
def test_a_state_that_a_checkpoint_changes_is_found(monkeypatch):
    right = check.from_first
    monkeypatch.setattr(
        check, "from_first", lambda s, like: right(s, like)._replace(update=np.int32(s.update + 1))
    )
    found = results_of("interrupted", tiny.config())
    assert found == {"ten updates and ten more": False}


def test_what_failed_is_said_with_a_remedy_and_written_as_json(tmp_path, monkeypatch):
    def part(config, data, make_method, workdir):
        yield "encoder", {"mean": 0.0}, 1e-3
        yield "gradients", {"kernel": np.inf, "bias": 1e-9}, 1e-3

    monkeypatch.setattr(check, "PARTS", {"fast against plain": part})
    lines = []
    with pytest.raises(VncaError, match="1 of 2 checks failed, of: fast .* with --plain") as fault:
        check.check(tiny.config(), tmp_path, lines.append)
    assert "\n" not in str(fault.value)
    wanted = "FAILED fast against plain: gradients: not finite (kernel; at most 0.001)"
    assert lines[-1] == wanted and wanted in lines[:-1]

    def constant(name):
        raise AssertionError(name)

    found = json.loads((tmp_path / "check.json").read_text(), parse_constant=constant)
    assert not found["passed"]
    assert found["results"][1]["figures"] == {"kernel": None, "bias": 1e-9}


# ---- What is on record, and what is said beforehand ----------------------------------------------


def recorded(folder):
    """A record of the tiny doubling model in place of the quickstart's."""
    fields = tiny.config().to_dict()
    losses = check.quickstart_losses(fields, DATA, make_method, "highest", 8)
    assert [losses[n - 1] for n in (1, 10, 20)] == pytest.approx(tiny.LOSSES["doubling"], rel=1e-5)
    (folder / "quickstart.json").write_text(json.dumps({"config": fields, "losses": losses}))
    return folder / "quickstart.json"


def test_the_losses_on_record_are_of_the_quickstart_as_it_is():
    record = json.loads(check.QUICKSTART.read_text())
    assert flatten(ConfigDict(record["config"])) == flatten(tiny.committed("quickstart"))
    assert len(record["losses"]) == 2 * check.UPDATES and np.isfinite(record["losses"]).all()


@pytest.mark.slow
def test_the_quickstart_loses_what_is_on_record():
    assert results_of("short training", tiny.config()) == {"20 losses, highest": True}


def test_a_published_config_takes_longer_on_a_cpu_than_a_small_one(monkeypatch):
    monkeypatch.setattr(check, "cores", lambda: 2)
    expected = {
        name: check.expected_seconds(check.prepared(tiny.committed(name)))
        for name in ("quickstart", "small_nondoubling", "doubling", "nondoubling")
    }
    assert max(expected["quickstart"], expected["small_nondoubling"]) < 150
    assert 600 < expected["doubling"] < expected["nondoubling"]


def test_the_micro_batch_is_that_of_training():
    def of(batch, devices, micro_batch):
        made = tiny.config(train__batch_size=batch, train__micro_batch=micro_batch)
        return trust.share(made, devices)

    assert of(32, 8, 32) == (4, 8)  # of a TPU's core, in two micro-batches
    assert of(128, 1, 128) == (8, 8)
    assert of(32, 2, 4) == (4, 8)
    assert of(24, 2, 24) == (12, 12)
    assert of(32, 1, 16) == (16, 16)  # of the baseline on one core
    assert of(40, 1, 20) == (12, 12)
    assert of(6, 2, 6) == (3, 9)


def test_the_pool_is_used_from_the_first_update():
    assert check.prepared(tiny.config("healing", train__pool_from=500)).train.pool_from == 1


def test_what_only_the_plain_method_mends_is_no_fault_of_the_fast_form_alone():
    def result(part):
        return check.Result(part, "", {"": 1.0}, 0.0, seconds=1.0)

    fast, other = result("fast against plain"), result("devices")
    assert check.remedy([fast]).startswith("Train and evaluate with --plain")
    assert check.remedy([fast, other]).startswith("Run it again with --plain")


def test_figures_of_several_hosts_are_the_largest_of_all(monkeypatch):
    monkeypatch.setattr(check, "gather", lambda rows: np.concatenate([rows, [[3.0, 0.5]]]))
    assert check.shared({"a": 1.0, "b": 2.0}) == {"a": 3.0, "b": 2.0}


def test_a_batch_is_cut_as_training_cuts_it():
    for batch, at_most in (32, 32), (20, 8), (10, 4), (7, 3), (12, 5):
        sizes = []

        def gradient(params, x, sizes=sizes):
            sizes.append(len(x))
            return params, (jnp.zeros(3), x)

        training.accumulate(at_most, gradient, {}, jnp.ones(batch))
        assert set(sizes) == {trust.micro_batch_size(batch, at_most)}


def test_parameters_of_the_check_are_nowhere_zero():
    for name in MODELS:
        params = trust.drawn_params(make_method(tiny.config(name)).model)
        assert all(np.all(x != 0) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("precision, products", [("highest", "highest"), ("training", None)])
def test_an_accelerator_is_checked_with_products_in_float32_and_as_in_training(
    monkeypatch, precision, products
):
    found = []

    def seen(*_):
        found.append(jax.config.jax_default_matmul_precision)
        return {}

    monkeypatch.setattr(trust, "values", seen)
    monkeypatch.setattr(trust, "gradients", seen)
    config = prepared()
    trust.computed(make_method(config), config, precision, load("bundled").test[:16])
    assert found == [products] * 2


# ---- Before training and measurements on an accelerator ------------------------------------------


@pytest.fixture
def accelerator(monkeypatch, tmp_path):
    """The CPU taken for an accelerator, with a cache folder of its own."""
    monkeypatch.setattr(trust, "is_accelerator", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vnca"


def broken(config, plain=False):
    """The plain method, or one whose encoder is wrong in the fast form."""
    method = make_method(config, plain=True)
    encode = method.model.encode

    def wrong(params, x):
        mean, logvar = encode(params, x)
        return mean * 1.3, logvar

    return method if plain else method._replace(model=method.model._replace(encode=wrong))


def prepared():
    return check.prepared(tiny.config("baseline"))


@pytest.mark.slow
def test_training_goes_on_by_the_plain_method_where_the_fast_form_deviates(
    accelerator, monkeypatch, tmp_path
):
    fields = dict.fromkeys(["train__updates", "train__checkpoint_every", "eval__every"], 10)
    config, lines = tiny.config("baseline", **fields), []
    vnca.program.train.train(config, tmp_path / "run", lines.append, lambda *_: {}, broken)
    [warning] = [text for text in lines if "deviates" in text]
    assert warning.startswith("warning: the fast form is not used here")
    assert "--mode=check" in warning
    config.eval.update(images=8, samples=2)
    results = {}
    for make in broken, partial(make_method, plain=True):
        lines.clear()
        for path in (tmp_path / "run").glob("evaluation.partial.*"):
            path.unlink()
        evaluate.evaluate(config, tmp_path / "run", lines.append, None, make)
        assert any("deviates" in text for text in lines) == (make is broken)
        results[make] = json.loads((tmp_path / "run" / "evaluation.json").read_text())["iwelbo"]
    assert len({*results.values()}) == 1
    losses = [record["loss"] for record in tiny.metrics(tmp_path / "run")[0]]
    assert [losses[0], losses[9]] == pytest.approx(tiny.LOSSES["baseline"][:2], rel=1e-5)


def test_models_are_shown_by_the_plain_method_where_the_fast_form_deviates(
    accelerator, monkeypatch, tmp_path
):
    monkeypatch.setattr(trust, "fast_against_plain", lambda *_: {"ELBO": 0.5})
    config, lines = prepared(), []
    state = training.init_state(broken(config), config, None)
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run", state, config.to_dict(), 1)
    shown = packaged.trained_models(config, tmp_path / "run", lines.append, broken)
    assert sum("deviates" in text for text in lines) == len(shown) == 3
    assert all(m.model == make_method(m.config, plain=True).model for m in shown.values())
    assert shown["baseline"].origin.endswith("checkpoint_00000000.npz")


def test_a_verdict_is_kept_for_its_kind_of_device_its_model_and_compiler(accelerator, monkeypatch):
    calls, lines = [], []

    def compare(*args):
        calls.append(args)
        return {"ELBO": 0.5}

    monkeypatch.setattr(trust, "fast_against_plain", compare)
    plain = make_method(prepared(), plain=True)
    for count in (2, 2):  # at two precisions, and not again
        assert trust.trusted(broken(prepared()), prepared(), lines.append) == plain
        assert len(calls) == count
    assert sum("deviates" in text for text in lines) == 2
    [kept] = accelerator.glob("checked-*.json")
    assert lines[-1].endswith(f"To compare again, delete {kept}")
    assert json.loads(kept.read_text())["key"]["device"] == "cpu"
    other = prepared()
    other.model.latent_size = 5
    trust.trusted(broken(other), other, lines.append)
    assert len(calls) == 4 and len([*accelerator.glob("checked-*.json")]) == 2
    kept.write_text("{")  # a damaged one is made again
    trust.trusted(broken(prepared()), prepared(), lines.append)
    assert len(calls) == 6
    cpu_devices = "--xla_force_host_platform_device_count=5"  # which no accelerator heeds
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {cpu_devices}")
    trust.trusted(broken(prepared()), prepared(), lines.append)
    assert len(calls) == 6
    for count, flags in (8, "XLA_FLAGS"), (10, "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(flags, "--xla_of_another_compilation")
        trust.trusted(broken(prepared()), prepared(), lines.append)
        assert len(calls) == count
    edited = accelerator.parent / "check.py"
    edited.write_bytes(Path(trust.__file__).read_bytes() + b"# with other tolerances")
    monkeypatch.setattr(trust, "__file__", str(edited))
    trust.trusted(broken(prepared()), prepared(), lines.append)
    assert len(calls) == 12


def test_a_fast_form_that_agrees_is_used_and_one_that_is_refused_is_not(accelerator, monkeypatch):
    fast, lines = broken(prepared()), []
    monkeypatch.setattr(trust, "fast_against_plain", lambda *_: {"ELBO": 1e-6})
    assert trust.trusted(fast, prepared(), lines.append) == fast
    assert lines[-1] == "it agrees with the plain method"
    [kept] = accelerator.glob("checked-*.json")
    kept.unlink()

    computed = trust.computed

    def refuse(method, *args):
        if getattr(method.model.encode, "__name__", "") == "wrong":
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: such a layout\nand more")
        return computed(method, *args)

    monkeypatch.undo()
    monkeypatch.setattr(trust, "is_accelerator", lambda: True)
    monkeypatch.setattr(trust, "verdict_path", lambda key: None)
    monkeypatch.setattr(trust, "computed", refuse)
    assert trust.trusted(fast, prepared(), lines.append) != fast
    words = "precision, the device refuses it (UNIMPLEMENTED: such a layout)"
    assert f"at highest {words}; at training {words}" in lines[-1]
    assert "\n" not in lines[-1] and "delete" not in lines[-1]
    found = results_of("fast against plain", tiny.config("baseline"), broken)  # of --mode=check
    assert found == dict.fromkeys(["everything, highest", "everything, training"], False)


def test_too_little_memory_is_no_verdict(accelerator, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GB")

    monkeypatch.setattr(trust, "computed", fail)
    with pytest.raises(VncaError, match="too little free memory .* or add --plain"):
        trust.trusted(broken(prepared()), prepared(), print)
    assert not [*accelerator.glob("*")]


def test_a_device_that_refuses_the_plain_method_too_is_no_verdict(accelerator, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: DNN library initialization failed")

    monkeypatch.setattr(trust, "computed", fail)
    with pytest.raises(VncaError, match=r"plain method \(FAILED_PRECONDITION: DNN .* its driver"):
        trust.trusted(broken(prepared()), prepared(), print)
    assert not [*accelerator.glob("*")]


def test_a_host_that_finds_no_fault_follows_one_that_does(accelerator, monkeypatch):
    monkeypatch.setattr(trust, "fast_against_plain", lambda *_: {"ELBO": 1e-6})
    monkeypatch.setattr(trust, "ask_all", lambda ask: lambda: 1)
    fast, lines = broken(prepared()), []
    assert trust.trusted(fast, prepared(), lines.append) != fast
    assert "on another host" in lines[-1]


def test_without_a_cache_folder_the_verdict_is_made_at_each_start(accelerator, monkeypatch):
    calls = []
    monkeypatch.setattr(trust, "fast_against_plain", lambda *_: calls.append(1) or {"ELBO": 1e-6})
    accelerator.parent.mkdir()
    accelerator.touch()  # a file where the folder would be
    fast = broken(prepared())
    for count in (2, 4):
        assert trust.trusted(fast, prepared(), lambda _: None) == fast
        assert len(calls) == count


def test_nothing_is_compared_on_a_cpu_or_by_the_plain_method(accelerator, monkeypatch):
    monkeypatch.setattr(trust, "fast_against_plain", None)
    plain = make_method(prepared(), plain=True)
    assert trust.trusted(plain, prepared(), print) == plain
    monkeypatch.setattr(trust, "is_accelerator", lambda: False)
    fast = broken(prepared())
    assert trust.trusted(fast, prepared(), print) == fast
