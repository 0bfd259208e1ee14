"""The study's numbers: each against another way to get it."""

import json
import os
import signal
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import quickstart
from vnca.images import unpack
from vnca.losses import bernoulli_log_likelihood
from vnca.models import make_model
from vnca.noise import draw_each, stream
from vnca.pool import damage_mask
from vnca.program import Stopped, VncaError, data, evaluate
from vnca.program.method import make_method
from vnca.program.order import fixed_shuffle
from vnca.report import packaged, plots, regrowth, study
from vnca.report.pictures import prior_samples

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SMALL = make_model(tiny.config("nondoubling").model)
TEST = data.load("bundled").test
NUMBERS = fixed_shuffle(4, len(TEST))
X = unpack(TEST[NUMBERS])


@pytest.fixture(scope="module")
def params():
    """Of a non-doubling model that does something: its last layer is not zero."""
    fresh = jax.jit(SMALL.init)(jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), fresh["decoder"]["residual"]["kernel"].shape)
    fresh["decoder"]["residual"]["kernel"] = 0.3 * noise
    return fresh


def test_all_samples_together_give_the_iwelbo_of_evaluation(params):
    weights = study.log_weights(8, SMALL, params, X, NUMBERS, 5)
    found = study.summarize_bounds(np.asarray(weights), np.zeros(4, int))
    (rows,) = evaluate.image_bounds(SMALL, params, TEST, NUMBERS, 8, 1, 5)
    assert found["samples"] == [1, 2, 4, 8]
    np.testing.assert_allclose(found["iwelbo"][-1], rows[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["iwelbo"][0], np.mean(weights), rtol=1e-5)


def test_samples_that_are_no_power_of_two_all_count():
    weights = np.random.RandomState(1).normal(size=(3, 6))
    found = study.summarize_bounds(weights, np.array([1, 1, 2]))
    assert found["samples"] == [1, 2, 4, 6]
    of_all = np.log(np.mean(np.exp(weights), axis=1))
    np.testing.assert_allclose(found["iwelbo"][-1], of_all.mean(), atol=1e-3)
    assert found["digits"][0] == [None, None] and found["digits"][2][1] is None


def test_the_bound_grows_with_the_samples_and_is_split_by_digit():
    weights, labels = np.random.RandomState(0).normal(size=(40, 16)), np.arange(40) % 10
    found = study.summarize_bounds(weights, labels)
    assert all(np.diff(found["iwelbo"]) > 0)
    means = [np.log(np.mean(np.exp(weights[labels == d]), axis=1)).mean() for d in range(10)]
    np.testing.assert_allclose([mean for mean, _ in found["digits"]], means, atol=1e-3)


@jax.jit
def without(size, cells, places):
    """The scores of cells without a square, for each of these corners of it: [P, B, 2]."""

    def one(corner):
        rows, columns = (
            (jnp.arange(32) >= first) & (jnp.arange(32) < first + size) for first in corner
        )
        square = (rows[:, None] & columns)[..., None]
        return study.score_cells(jnp.where(square, 0, cells), X)

    return jax.lax.map(one, places)


def test_recovery_begins_with_a_square_of_zeros_and_goes_on_by_steps(params, monkeypatch):
    monkeypatch.setattr(study, "RECOVERY_STEPS", 3)
    found = study.recovery_curves(SMALL, params, X, NUMBERS, 0)
    assert found.shape == (4, len(study.SQUARE_SIZES), 4, 2)
    cells = regrowth.grow_images(SMALL, params, X)
    most = 29 * 29  # places of a square, of one shape for all sizes: each is compiled
    for i, size in enumerate(study.SQUARE_SIZES):
        # Without a square somewhere, it is what was found: one place of all fits each image.
        places = [
            (top, left) for top in range(33 - size) for left in (range(33 - size) if size else [0])
        ]
        places += places[-1:] * (most - len(places))
        close = np.isclose(without(size, cells, np.array(places)), found[:, i, 0], rtol=1e-6)
        assert np.all(np.any(np.all(close, axis=2), axis=0)), size
    later = cells
    for step in range(4):
        np.testing.assert_allclose(found[:, 0, step], study.score_cells(later, X), rtol=1e-4)
        later = SMALL.step(params, later)


def test_stability_begins_with_the_initial_cells_and_goes_on_by_steps(params, monkeypatch):
    monkeypatch.setattr(study, "STABILITY_STEPS", 3)
    found = study.stability_curves(SMALL, params, X, NUMBERS, 0)
    cells = SMALL.initial_cells(SMALL.encode(params, X)[0])
    for step in range(4):
        np.testing.assert_allclose(found[:, step], study.score_cells(cells, X), rtol=1e-4)
        cells = SMALL.step(params, cells)


def test_regrowth_is_shown_after_2_4_8_16_and_32_steps(params):
    states = regrowth.damage_and_regrow(SMALL, params, regrowth.grow_images(SMALL, params, X))
    cells = regrowth.lose_quadrant(states[0])
    for step in range(33):
        if step in (0, 2, 4, 8, 16, 32):
            found = states[1 + [0, 2, 4, 8, 16, 32].index(step)]
            np.testing.assert_allclose(found, cells, rtol=1e-3, atol=1e-4 * np.abs(cells).max())
        cells = SMALL.step(params, cells)


def test_healing_counts_what_each_of_two_losses_and_each_regrowth_changes(params, monkeypatch):
    monkeypatch.setattr(study, "HEALING_STEPS", (2, 3))
    numbers = np.array([4, 0, 7, 5])
    found = np.asarray(study.healing_changes(SMALL, params, None, numbers, 3))
    assert found.shape == (4, 4)
    z = np.stack([prior_samples(3, 80, SMALL.latent_size)[n] for n in numbers])
    cells = SMALL.initial_cells(jnp.asarray(z))
    for _ in range(SMALL.steps):
        cells = SMALL.step(params, cells)
    before = np.asarray(cells[..., 0]) > 0
    for loss, steps in enumerate((2, 3)):
        masks = draw_each(partial(damage_mask, size=16), stream(3, "loss", loss), numbers)
        assert np.all(np.sum(masks, axis=(1, 2, 3)) == 256)
        cells = cells * ~masks
        np.testing.assert_array_equal(found[:, 2 * loss], changed(cells, before))
        for _ in range(steps):
            cells = SMALL.step(params, cells)
        np.testing.assert_allclose(found[:, 2 * loss + 1], changed(cells, before), atol=1)
    again = study.healing_changes(SMALL, params, None, numbers[::-1], 3)
    np.testing.assert_allclose(again, found[::-1], atol=1)
    assert not np.array_equal(study.healing_changes(SMALL, params, None, numbers, 4), found)


def test_a_test_set_may_have_fewer_images_than_there_are_samples_from_the_prior(params):
    settings = tiny.config("nondoubling", eval__chunk=2)
    few = data.Dataset("own", None, TEST[:3], None, None)
    trained = packaged.TrainedModel(settings, SMALL, params, few, None, "")

    def numbers(model, params, x, indices, seed):
        assert x.shape == (2, 32, 32, 1)
        return indices

    parts = study.measure_in_chunks(numbers, trained, np.arange(5), 0)
    assert np.concatenate([*parts]).tolist() == [0, 1, 2, 3, 4]


def test_each_measurement_has_its_model_its_images_and_its_seed():
    indices = {kind: np.arange(n) for n, kind in enumerate(packaged.KINDS, 1)}
    found = {name: of for name, *of in study.list_measurements(indices, 4, seed=7)}
    for name in ("recovery", "stability"):
        kind, _, images, seed = found.pop(name)
        assert kind == "nondoubling" and images is indices[kind] and seed == 7
    for kind in packaged.KINDS:
        of, _, images, seed = found.pop(f"IWELBO of {kind}")
        assert of == kind and images is indices[kind] and seed == 7
    assert len(found) == 5
    for name, (kind, _, numbers, seed) in found.items():
        assert name == f"healing, seed {seed}" and kind == "nondoubling" and len(numbers) == 80


def changed(cells, before):
    return np.sum((np.asarray(cells[..., 0]) > 0) != before, axis=(1, 2))


def test_curves_are_the_mean_and_the_deviation_of_each_term_over_images():
    scores = np.random.RandomState(0).normal(size=(6, 3, 2)) * [1, 50]
    found = study.mean_and_deviation(scores)
    for i, term in enumerate(("wrong", "log_px")):
        wanted = np.stack([scores[..., i].mean(0), scores[..., i].std(0)], axis=1)
        np.testing.assert_allclose(found[term], wanted, atol=6e-4)


def test_the_summary_has_the_numbers_of_the_steps_that_it_names():
    def curves(first):
        of = lambda f: [[f + t, 0.5 * t] for t in range(501)]  # noqa: E731
        return {"wrong": of(first), "log_px": of(first - 1000)}

    healing = {"median": [100, 20, 90, 5], "p90": [130, 40, 120, 9], "most": [150, 60, 140, 30]}
    bounds = {"samples": [1, 2], "iwelbo": [-99.25, -98.5], "stderr": 0.25}
    lines = study.summary_lines(
        {
            "recovery": {"0": curves(0), "16": curves(30)},
            "healing": {"3": healing},
            "steps": 12,
            "stability": curves(7),
            "iwelbo": {"baseline": bounds},
        }
    )
    assert lines[0].startswith("no damage: wrong pixels 0.0, after 8 steps 8.0, after 32 32.0;")
    assert lines[1] == (
        "16×16 lost: wrong pixels 30.0, after 8 steps 38.0, after 32 62.0; "
        "log p(x|z) -970.0, -962.0, -938.0 nats"
    )
    assert lines[2].endswith(
        "seed 3: changed pixels, median (90th percentile, maximum): 100 (130, 150); after 38 steps "
        "20 (40, 60); after a second loss 90 (120, 140); after 68 steps 5 (9, 30); 0.20 and 0.05 "
        "of the first loss remain"
    )
    assert lines[4].startswith("12 steps from the initial cells: wrong pixels 19.0 ± 6.0, log p(x|")
    assert "-981.0 ± 6.0 nats" in lines[4] and lines[9].startswith("500 steps")
    assert lines[-1] == "IWELBO of baseline by samples: 1: -99.25, 2: -98.50 (± 0.25) nats"


def test_of_healing_the_median_the_90th_percentile_and_the_most_are_said():
    rows = np.tile(np.arange(11)[:, None], 4) * [2, 1, 3, 4]
    found = study.summarize_changes(rows)
    assert found == {"median": [10, 5, 15, 20], "p90": [18, 9, 27, 36], "most": [20, 10, 30, 40]}
    assert study.remaining_fractions(found) == [0.5, 2.0]


@pytest.mark.parametrize(("drift", "said"), [(1.9, " within 2 of"), (2.1, "NOT within 2 of")])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_summary_says_whether_digits_are_held_to_step_500(drift, said, sign):
    of_steps = [[-300.0, 0.0]] * 3 + [[-100.0, 0.0]] * 100 + [[-100 + sign * drift, 0.0]] * 398
    curve = {"wrong": of_steps, "log_px": of_steps}
    result = {"recovery": {}, "healing": {}, "iwelbo": {}, "steps": 3, "stability": curve}
    (line,) = [line for line in study.summary_lines(result) if "from 3 to 500 steps" in line]
    assert said in line and "of the first value, -100.0" in line
    longer = study.summary_lines(result | {"steps": 600})  # a model of more steps than are measured
    assert any("from 500 to 500 steps" in line and "NOT" not in line for line in longer)


def test_a_pixel_is_wrong_where_the_likelier_value_is():
    logits = jnp.where(X > 0.5, 2.0, -2.0).at[:, 3, 4].multiply(-1).at[1, 5, 6].multiply(-1)
    wrong, log_px = study.score_cells(logits, X).T
    np.testing.assert_array_equal(wrong, [1, 2, 1, 1])
    np.testing.assert_allclose(log_px, bernoulli_log_likelihood(logits, X))
    diverged = study.score_cells(logits * jnp.nan, X)
    assert np.all(diverged[:, 0] == 1024)  # all pixels are wrong


def compiled_soon(kind):
    """A tiny model in place of a packaged one; the study asks the same of the two without a pool,
    and of them the baseline is the one that compiles in less."""
    return tiny.in_place_of_packaged("nondoubling" if kind == "nondoubling" else "baseline")


@pytest.mark.slow
@pytest.mark.parametrize("models", ["tiny", "packaged"])
def test_a_study_of_more_images_goes_on_from_one_of_fewer(tmp_path, monkeypatch, models):
    if models == "tiny":
        monkeypatch.setattr(packaged, "load", compiled_soon)
    chunks, measure = [], study.recovery_curves

    def counted(*args):
        if not isinstance(args[3], jax.core.Tracer):  # it is asked for its shape, too
            chunks.append(args[3])
        return measure(*args)

    monkeypatch.setattr(study, "recovery_curves", counted)
    monkeypatch.setattr(study, "PRIOR_SAMPLES", 3)
    config, results, lines = quickstart.get_config(), [], []
    config.eval.samples = config.eval.chunk = 2
    for folder, counts in (("on", (2, 5)), ("once", (5,))):
        chunks.clear()
        for count in counts:
            config.eval.images = count
            study.study(config, tmp_path / folder, lines.append)
        results.append(json.loads((tmp_path / folder / "study.json").read_text()))
        # 5 images in chunks of 2, the last of them padded; none of them twice
        order = fixed_shuffle(5, 10_000)
        np.testing.assert_array_equal(chunks, [order[:2], order[2:4], order[[4, 4]]])
    assert results[0] == results[1] and results[0]["images"] == 5
    assert set(results[0]["iwelbo"]) == set(packaged.KINDS)
    assert len(results[0]["stability"]["wrong"]) == 501
    assert list(results[0]["healing"]) == ["0", "1", "2", "3", "4"]
    assert {len(at) for found in results[0]["healing"].values() for at in found.values()} == {4}
    assert sum("16×16 lost of 3 samples, seed" in line for line in lines) >= 5
    assert "5/5 images  recovery" in "".join(lines)


def interrupted(model, params, x, numbers, seed):
    """A measurement during which the user presses Ctrl-C."""
    if isinstance(numbers, jax.core.Tracer):  # it is asked for its shape, too
        return jnp.zeros((len(x), 2))
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)  # it is heard by a thread
    return np.zeros((len(x), 2), np.float32)


def test_several_processes_are_told_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(VncaError, match="--mode=study runs in one process only"):
        study.study(quickstart.get_config(), tmp_path, print)


def test_a_signal_in_the_last_call_of_a_part_ends_the_study_there(tmp_path, monkeypatch):
    precisions = []

    def measure(*of):
        precisions.append(jax.config.jax_default_matmul_precision)
        return interrupted(*of)

    monkeypatch.setattr(study, "recovery_curves", measure)
    monkeypatch.setattr(study, "stability_curves", lambda *_: pytest.fail("it went on"))
    config, lines = quickstart.get_config(), []
    config.eval.images = config.eval.samples = config.eval.chunk = 2
    with pytest.raises(Stopped) as stop:
        study.study(config, tmp_path, lines.append)
    assert stop.value.status == 130
    assert precisions[-1] == config.eval.precision == "highest"
    assert "stopped" in lines[-1] and not (tmp_path / "study.json").exists()
    [path] = tmp_path.glob("study.partial.*.npz")
    with np.load(path) as kept:
        assert set(kept) == {"recovery"} and len(kept["recovery"]) == 2


def more_trained(models):
    params = jax.tree.map(lambda x: x + 1, models["doubling"].params)
    return models | {"doubling": models["doubling"]._replace(params=params)}


def test_a_stopped_study_is_kept_while_another_has_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "recovery_curves", interrupted)
    config = quickstart.get_config()
    config.eval.images = config.eval.chunk = 2
    for samples in (2, 3):
        config.eval.samples = samples
        with pytest.raises(Stopped):
            study.study(config, tmp_path, lambda line: None)
    plain = partial(make_method, plain=True)
    with pytest.raises(Stopped):
        study.study(config, tmp_path, lambda line: None, plain)

    def stop_with(**changed):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({k.replace("__", "."): v for k, v in changed.items()})
        with pytest.raises(Stopped):
            study.study(other, tmp_path, lambda line: None)

    stop_with(seed=1)
    stop_with(eval__precision="default")
    trained_models = study.trained_models
    with monkeypatch.context() as patch:  # as after more training
        patch.setattr(study, "trained_models", lambda *given: more_trained(trained_models(*given)))
        stop_with()
    assert len(list(tmp_path.glob("study.partial.*.npz"))) == 6
    config.eval.samples, lines = 2, []  # the recovery was measured: it goes on with the stability
    monkeypatch.setattr(study, "stability_curves", interrupted)
    with pytest.raises(Stopped):
        study.study(config, tmp_path, lines.append)
    assert "1 of 10 measurements were begun or done before" in lines
    kept = []
    for path in tmp_path.glob("study.partial.*.npz"):
        with np.load(path) as arrays:
            kept.append(set(arrays))
    assert sorted(map(len, kept)) == [1, 1, 1, 1, 1, 2] and {"recovery", "stability"} in kept


def test_the_packaged_study_is_of_the_packaged_models_and_of_a_thousand_images():
    subjects = packaged.trained_models(quickstart.get_config(), "nowhere", lambda line: None)
    found = plots.find_study(subjects, "nowhere")
    assert found and found["images"] == 1000 and found["iwelbo"]["doubling"]["samples"][-1] == 128
    assert found["names"]["nondoubling"] == "HealingVNCA"  # its kind has the published one's name
    worse = subjects | {"doubling": subjects["doubling"]._replace(params={"w": np.zeros(3)})}
    assert plots.find_study(worse, "nowhere") is None


def test_a_study_of_one_image_starts_again_where_a_partial_result_has_another_shape(
    tmp_path, monkeypatch
):
    for name, steps in {"PRIOR_SAMPLES": 2, "STABILITY_STEPS": 300, "RECOVERY_STEPS": 33}.items():
        monkeypatch.setattr(study, name, steps)
    monkeypatch.setattr(packaged, "load", lambda kind, *_: tiny.in_place_of_packaged(kind))
    tiny.without_network(monkeypatch)
    of_size = np.arange(6.0)[:, None, None] + np.zeros((1, 6, 34, 2))
    monkeypatch.setattr(study, "recovery_curves", lambda *_: jnp.array(of_size))
    config, lines = quickstart.get_config(), []
    config.eval.images, config.eval.samples, config.eval.chunk = 1, 2, 2
    (tmp_path / "study.json").write_text("{}")
    study.study(config, tmp_path, lines.append)
    assert (tmp_path / "study.previous.json").read_text() == "{}"
    assert "None" not in "".join(lines)  # no standard error of one image
    wanted = (tmp_path / "study.json").read_bytes()
    recovery = json.loads(wanted)["recovery"]
    for size, value in {"0": 0, "4": 1, "8": 2, "12": 3, "16": 4, "20": 5}.items():
        assert recovery.pop(size)["wrong"][0] == [value, 0]
    assert not recovery
    [path] = tmp_path.glob("study.partial.*")
    with np.load(path) as file:
        np.savez(path, **dict(file) | {"recovery": np.ones((1, 2, 3))})
    study.study(config, tmp_path, lines.append)
    assert (tmp_path / "study.json").read_bytes() == wanted
