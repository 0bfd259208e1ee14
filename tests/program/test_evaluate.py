"""The test IWELBO: the same whatever the devices, chunks and interruptions."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from vnca.images import unpack
from vnca.losses import iwelbo
from vnca.noise import normal, stream
from vnca.program import VncaError, evaluate, runs, stop, store, train
from vnca.program.data import load
from vnca.program.method import make_method, param_shapes
from vnca.program.order import fixed_shuffle

pytestmark = pytest.mark.usefixtures("quickly_compiled")
SETTINGS = {"eval__samples": 3, "eval__images": 21, "eval__chunk": 2, "train__updates": 2}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a tiny model that was trained for two updates."""
    folder = tmp_path_factory.mktemp("run")
    train.train(runs.open_run(tiny.config("baseline", **SETTINGS), folder))
    return folder


@pytest.fixture
def run(workdir, tmp_path):
    """A copy of it."""
    return shutil.copytree(workdir, tmp_path / "run")


def evaluated(folder, checkpoint=None, plain=None, name="baseline", **fields):
    """Evaluates a run with SETTINGS. Returns evaluation.json."""
    config = tiny.config(name, **SETTINGS | fields)
    evaluate.evaluate(runs.open_run(config, folder, "evaluate", checkpoint, plain))
    return json.loads((folder / "evaluation.json").read_text())


@functools.cache
def plain_rows(folder, split="test", samples=3):
    """IWELBO, log p(x|z) and KL of the first 21 images by the plain method, in one piece."""
    config = tiny.config("baseline")
    model = make_method(config, plain=True).model
    params = runs.find(folder, None).restore("params/", param_shapes(model))
    images = getattr(load("bundled"), split)
    numbers = fixed_shuffle(21, len(images))

    def noise(sample):
        return normal(stream(config.seed, "evaluation", sample), numbers, model.latent_size)

    x = unpack(images[numbers])
    return np.stack(jax.jit(lambda p: iwelbo(model, p, x, noise, samples))(params), axis=-1)


def test_chunks_and_devices_change_nothing(workdir, run):
    assert jax.device_count() == 8
    for chunk in (2, 4):  # 21 images: one call of 16 and one of 5 and 11 copies; one of 32
        found = evaluated(
            run, eval__chunk=chunk, eval__precision=["highest", "default"][chunk // 4]
        )
        assert found["iwelbo"] == pytest.approx(plain_rows(workdir)[:, 0].mean(), rel=1e-6)


@pytest.mark.parametrize("split", ["test", "train"])
def test_evaluation_json_holds_the_means_their_error_and_where_they_came_from(
    workdir, run, split, monkeypatch
):
    tiny.without_network(monkeypatch)
    result, rows = evaluated(run, eval__split=split), plain_rows(workdir, split)
    assert result["iwelbo"] == pytest.approx(rows[:, 0].mean(), rel=1e-5)
    assert result["stderr"] == pytest.approx(rows[:, 0].std(ddof=1) / np.sqrt(21), rel=1e-4)
    assert result["reconstruction"] == pytest.approx(-rows[:, 1].mean(), rel=1e-5)
    assert result["kl"] == pytest.approx(rows[:, 2].mean(), abs=1e-5)
    facts = {"samples": 3, "images": 21, "data": "bundled", "split": split}
    facts |= {"checkpoint": "checkpoint_00000002.npz"}
    assert facts.items() <= result.items()
    saved, _ = store.load(store.checkpoint(run, 2))
    other = evaluated(run, eval__images=1, train__updates=7)  # which a resumed run may change
    assert other["stderr"] is None and other["config"]["train"] == saved["train"]


def test_an_evaluation_that_is_stopped_goes_on_where_it_was(workdir, run, monkeypatch, capsys):
    calls, image_bounds = [], evaluate.image_bounds

    def counted(*given):
        for part in image_bounds(*given):
            calls.append(len(part))
            yield part

    monkeypatch.setattr(evaluate, "image_bounds", counted)
    monkeypatch.setattr(evaluate.stop, "asked", lambda: 143 * len(calls))  # after one call
    with pytest.raises(stop.Stopped) as stopped:
        evaluated(run)
    assert stopped.value.status == 143 and not (run / "evaluation.json").exists()
    assert capsys.readouterr().out.endswith("stopped; run the same command again to resume\n")
    monkeypatch.setattr(stop, "asked", lambda: 0)
    result = evaluated(run)
    assert calls == [16, 5] and "16 images were evaluated before" in capsys.readouterr().out
    assert result["iwelbo"] == pytest.approx(plain_rows(workdir)[:, 0].mean(), rel=1e-5)
    evaluated(run, eval__images=22)
    assert calls == [16, 5, 1]


def test_progress_is_that_of_the_same_settings_and_parameters(run, capsys, monkeypatch, tmp_path):
    first = evaluated(run)
    for fields in (
        {"eval__samples": 4},
        {"eval__precision": "default"},
        {"eval__split": "train"},
        {"plain": True},
    ):
        evaluated(run, **fields)
    trained = runs.find(run, None)
    header, arrays = store.load(trained.path)
    arrays["params/encoder/linear/bias"] = arrays["params/encoder/linear/bias"] + np.float32(1)
    store.save(store.checkpoint(run, 3), header, arrays)
    assert evaluated(run)["iwelbo"] != first["iwelbo"]
    images = load("bundled")
    monkeypatch.setattr(runs, "load", lambda *_, **__: images._replace(name="larochelle"))
    evaluated(run)
    assert "evaluated before" not in capsys.readouterr().out
    monkeypatch.undo()
    for folder, which in (run, "2"), (tmp_path / "new", str(store.checkpoint(run, 2))):
        assert evaluated(folder, which) == first
    assert capsys.readouterr().out.count("21 images were evaluated before") == 1
    with pytest.raises(VncaError, match="--checkpoint=7: there is none"):
        evaluated(run, "7")


def test_another_result_is_set_aside_and_never_passes_for_that_of_a_stopped_one(
    run, monkeypatch, capsys
):
    first, words = evaluated(run), "the earlier evaluation.json is now evaluation.previous.json\n"
    assert evaluated(run) == first and words not in capsys.readouterr().out
    fewer = evaluated(run, eval__images=11)  # all were evaluated before
    assert words in capsys.readouterr().out
    previous = run / "evaluation.previous.json"
    assert json.loads(previous.read_text()) == first
    monkeypatch.setattr(stop, "asked", lambda: 130)
    with pytest.raises(stop.Stopped):
        evaluated(run, eval__samples=5)
    assert not (run / "evaluation.json").exists()
    assert json.loads(previous.read_text()) == fewer


def test_more_images_than_there_are_and_a_result_that_is_not_finite_are_refused(run):
    with pytest.raises(VncaError, match="config.eval.images=10001: .*10,000"):
        evaluated(run, eval__images=10_001)
    header, arrays = store.load(store.checkpoint(run, 2))
    for value, words in (np.nan, "encoder/linear/bias is not finite"), (3e38, "not finite; choose"):
        arrays["params/encoder/linear/bias"] = np.full(8, value, np.float32)
        store.save(store.checkpoint(run, 3), header, arrays)
        with pytest.raises(VncaError, match=f"checkpoint_00000003.npz: .*{words}"):
            evaluated(run)
        assert not (run / "evaluation.json").exists()
