"""The study: its numbers, each against another way to get it, and its progress."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from vnca.images import unpack
from vnca.losses import bernoulli_log_likelihood
from vnca.models import Model, make_model
from vnca.program import VncaError, data, evaluate, runs, stop
from vnca.program.config import KINDS
from vnca.program.pictures import prior_samples
from vnca.report import plots, study
from vnca.report.trained import TrainedModel

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BUNDLED = data.load("bundled")
LIT = jnp.ones((4, 32, 32, 1))
NUMBERS = np.array([4, 0, 7, 5])


def automaton(heals_after, born=True):
    """A model of lit pictures, or dark ones for z < 0. A lost cell is lit again after so many steps
    (logit 1, or −1). Its second channel counts the steps. Cells that are not born begin as lost."""

    def initial_cells(z):
        cells = jnp.stack([jnp.sign(z[:, 0]), jnp.full(len(z), 1000)], axis=-1)
        return jnp.broadcast_to(born * cells[:, None, None], (len(z), 32, 32, 2))

    def step(params, s):
        heals = (s[..., :1] == 0) & (s[..., 1:] + 1 >= heals_after)
        return jnp.concatenate([jnp.where(heals, 1, s[..., :1]), s[..., 1:] + 1], axis=-1)

    def encode(params, x):
        return jnp.ones((len(x), 2)), jnp.zeros((len(x), 2))

    def decode(params, z):
        return jnp.broadcast_to(z[:, None, None, :1], (len(z), 32, 32, 1))

    return Model(2, None, encode, decode, None, 12, None, initial_cells, step)


# ---- What is measured ----------------------------------------------------------------------------


def test_recovery_begins_with_a_square_of_zeros_of_each_size():
    found = study.recovery_curves(automaton(9), {}, LIT, NUMBERS, 0)
    assert found.shape == (4, 6, 65, 2)
    lit, lost = jax.nn.log_sigmoid(1.0), jax.nn.log_sigmoid(0.0)
    for i, area in enumerate(n**2 for n in (0, 4, 8, 12, 16, 20)):
        for t in (0, 8, 9, 64):
            wrong = area * (t < 9)
            wanted = wrong, wrong * lost + (1024 - wrong) * lit
            np.testing.assert_allclose(found[:, i, t], np.tile(wanted, (4, 1)), rtol=1e-5)


def test_stability_begins_with_the_initial_cells_and_ends_500_steps_later():
    found = study.stability_curves(automaton(9, born=False), {}, LIT, NUMBERS, 0)
    assert found.shape == (4, 501, 2)
    assert np.all(found[:, :9, 0] == 1024) and np.all(found[:, 9:, 0] == 0)


def test_the_place_of_a_square_depends_on_seed_and_image():
    x = unpack(BUNDLED.test[NUMBERS])
    measure = lambda order, seed: study.recovery_curves(  # noqa: E731
        automaton(9), {}, x[order], NUMBERS[order], seed
    )
    found = measure(np.arange(4), 0)
    np.testing.assert_allclose(measure(np.arange(4)[::-1], 0), found[::-1], rtol=1e-6)
    assert not np.array_equal(measure(np.arange(4), 1), found)


@pytest.mark.parametrize("heals_after", [1, 38, 39, 68, 69])
def test_healing_counts_what_each_of_two_losses_and_each_regrowth_changes(heals_after):
    numbers = np.arange(8)
    found = np.asarray(study.healing_changes(automaton(heals_after), {}, None, numbers, 3))
    lit = np.asarray(prior_samples(3, 80, 2))[:8, 0] > 0
    first, healed, second, end = found[lit].T
    assert np.all(first == 256) and np.all(healed == 256 * (heals_after > 38))
    assert np.all(second == 256) if heals_after <= 38 else np.all((second > 256) & (second <= 512))
    assert np.all(end > 0) if heals_after > 68 else np.all(end == 0)
    assert len(np.unique(second)) > 1 or heals_after <= 38  # each has squares of its own
    assert np.all(found[~lit][:, 0] == 0) and 0 < lit.sum() < 8
    again = study.healing_changes(automaton(heals_after), {}, None, numbers[::-1], 3)
    np.testing.assert_array_equal(again, found[::-1])


def test_a_pixel_is_wrong_where_the_likelier_value_is_and_where_there_is_none():
    x = unpack(BUNDLED.test[NUMBERS])
    logits = jnp.where(x > 0.5, 2.0, -2.0).at[:, 3, 4].multiply(-1).at[1, 5, 6].multiply(-1)
    wrong, log_px = study.score_cells(logits, x).T
    np.testing.assert_array_equal(wrong, [1, 2, 1, 1])
    np.testing.assert_allclose(log_px, bernoulli_log_likelihood(logits, x))
    assert np.all(study.score_cells(logits * jnp.nan, x)[:, 0] == 1024)


def test_all_samples_together_give_the_iwelbo_of_evaluation():
    model = make_model(tiny.config("nondoubling").model)
    params = tiny.in_place_of_packaged("nondoubling").params
    x = unpack(BUNDLED.test[NUMBERS])
    weights = np.asarray(study.log_weights(8, model, params, x, NUMBERS, 5))
    found = study.summarize_bounds(weights, None)
    (rows,) = evaluate.image_bounds(model, params, BUNDLED.test, NUMBERS, 8, 1, 5)
    np.testing.assert_allclose(found["iwelbo"][-1], rows[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["iwelbo"][0], np.mean(weights), rtol=1e-5)


# ---- What is said of it --------------------------------------------------------------------------


def test_the_bound_is_of_groups_of_samples_and_of_each_class():
    labels = np.array([4, 4, 2, 4, 2, 4, 0, 6])  # of a test set with more images
    order = np.random.RandomState(0).permutation(8)[:6]
    weights = np.random.RandomState(1).normal(size=(6, 6))
    found = study.summarize_bounds(weights, labels)
    assert found["samples"] == [1, 2, 4, 6]
    for n, bound in zip(found["samples"], found["iwelbo"], strict=True):
        groups = [weights[:, i : i + n] for i in range(0, 6 - n + 1, n)]
        each = np.mean([np.log(np.mean(np.exp(g), axis=1)) for g in groups], axis=0)
        assert bound == pytest.approx(each.mean(), abs=1e-5)
    assert found["stderr"] == pytest.approx(each.std(ddof=1) / 6**0.5, abs=1e-3)
    assert len(found["digits"]) == 7
    for label, (mean, error) in enumerate(found["digits"]):
        of_class = each[labels[order] == label]
        assert (mean is None) == (len(of_class) < 2)
        if mean is not None:
            assert mean == pytest.approx(of_class.mean(), abs=1e-3)
            assert error == pytest.approx(of_class.std(ddof=1) / len(of_class) ** 0.5, abs=1e-3)
    assert study.summarize_bounds(weights, None)["digits"] is None


def test_curves_and_changes_are_summarized_over_images():
    scores = np.random.RandomState(0).normal(size=(6, 3, 2)) * [1, 50]
    found = study.mean_and_deviation(scores)
    for i, term in enumerate(("wrong", "log_px")):
        wanted = np.stack([scores[..., i].mean(0), scores[..., i].std(0)], axis=1)
        np.testing.assert_allclose(found[term], wanted, atol=6e-4)
    rows = np.tile(np.arange(11)[:, None], 4) * [2, 1, 3, 4]
    wanted = {"median": [10, 5, 15, 20], "p90": [18, 9, 27, 36], "most": [20, 10, 30, 40]}
    assert study.summarize_changes(rows) == wanted


# ---- Its progress --------------------------------------------------------------------------------


def models(more=0):
    """Models that compile soon, with a test set of fewer images than there are prior samples."""
    few = data.Dataset("own", BUNDLED.test[:1], BUNDLED.test[:6], None, np.arange(6))
    config = ConfigDict({"eval": {"chunk": 2}, "model": {"name": "none"}})
    params = {"w": np.float32([more])}
    return dict.fromkeys(KINDS, TrainedModel(config, automaton(9), params, few, None, "x.npz"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A study of two images of these models, until it is asked to stop: run(workdir, …)."""
    monkeypatch.setattr(study, "is_plain", lambda model, config: run.plain)
    monkeypatch.setattr(study, "trained_models", lambda _: models(run.more))
    monkeypatch.setattr(study, "PRIOR_SAMPLES", 7)
    monkeypatch.setattr(stop, "ask", lambda status: None)
    monkeypatch.setattr(stop, "asked", lambda: run.asked)
    true = study.recovery_curves

    def measure(model, params, x, indices, seed):
        run.measured.append(indices.tolist())
        run.precisions.add(jax.config.jax_default_matmul_precision)
        run.asked = run.stops
        return true(model, params, x, indices, seed)

    monkeypatch.setattr(study, "recovery_curves", measure)

    def run(folder="on", stops=0, plain=False, more=0, **fields):
        run.asked, run.stops, run.plain, run.more, run.measured = 0, stops, plain, more, []
        config = tiny.config(**{"eval__images": 2, "eval__samples": 2, **fields})
        (tmp_path / folder).mkdir(exist_ok=True)
        subject = runs.Run(config, tmp_path / folder, plain, None)
        if not stops:
            study.study(subject)
            return (tmp_path / folder / "study.json").read_bytes()
        with pytest.raises(stop.Stopped) as stopped:
            study.study(subject)
        assert stopped.value.status == stops and not (tmp_path / folder / "study.json").exists()

    run.precisions = set()
    return run


def shape(found):
    """The form of a result, without its numbers and names of models and curves' lengths."""
    if isinstance(found, dict):
        return {name: shape(of) for name, of in found.items()}
    return type(found).__name__


def test_a_study_of_more_images_goes_on_from_one_of_fewer_and_measures_none_twice(run):
    run()
    result = run(eval__images=5)
    order = np.random.RandomState(0).permutation(6)[:5].tolist()
    assert [part[0] for part in run.measured] == [order[2], order[4]]
    assert run("once", eval__images=5) == result
    assert [part[:n] for part, n in zip(run.measured, (2, 2, 1), strict=True)] == [
        order[:2], order[2:4], order[4:]
    ]  # fmt: skip
    assert json.loads(run()) | {"images": 5} != json.loads(result)  # and the longer one is kept:
    assert run(eval__images=5) == result and run.measured == []
    assert run.precisions == {"highest"}


def test_the_result_has_the_form_of_the_one_in_the_package(run):
    ours, packaged = (json.loads(text) for text in (run(), plots.STUDY.read_text()))
    assert shape(ours) == shape(packaged | {"plain": dict.fromkeys(KINDS, True)})
    assert len(ours["recovery"]["20"]["wrong"]) == 65
    assert (ours["images"], ours["samples"], ours["steps"]) == (2, 2, 12)


def test_a_stopped_study_is_kept_for_its_settings_and_an_earlier_result_is_set_aside(
    run, tmp_path, capsys
):
    settings = [
        {},
        {"eval__samples": 3},
        {"seed": 1},
        {"eval__precision": "default"},
        {"plain": True},
        {"more": 1},
    ]
    for changed in settings:
        run(stops=143, **changed)
        assert len(run.measured) == 1 and "begun" not in capsys.readouterr().out
    assert len(list((tmp_path / "on").glob("study.partial.*.npz"))) == len(settings)
    result = run()
    assert run.measured == [] and "were begun or done before" in capsys.readouterr().out
    assert run("once") == result
    run(eval__samples=3)
    assert (tmp_path / "on" / "study.previous.json").read_bytes() == result


def test_diverged_cells_are_null_in_the_result(run, monkeypatch):
    nan = lambda model, params, x, indices, seed: jnp.full((len(x), 501, 2), jnp.nan)  # noqa: E731
    monkeypatch.setattr(study, "stability_curves", nan)
    assert json.loads(run())["stability"]["wrong"][500] == [None, None]


def test_what_a_study_cannot_do_is_one_line(run, monkeypatch):
    with pytest.raises(VncaError, match="config.eval.images=7: .* 6"):
        run(eval__images=7)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(VncaError, match="--mode=study runs in one process only"):
        run()


FAKES = """
import sys
sys.path[:0] = ["tests", "tests/report"]
import test_study
from vnca.report import study
study.trained_models = lambda run: test_study.models()
"""


@pytest.mark.slow
def test_a_signal_ends_the_command_and_the_same_command_goes_on(tmp_path):
    arguments = ["--mode=study", f"--workdir={tmp_path}"]
    fields = {"eval__images": 6, "eval__samples": 2}
    with tiny.Command(*arguments, before=FAKES, name="baseline", **fields) as command:
        command.wait_for("healing 0")
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 130
    with tiny.Command(*arguments, before=FAKES, name="baseline", **fields) as command:
        assert command.end() == 0 and "were begun or done before" in command.printed()


def test_the_study_in_the_package_is_of_the_packaged_models_and_of_a_thousand_images():
    found = {}
    for kind in KINDS:
        packaged = runs.packaged(kind)
        found[kind] = TrainedModel(*packaged[:3], BUNDLED, packaged.curve, "")
    result = plots.find_study(found, tiny.ROOT, KINDS)
    assert result["images"] == 1000 and result["iwelbo"]["doubling"]["samples"][-1] == 128
    assert result["names"]["nondoubling"] == "HealingVNCA, bundled"
