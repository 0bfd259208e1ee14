"""The test IWELBO: the same whatever the devices, chunks and interruptions, and whatever images a
model is for."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from vnca import likelihoods
from vnca.likelihoods import as_floats
from vnca.losses import iwelbo
from vnca.program import VncaError, check, evaluate, pictures, progress, runs, stop, store, train
from vnca.program.data import load
from vnca.program.learner import make_learner, method_sha256, param_shapes
from vnca.program.order import fixed_shuffle
from vnca.training import normal, stream

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


def evaluated(folder, checkpoint=None, plain=None, **fields):
    """Evaluates a run with SETTINGS. Returns evaluation.json."""
    config = tiny.config("baseline", **SETTINGS | fields)
    evaluate.evaluate(runs.open_run(config, folder, "evaluate", checkpoint, plain))
    return json.loads((folder / "evaluation.json").read_text())


def plain_rows(folder, images, count=21, samples=3, config=None):
    """IWELBO, log p(x|z) and KL of the first of these images, uint8 [N, stored_bytes], by the plain
    method, in one piece. config: None is the tiny baseline's."""
    config = config or tiny.config("baseline")
    model = make_learner(config, plain=True).model
    params = runs.find(folder, None).restore("params/", param_shapes(model))
    numbers = fixed_shuffle(count, len(images))

    def noise(sample):
        return normal(stream(config.seed, "evaluation", sample), numbers, model.latent_size)

    x = as_floats(model.likelihood, images[numbers])
    return np.stack(jax.jit(lambda p: iwelbo(model, p, x, noise, samples))(params), axis=-1)


@pytest.mark.parametrize(
    "split, chunk", [("test", 2), pytest.param("train", 4, marks=pytest.mark.slow)]
)
def test_evaluation_json_holds_the_means_their_error_and_where_they_came_from(run, split, chunk):
    # On 8 devices in a call for 16 images and one for 5 and 11 copies; and in one for 32.
    result = evaluated(run, eval__split=split, eval__chunk=chunk)
    rows = plain_rows(run, getattr(load("bundled"), split))
    found = [result[key] for key in ("iwelbo", "reconstruction", "kl")]
    assert found == pytest.approx(rows.mean(0, np.float64) * [1, -1, 1], rel=1e-6, abs=1e-5)
    assert result["stderr"] == pytest.approx(rows[:, 0].std(ddof=1) / np.sqrt(21), rel=1e-4)
    facts = {"samples": 3, "images": 21, "data": "bundled", "split": split}
    assert facts.items() <= result.items() and result["checkpoint"] == "checkpoint_00000002.npz"
    saved, _ = store.load(store.checkpoint(run, 2))
    other = evaluated(run, eval__images=1, train__updates=7)  # which a resumed run may change
    assert other["stderr"] is None and other["config"]["train"] == saved["train"]


def test_a_form_that_deviates_on_an_accelerator_is_not_evaluated_with(run, monkeypatch):
    wrong, used = check.result("fast against plain", {"logits": np.inf}, 0.1), []

    def rows(model, *_):
        used.append(model)
        return [np.zeros((21, 3), np.float32)]

    monkeypatch.setattr(check, "is_accelerator", lambda: True)
    monkeypatch.setattr(check, "fast_against_plain", lambda *_: [wrong])
    monkeypatch.setattr(evaluate, "image_bounds", rows)
    evaluated(run)
    assert used == [make_learner(tiny.config("baseline"), plain=True).model]


def test_the_quick_test_of_training_is_the_iwelbo_of_test_images(workdir):
    [test] = tiny.metrics(workdir)[1]
    expected = plain_rows(workdir, load("bundled").test, 64, 4)[:, 0].mean()
    assert test["test_iwelbo"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_that_is_stopped_goes_on_where_it_was_and_leaves_no_result(
    run, monkeypatch, capsys
):
    evaluated(run, eval__samples=5)  # whose result does not pass for this one's
    monkeypatch.setattr(stop, "asked", lambda: 143)  # after one call
    with pytest.raises(stop.Stopped):
        evaluated(run)
    assert not (run / "evaluation.json").exists()
    monkeypatch.undo()
    for before, count in (16, 21), (21, 40):
        result = evaluated(run, eval__images=count)
        assert f"{before} images were evaluated before" in capsys.readouterr().out
        expected = plain_rows(run, load("bundled").test, count)[:, 0].mean()
        assert result["iwelbo"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_that_is_killed_loses_no_more_than_the_seconds_between_two_lines(
    run, monkeypatch, capsys
):
    now = [0.0]

    def rows(*_):
        for _ in range(3):
            now[0] += 3
            yield np.zeros((4, 3), np.float32)
        raise ZeroDivisionError  # in place of the kill

    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(evaluate, "image_bounds", rows)
    for before in "", "8 images were evaluated before":  # those of six seconds
        with pytest.raises(ZeroDivisionError):
            evaluated(run)
        assert before in capsys.readouterr().out


@pytest.mark.parametrize("name", ["likelihoods.py", "models/clipped.py", "fast/cpu.py"])
def test_an_edit_of_any_file_that_computes_is_seen(tmp_path, monkeypatch, name):
    package = shutil.copytree(Path(likelihoods.__file__).parent, tmp_path / "vnca")
    monkeypatch.setattr(likelihoods, "__file__", str(package / "likelihoods.py"))
    before = method_sha256()
    with open(package / name, "a") as file:
        file.write("# edited")
    assert method_sha256() != before


def test_progress_is_that_of_the_same_settings_and_parameters(run, capsys, monkeypatch, tmp_path):
    first = evaluated(run)
    for fields in (
        {"eval__samples": 4},
        {"eval__precision": "default"},
        {"eval__split": "train"},
        {"plain": True},
    ):
        evaluated(run, **fields)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "method_sha256", lambda: "that of edited files")
        evaluated(run)
    header, arrays = store.load(store.checkpoint(run, 2))
    arrays["params/encoder/linear/bias"] += np.float32(1)
    store.save(store.checkpoint(run, 3), header, arrays)
    assert evaluated(run)["iwelbo"] != first["iwelbo"]
    bundled = load("bundled")
    for images in (
        bundled._replace(name="larochelle"),
        bundled._replace(name="own"),
        bundled._replace(name="own", test=bundled.test[::-1]),  # put in the place of these
    ):
        monkeypatch.setattr(runs, "load", lambda *_, images=images: images)
        evaluated(run)
    said = capsys.readouterr().out
    assert "evaluated before" not in said
    assert "was trained on other images: config.data.name is 'larochelle', was 'bundled'" in said
    monkeypatch.undo()
    for folder, which in (run, "2"), (tmp_path / "new", str(store.checkpoint(run, 2))):
        assert evaluated(folder, which) == first
    assert capsys.readouterr().out.count("21 images were evaluated before") == 1


@pytest.mark.slow  # a training and four evaluations, for 10 seconds
def test_an_evaluation_that_is_stopped_and_goes_on_with_other_steps_is_one_with_these(
    tmp_path, monkeypatch
):
    name, fields = "nondoubling", SETTINGS | {"train__pool_size": 0, "model__steps": 2}
    first, other = tmp_path / "first", tmp_path / "other"
    train.train(runs.open_run(tiny.config(name, **fields), first))
    shutil.copytree(first, other)

    def evaluated(folder, steps):
        config = tiny.config(name, **fields | {"model__steps": steps})
        evaluate.evaluate(runs.open_run(config, folder, "evaluate"))
        return json.loads((folder / "evaluation.json").read_text())

    with monkeypatch.context() as patch:
        patch.setattr(stop, "asked", lambda: 143)  # after one call
        with pytest.raises(stop.Stopped):
            evaluated(first, 2)
    results = {
        (folder, steps): evaluated(folder, steps) for folder in (first, other) for steps in (3, 2)
    }
    for steps in 3, 2:
        assert results[first, steps] == results[other, steps]
        assert results[first, steps]["config"]["model"]["steps"] == steps
    assert results[first, 2]["iwelbo"] != results[first, 3]["iwelbo"]


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_products_have_the_precision_that_is_asked_for(run, monkeypatch, precision):
    asked = set()

    def estimate(params, images, *_):
        asked.add(jax.config.jax_default_matmul_precision)
        return np.zeros((*images.shape[:2], 3))

    monkeypatch.setattr(evaluate, "estimator", lambda model: estimate)
    evaluated(run, eval__precision=precision)
    assert asked == {precision}


def test_another_result_is_set_aside(run, capsys):
    words = "the earlier evaluation.json is now evaluation.previous.json\n"
    first = evaluated(run)
    assert evaluated(run) == first and words not in capsys.readouterr().out
    evaluated(run, eval__images=11)  # all were evaluated before
    assert words in capsys.readouterr().out
    assert json.loads((run / "evaluation.previous.json").read_text()) == first


def test_a_result_that_is_not_finite_is_refused(run):
    header, arrays = store.load(store.checkpoint(run, 2))
    for value, words in (np.nan, "encoder/linear/bias is not finite"), (3e38, "not finite; choose"):
        arrays["params/encoder/linear/bias"][:] = value
        store.save(store.checkpoint(run, 3), header, arrays)
        with pytest.raises(VncaError, match=f"checkpoint_00000003.npz: .*{words}"):
            evaluated(run)
        assert not (run / "evaluation.json").exists()
    kept = [store.load(path)[1] for path in run.glob("evaluation.partial.*")]
    assert kept == [{}]  # so that nothing of it is taken as done


# ---- Small pictures in colour --------------------------------------------------------------------

IN_COLOUR = {
    "data__name": "own",
    "model__size": 16,
    "model__colours": 3,
    "model__levels": 16,
    "train__updates": 3,
    "train__checkpoint_every": 1,
    "eval__every": 3,
    # So that the evaluation is the same program as the quick test, and is not compiled again.
    "eval__images": 64,
    "eval__chunk": 8,
    "eval__precision": "default",
}
MODELS = {
    "nondoubling": {"train__pool_from": 3, "train__damage_size": 8},
    "nondoubling, no pool": {"train__pool_size": 0},
    "doubling": {"model__doublings": 4},
    "healing": {"model__channels": 13, "train__damage_size": 8},  # 3 logits
    "baseline": {"model__drawn_size": 16},
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def in_colour(tmp_path_factory):
    """in_colour(name): the config and the workdir of one of MODELS that was trained on own images,
    made once."""
    place = tmp_path_factory.mktemp("images") / "own.npz"
    draw = np.random.RandomState(0).randint
    shapes = {"train": (96, 16, 12, 3), "test": (64, 16, 12, 3)}
    np.savez(place, **{key: draw(256, size=shapes[key], dtype=np.uint8) for key in shapes})

    @functools.cache
    def of(name):
        fields = SETTINGS | IN_COLOUR | MODELS[name] | {"data__dir": str(place)}
        config = tiny.config(name.partition(",")[0], **fields)
        workdir = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:  # pictures are compiled, too
            patch.setattr(pictures, "training_pictures", lambda *_: {})
            train.train(runs.open_run(config, workdir))
        return config, workdir

    return of


@pytest.mark.slow  # each compiles for 6 seconds
@every_model
def test_small_pictures_in_colour_are_trained_on_and_evaluated(in_colour, name):
    config, workdir = in_colour(name)
    run = runs.open_run(config, workdir, "evaluate")
    evaluate.evaluate(run)
    result = json.loads((workdir / "evaluation.json").read_text())
    found = [result[key] for key in ("iwelbo", "reconstruction", "kl")]
    rows = plain_rows(workdir, run.data.test, 64, config=config)
    assert found == pytest.approx(rows.mean(0, np.float64) * [1, -1, 1], rel=1e-5)


@pytest.mark.slow  # each compiles for 6 seconds
@every_model
def test_a_run_on_them_goes_on_to_the_same_numbers(in_colour, tmp_path, monkeypatch, name):
    config, workdir = in_colour(name)
    monkeypatch.setattr(train, "look", lambda *_: np.zeros(1))
    shutil.copy(store.checkpoint(workdir, 2), tmp_path)
    train.train(runs.open_run(config, tmp_path))
    np.testing.assert_equal(tiny.arrays(tmp_path, 3), tiny.arrays(workdir, 3))


def test_from_update_pool_from_on_a_quarter_of_the_batch_is_damaged_and_nothing_is_before(
    in_colour,
):
    _, workdir = in_colour("nondoubling")
    # An update has changed the parameters by so little that a damaged cell stays close to 0.
    cells = [tiny.arrays(workdir, update)["pool/cells"] for update in (2, 3)]
    damaged = [(abs(x).max(axis=-1) < 0.01).sum() for x in cells]
    assert damaged == [0, 8 * 8**2]
