"""The test IWELBO: the same whatever the devices, chunks and interruptions."""

import contextlib
import errno
import json
import os
import shutil
import signal
import time
from functools import partial

import jax
import numpy as np
import pytest
import tiny

from vnca.images import unpack
from vnca.losses import iwelbo
from vnca.noise import normal, stream
from vnca.program import Stopped, VncaError, checkpoint, evaluate, progress
from vnca.program.data import load
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_method
from vnca.program.order import fixed_shuffle
from vnca.report import packaged
from vnca.training import init_state

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SAMPLES = 3


EVALUATION = {"eval__samples": SAMPLES, "eval__images": 21, "eval__chunk": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a checkpoint of a tiny model, and what goes with it."""
    config = fit_to_machine(tiny.config("baseline", **EVALUATION))
    method, workdir = make_method(config), tmp_path_factory.mktemp("run")
    state = init_state(method, config, None)
    checkpoint.save(workdir, state, config.to_dict(), 3)
    return config, workdir, method.model, state.params, load("bundled").test


@pytest.fixture(scope="module")
def directly(trained):
    """The estimates of the first 21 images in one piece, on one device, with no padding."""
    config, _, model, params, test = trained
    numbers = fixed_shuffle(21, 10_000)

    def noise(s):
        return normal(stream(config.seed, "evaluation", s), numbers, model.latent_size)

    x = unpack(test[numbers])
    return np.stack(jax.jit(lambda p: iwelbo(model, p, x, noise, SAMPLES))(params), axis=-1)


def test_images_split_over_eight_devices_and_padded_give_the_same(trained, directly):
    config, _, model, params, test = trained
    assert jax.device_count() == 8
    for chunk in (2, 4):  # 21 images: one call of 16 and one of 5 and 11 copies; one of 32
        parts = evaluate.image_bounds(
            model, params, test, fixed_shuffle(21, 10_000), SAMPLES, chunk, config.seed
        )
        np.testing.assert_allclose(np.concatenate(list(parts)), directly, rtol=1e-5)


@pytest.mark.slow
def test_all_test_images_on_one_three_and_eight_devices_give_the_same(tmp_path, images=10_000):
    config = fit_to_machine(tiny.config())
    state = init_state(make_method(config), config, None)
    commands, found = {}, {}
    with contextlib.ExitStack() as running:
        for devices in (1, 3, 8):  # three do not divide the images, nor the training batch
            workdir = tmp_path / str(devices)
            workdir.mkdir()
            checkpoint.save(workdir, state, config.to_dict(), 3)
            commands[devices] = running.enter_context(
                tiny.Command(
                    f"--workdir={workdir}",
                    "--mode=evaluate",
                    devices=devices,
                    eval__samples=1,
                    eval__images=images,
                    eval__chunk=images // 100 + 6,
                )
            )
        for devices, command in commands.items():
            assert command.end(600) == 0, command.complained()
            assert "written to" in command.printed() and not command.complained()
            text = (tmp_path / str(devices) / "evaluation.json").read_text()
            found[devices] = json.loads(text)
    for name in ("iwelbo", "stderr", "reconstruction", "kl"):
        for devices in (1, 3):
            assert found[devices][name] == pytest.approx(found[8][name], rel=1e-4)
    assert found[3]["images"] == images


def test_evaluation_json_holds_the_mean_its_error_and_where_it_came_from(
    trained, directly, monkeypatch
):
    config, workdir, *_ = trained
    tiny.without_network(monkeypatch)
    evaluate.evaluate(config, workdir, print, packaged.stand_in)
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result["iwelbo"] == pytest.approx(directly[:, 0].mean(), rel=1e-5)
    assert result["stderr"] == pytest.approx(directly[:, 0].std(ddof=1) / np.sqrt(21), rel=1e-4)
    assert result["reconstruction"] == pytest.approx(-directly[:, 1].mean(), rel=1e-5)
    assert result["kl"] == pytest.approx(directly[:, 2].mean(), abs=1e-5)
    assert (result["samples"], result["images"], result["data"]) == (SAMPLES, 21, "bundled")
    assert result["checkpoint"] == "checkpoint_00000000.npz"
    assert result["config"]["model"]["latent_size"] == 4


def test_evaluation_json_has_the_settings_that_made_the_parameters(trained):
    config, workdir, *_ = trained
    other = config.copy_and_resolve_references()
    other.train.update(updates=7, decay_updates=7)  # a resumed run may change both
    _, result = lines_of(other, workdir)
    assert result["config"]["train"] == config.train.to_dict()


def test_a_named_checkpoint_of_another_config_is_blamed_and_not_the_workdir(trained, tmp_path):
    config, workdir, *_ = trained
    [path] = checkpoint.paths(workdir)
    other = config.copy_and_resolve_references()
    other.seed = 1
    with pytest.raises(VncaError) as fault:
        evaluate.evaluate(other, tmp_path / "new", print, packaged.stand_in, which=str(path))
    said = str(fault.value)
    assert said.startswith(f"--checkpoint={path} belongs to a run with another config: config.seed")
    assert "Choose another --checkpoint" in said and "--workdir" not in said


def test_stopped_and_started_again_it_goes_on_where_it_was(trained, directly, monkeypatch):
    config, workdir, *_ = trained
    for path in workdir.glob("evaluation*"):
        path.unlink()
    calls, lines = [], []
    with monkeypatch.context() as patch:
        patch.setattr(progress, "ask_all", lambda _: lambda: 143 * len(calls))  # after one call
        patch.setattr(evaluate, "gather", lambda x: calls.append(1) or np.asarray(x))
        with pytest.raises(Stopped) as stop:
            evaluate.evaluate(config, workdir, lines.append, packaged.stand_in)
    assert stop.value.status == 143
    assert "stopped" in lines[-1] and not (workdir / "evaluation.json").exists()
    monkeypatch.setattr(evaluate, "gather", lambda x: calls.append(1) or np.asarray(x))
    evaluate.evaluate(config, workdir, lines.append, packaged.stand_in)
    assert len(calls) == 2  # 16 images at first, then the other 5
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result["iwelbo"] == pytest.approx(directly[:, 0].mean(), rel=1e-5)


def test_a_signal_ends_an_evaluation_after_the_call_that_it_comes_in(trained, monkeypatch):
    config, workdir, *_ = trained

    def interrupted(x):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # it is heard by a thread
        return np.asarray(x)

    monkeypatch.setattr(evaluate, "gather", interrupted)
    with pytest.raises(Stopped) as stop:
        lines_of(with_eval(config, samples=9), workdir)
    assert stop.value.status == 130 and not (workdir / "evaluation.json").exists()
    monkeypatch.undo()
    lines, _ = lines_of(with_eval(config, samples=9), workdir)
    assert "16 images were evaluated before" in lines


def test_a_signal_in_the_last_call_ends_the_program_once_the_result_is_written(
    trained, monkeypatch
):
    config, workdir, *_ = trained
    write = evaluate.write_result

    def interrupted(*of):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # it is heard by a thread
        write(*of)

    monkeypatch.setattr(evaluate, "write_result", interrupted)
    with pytest.raises(Stopped) as stop:
        lines_of(with_eval(config, samples=12), workdir)
    assert stop.value.status == 130
    assert json.loads((workdir / "evaluation.json").read_text())["samples"] == 12


def test_storage_that_fails_is_found_before_anything_is_evaluated(trained, monkeypatch):
    config, workdir, *_ = trained

    def full(*_):
        raise VncaError("no room")

    monkeypatch.setattr(evaluate, "write_partial", full)
    monkeypatch.setattr(evaluate, "gather", pytest.fail)
    with pytest.raises(VncaError, match="no room"):
        lines_of(with_eval(config, samples=13), workdir)


def test_training_images_are_taken_where_the_config_says_so(trained):
    config, workdir, model, params, _ = trained
    other = config.copy_and_resolve_references()
    other.eval.split = "train"
    lines = []
    evaluate.evaluate(config, workdir, print, packaged.stand_in)
    evaluate.evaluate(other, workdir, lines.append, packaged.stand_in)
    assert "21 bundled train images" in lines[0]
    assert not any("evaluated before" in line for line in lines)  # of the test images
    result = json.loads((workdir / "evaluation.json").read_text())
    images, numbers = load("bundled").train, np.random.RandomState(0).permutation(60_000)[:21]
    parts = evaluate.image_bounds(model, params, images, numbers, SAMPLES, 4, config.seed)
    bounds = np.concatenate(list(parts))[:, 0]
    assert result["iwelbo"] == pytest.approx(bounds.mean(), rel=1e-5)
    assert result["split"] == "train"


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_products_have_the_precision_that_the_config_says(trained, monkeypatch, precision):
    found, estimator = [], evaluate.estimator

    def watched(*model):
        found.append(jax.config.jax_default_matmul_precision)
        return estimator(*model)

    monkeypatch.setattr(evaluate, "estimator", watched)
    config, workdir, *_ = trained
    lines_of(with_eval(config, samples=14, precision=precision), workdir)
    assert found and {*found} == {precision}


def test_a_partial_result_of_other_parameters_samples_or_precision_is_not_used(trained):
    config, workdir, model, *_ = trained
    evaluate.evaluate(config, workdir, print, packaged.stand_in)
    first = json.loads((workdir / "evaluation.json").read_text())["iwelbo"]
    lines = []
    for fields in ({"precision": "default"}, {"samples": SAMPLES + 1}):
        evaluate.evaluate(with_eval(config, **fields), workdir, lines.append, packaged.stand_in)
    assert not any("evaluated before" in line for line in lines)
    path = checkpoint.paths(workdir)[0]
    kept = path.read_bytes()
    other = init_state(make_method(config), tiny.config("baseline", seed=1), None)
    checkpoint.save(workdir, other, config.to_dict(), 3)  # the workdir, used anew
    evaluate.evaluate(config, workdir, lines.append, packaged.stand_in)
    path.write_bytes(kept)
    assert not any("evaluated before" in line for line in lines)
    assert json.loads((workdir / "evaluation.json").read_text())["iwelbo"] != first


def test_a_partial_result_of_another_seed_or_other_images_is_not_used(trained, monkeypatch):
    config, workdir, _, params, _ = trained
    lines_of(config, workdir)
    other, data, lines = config.copy_and_resolve_references(), load("bundled"), []
    other.seed = 1
    for run in (other, data), (config, data._replace(name="other")):
        monkeypatch.setattr(evaluate, "trained_params", lambda *_, run=run: (*run, "path", params))
        lines += lines_of(config, workdir)[0]
    assert not any("evaluated before" in line for line in lines)


def test_plain_and_fast_results_are_kept_apart_and_a_folder_in_their_place_is_moved(trained):
    config, workdir, *_ = trained
    _, fast = lines_of(config, workdir)
    lines, plain = lines_of(config, workdir, make_method=partial(make_method, plain=True))
    assert plain["iwelbo"] == pytest.approx(fast["iwelbo"], rel=1e-5)
    assert not any("evaluated before" in line for line in lines)
    for path in workdir.glob("evaluation*json"):
        path.unlink()
    (workdir / "evaluation.json").mkdir()
    assert lines_of(config, workdir)[1] == fast
    (workdir / "evaluation.previous.json").rmdir()


def test_a_pickle_in_a_partial_result_is_never_run(trained):
    config, workdir, *_ = trained
    config = with_eval(config, samples=10)
    others = {*workdir.glob("evaluation.partial.*")}
    _, wanted = lines_of(config, workdir)
    [path] = {*workdir.glob("evaluation.partial.*")} - others
    np.savez(path, rows=np.array(tiny.Trap()))
    assert lines_of(config, workdir)[1] == wanted


def test_a_partial_result_that_the_storage_withholds_is_not_begun_anew(trained, monkeypatch):
    config, workdir, *_ = trained
    lines_of(config, workdir)

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(progress.np, "load", fail)
    with pytest.raises(VncaError, match="cannot read .*evaluation.partial.* Input/output error"):
        progress.read_partial(workdir / "evaluation.json", {}, {}.get)


def test_a_last_line_that_cannot_be_printed_is_an_error(trained):
    def closed(line):
        if "written to" in line:
            raise VncaError("cannot write to standard output")

    config, workdir, *_ = trained
    with pytest.raises(VncaError, match="standard output"):
        evaluate.evaluate(config, workdir, closed, packaged.stand_in)


def test_a_line_that_cannot_be_printed_costs_no_image(trained):
    def closed(line):
        if "/21 images" in line:
            raise VncaError("cannot write to standard output")

    config, workdir, *_ = trained
    config = with_eval(config, samples=15)
    with pytest.raises(VncaError, match="standard output"):
        evaluate.evaluate(config, workdir, closed, packaged.stand_in)
    assert "21 images were evaluated before" in lines_of(config, workdir)[0]


def lines_of(config, workdir, **kwargs):
    """What an evaluation says, and its result."""
    lines = []
    evaluate.evaluate(config, workdir, lines.append, packaged.stand_in, **kwargs)
    return lines, json.loads((workdir / "evaluation.json").read_text())


def with_eval(config, **fields):
    changed = config.copy_and_resolve_references()
    changed.eval.update(fields)
    return changed


def test_each_setting_keeps_its_progress(trained):
    config, workdir, *_ = trained
    other = with_eval(config, samples=2)
    for settings in (config, other):
        lines_of(settings, workdir)
    for settings in (config, other, with_eval(other, images=22)):
        assert any(
            "21 images were evaluated before" in line for line in lines_of(settings, workdir)[0]
        )


def test_another_result_is_set_aside_even_if_all_its_images_were_evaluated_before(trained):
    config, workdir, *_ = trained
    _, all_images = lines_of(config, workdir)
    lines, fewer = lines_of(with_eval(config, images=11), workdir)
    assert fewer["images"] == 11 and "the earlier evaluation.json is now" in "".join(lines)
    assert json.loads((workdir / "evaluation.previous.json").read_text()) == all_images
    lines, again = lines_of(with_eval(config, images=11), workdir)  # nothing changes
    assert again == fewer and "earlier" not in "".join(lines)
    assert json.loads((workdir / "evaluation.previous.json").read_text()) == all_images


def test_an_earlier_result_does_not_pass_for_that_of_a_stopped_evaluation(trained, monkeypatch):
    config, workdir, *_ = trained
    _, earlier = lines_of(config, workdir)
    monkeypatch.setattr(progress, "ask_all", lambda _: lambda: 130)
    lines = []
    with pytest.raises(Stopped):
        evaluate.evaluate(with_eval(config, samples=5), workdir, lines.append, packaged.stand_in)
    assert not (workdir / "evaluation.json").exists()
    assert json.loads((workdir / "evaluation.previous.json").read_text()) == earlier
    assert "the earlier evaluation.json is now evaluation.previous.json" in lines


def test_one_image_has_no_standard_error(trained):
    # Other samples than in other tests, so that it is evaluated here, on one of eight devices.
    lines, result = lines_of(with_eval(trained[0], images=1, samples=16), trained[1])
    assert not any("evaluated before" in line for line in lines)
    assert result["stderr"] is None and not any("±" in line for line in lines)


@pytest.mark.parametrize(
    "rows",
    [
        np.full((5, 3), np.nan, np.float32),
        np.ones((5, 2), np.float32),
        np.ones(5, np.float32),
        np.ones((5, 3), np.int64),
        np.array([["a", "b", "c"]]),
        np.float32(1),
    ],
    ids=str,
)
def test_a_partial_result_that_cannot_be_one_is_computed_again(trained, rows):
    config, workdir, *_ = trained
    _, good = lines_of(config, workdir)
    for path in workdir.glob("evaluation.partial.*"):
        with np.load(path) as file:
            np.savez(path, **dict(file) | {"rows": rows})
    lines, again = lines_of(config, workdir)
    assert again == good and not any("before" in line for line in lines)


def test_an_older_checkpoint_is_evaluated_where_it_is_chosen(trained, tmp_path):
    config, workdir, model, *_ = trained
    workdir = shutil.copytree(workdir, tmp_path / "run")
    other = init_state(make_method(config), tiny.config("baseline", seed=1), None)
    checkpoint.save(workdir, other._replace(update=np.int32(9)), config.to_dict(), 3)
    assert lines_of(config, workdir)[1]["checkpoint"] == "checkpoint_00000009.npz"
    _, result = lines_of(config, workdir, which="0")
    assert result["checkpoint"] == "checkpoint_00000000.npz"
    path = str(workdir / "checkpoint_00000000.npz")
    assert lines_of(config, tmp_path / "elsewhere", which=path)[1]["iwelbo"] == result["iwelbo"]


def test_a_model_that_is_not_finite_is_an_error_that_names_it(trained, tmp_path):
    config, _, model, *_ = trained
    for value, words in ((np.nan, "encoder/linear/bias is not finite"), (3e38, "IWELBO is not")):
        state = jax.device_get(init_state(make_method(config), config, None))
        state.params["encoder"]["linear"]["bias"] = np.full(8, value, np.float32)
        path = checkpoint.save(tmp_path, state, config.to_dict(), 3)
        with pytest.raises(VncaError, match=f"{path}: .*{words}"):
            lines_of(config, tmp_path)
        assert not (tmp_path / "evaluation.json").exists()
