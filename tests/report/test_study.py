"""The study: its numbers, each against another way to get it, and its progress."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from vnca.likelihoods import as_floats, binomial
from vnca.model import Model
from vnca.program import data, evaluate, runs, stop
from vnca.program.pictures import prior_samples
from vnca.program.trees import sha256
from vnca.report import study
from vnca.report.trained import TrainedModel

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BUNDLED = data.load("bundled")
PACKAGED = "doubling", "healing", "baseline"
NUMBERS = np.array([4, 0, 7, 5])
X = as_floats(tiny.DIGITS, BUNDLED.test[NUMBERS])


@functools.cache  # so that what a model does is compiled once
def automaton(heals_after, born=True, healed=1, likelihood=tiny.DIGITS):
    """A model of pictures that are lit, or dark for z < 0. A cell that is lost, or not born, has
    the logit `healed` after so many steps. The last channel counts the steps, and all others are
    logits, one of each colour."""
    size, colours = likelihood.size, likelihood.colours

    def initial_cells(z):
        logits, age = z[:, :1].repeat(colours, axis=1), 1000 + 0 * z[:, :1]
        cells = born * jnp.concatenate([logits, age], axis=-1)
        return cells[:, None, None] + jnp.zeros((size, size, colours + 1))

    def step(params, s):
        logits, age = s[..., :-1], s[..., -1:] + 1
        heals = (logits == 0) & (age >= heals_after)
        return jnp.concatenate([jnp.where(heals, healed, logits), age], axis=-1)

    def encode(params, x):
        return jnp.ones((len(x), 2)), jnp.zeros((len(x), 2))

    def decode(params, z):
        return initial_cells(z)[..., :-1]

    return Model(
        2, likelihood, None, encode, decode, steps=12, initial_cells=initial_cells, step=step
    )


# ---- What is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "colours", "levels"), [(32, 1, 1), (16, 3, 15)])
def test_recovery_begins_with_a_square_of_zeros_of_each_size(size, colours, levels):
    model = automaton(9, likelihood=binomial(size, colours, levels))
    # The nearest to what is shown, σ(1): all heads of one toss, and 11 heads of 15.
    heads = {1: 1, 15: 11}[levels]
    x = jnp.full((4, size, size, colours), heads / levels)
    found = study.recovery_curves(model, {}, x, NUMBERS, 0)
    wrong = np.square(size // 8 * np.arange(6))[:, None] * (np.arange(65) < 9)
    right = heads - levels * np.log1p(np.e)  # of the logit 1; without the ways to order the tosses
    ways = np.log(math.comb(levels, heads))
    log_px = wrong * levels * np.log(0.5) + (size**2 - wrong) * right + size**2 * ways
    log_px *= colours
    np.testing.assert_allclose(found, [np.stack([wrong, log_px], axis=-1)] * 4, rtol=1e-5)


@pytest.mark.parametrize("healed", [1, np.nan])
def test_stability_is_of_500_steps_from_the_initial_cells_and_nan_is_no_right_pixel(healed):
    model = automaton(9, born=False, healed=healed)
    wrong = study.stability_curves(model, {}, X, NUMBERS, 0)[..., 0]
    lit = np.sum(X, axis=(1, 2))
    then = 1024 - lit if healed == 1 else 1024
    np.testing.assert_array_equal(wrong, np.where(np.arange(501) < 9, lit, then))


@pytest.mark.parametrize("heals_after", [1, 38, 39, 68, 69])
def test_healing_counts_what_each_of_two_losses_and_each_regrowth_changes(heals_after):
    numbers = np.arange(8)
    found = np.asarray(study.healing_changes(automaton(heals_after), {}, None, numbers, 3))
    lit = np.asarray(prior_samples(3, 8, 2))[:, 0] > 0
    first, healed, second, end = found[lit].T
    hurt = heals_after > 38  # when the second loss comes, at another place for each
    assert {*first} == {256} and {*healed} == {256 * hurt}
    assert (min(second) > 256) == (np.ptp(second) > 0) == hurt
    assert np.all((end > 0) == (heals_after > 68))


def test_a_reconstruction_is_compared_with_its_own_image_and_with_all_others():
    likelihood = binomial(16, 3, 15)
    random = np.random.RandomState(0)
    test = random.randint(16, size=(40, likelihood.stored_bytes), dtype=np.uint8)
    x = np.asarray(as_floats(likelihood, test))
    pictures = np.clip(x, 0.01, 0.99)  # reconstructions: nearly the images
    pictures[3], pictures[4, :2] = pictures[8], 0.5  # the first of these is that of another
    logits = jnp.asarray(np.log(pictures / (1 - pictures)))

    def encode(params, x):
        return params, params

    model = automaton(9, likelihood=likelihood)
    model = model._replace(encode=encode, decode=lambda params, z: logits[z[:, 0].astype(int)])
    numbers = np.array([3, 4, 5])
    z = numbers[:, None].astype(np.float32)
    found = study.reconstruction_scores(test, model, z, x[numbers], numbers, 0)
    changed = [np.any(abs(pictures[n] - x[n]) > 32 / 255, axis=-1).sum() for n in numbers]
    squares = [np.mean((pictures[n] - x[n]) ** 2) for n in numbers]
    np.testing.assert_array_equal(found[:, 0], changed)
    np.testing.assert_allclose(found[:, 1], squares, rtol=1e-4)
    np.testing.assert_array_equal(found[:, 2], [0, 1, 1])
    said = study.summarize_reconstructions(np.asarray(found))
    assert said["changed"] == pytest.approx(np.percentile(changed, [50, 90]))
    assert said["psnr"] == pytest.approx(-10 * np.log10(np.mean(squares)), abs=1e-3)
    assert said["nearest"] == pytest.approx(2 / 3)


def test_of_two_equal_images_neither_is_the_nearest():
    likelihood = binomial(16, 1, 15)
    test = np.full((2, likelihood.stored_bytes), 15, np.uint8)
    model = automaton(9, likelihood=likelihood)
    x = as_floats(likelihood, test)
    found = study.reconstruction_scores(test, model, {}, x, np.arange(2), 0)
    np.testing.assert_array_equal(found[:, 2], 0)


def test_all_samples_together_give_the_iwelbo_of_evaluation():
    _, model, params, _ = tiny.in_place_of_packaged("healing")
    weights = np.asarray(study.log_weights(8, model, params, X, NUMBERS, 5))
    found = study.summarize_bounds(tiny.DIGITS, weights, None)
    (rows,) = evaluate.image_bounds(model, params, BUNDLED.test, NUMBERS, 8, 1, 5)
    np.testing.assert_allclose(found["iwelbo"][-1], rows[:, 0].mean(), rtol=1e-5)
    assert found["digits"] is None


# ---- What is said of it --------------------------------------------------------------------------


def test_the_bound_is_of_groups_of_samples_and_of_each_class():
    labels = np.array([4, 4, 2, 4, 2, 4, 0, 6])  # of a test set with more images
    weights = np.random.RandomState(1).normal(size=(6, 6))
    found = study.summarize_bounds(tiny.DIGITS, weights, labels)
    colours = study.summarize_bounds(binomial(16, 3, 16), weights, labels)
    bits = colours.pop("bits_per_dimension")
    assert bits == pytest.approx(-found["iwelbo"][-1] / 768 / np.log(2), abs=1e-6)
    assert colours == found
    assert found["samples"] == [1, 2, 4, 6]
    for n, bound in zip(found["samples"], found["iwelbo"], strict=True):
        groups = np.exp(weights)[:, : 6 // n * n].reshape(6, -1, n)
        each = np.log(groups.mean(axis=2)).mean(axis=1)
        assert bound == pytest.approx(each.mean(), abs=1e-5)
    of_images = labels[np.random.RandomState(0).permutation(8)[:6]]
    rows = [each, *(each[of_images == n] for n in range(7))]
    pairs = [[bound, found["stderr"]], *found["digits"]]
    for pair, of in zip(pairs, rows, strict=True):
        wanted = [of.mean(), evaluate.standard_error(of)] if len(of) > 1 else [None, None]
        assert pair == pytest.approx(wanted, abs=1e-3)


def test_curves_and_changes_are_summarized_over_images():
    scores = np.random.RandomState(0).normal(size=(6, 6, 3, 2)) * [1, 50]
    found = study.summarize_recovery(scores, grid=32)["12"]
    for i, term in enumerate(("wrong", "log_px")):
        curves = scores[:, 3, :, i]
        wanted = np.transpose([curves.mean(axis=0), curves.std(axis=0)])
        np.testing.assert_allclose(found[term], wanted, atol=6e-4)
    changes = study.summarize_changes(np.arange(11)[:, None] * [2, 1, 3, 4])
    assert changes == {"median": [10, 5, 15, 20], "p90": [18, 9, 27, 36], "most": [20, 10, 30, 40]}


# ---- Its progress --------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A study of models of these names that compile soon, of which those of the published names do
    not take single steps, with fewer test images than there are prior samples. Returns its result,
    and the indices of which it has measured recovery, after which it can be asked to stop."""
    true = study.recovery_curves
    few = BUNDLED._replace(test=BUNDLED.test[:6], test_labels=np.arange(6))
    still_hurt = automaton(39)  # at the second loss, so that what both change depends on the seed
    config = ConfigDict({"eval": {"chunk": 2}, "model": {"name": "healing"}})
    monkeypatch.setattr(study, "PRIOR_SAMPLES", 7)

    def run(images=2, folder="on", stops=0, plain=False, w=0, names=PACKAGED, **fields):
        measured, workdir = [], tmp_path / folder
        ours = tiny.config(**{"eval__images": images, "eval__samples": 2, **fields})
        published = still_hurt._replace(step=None)
        models = {
            name: TrainedModel(
                config, published if name in ("doubling", "baseline") else still_hurt, [w], few,
                None, "",
            )
            for name in names
        }  # fmt: skip

        def measure(*args):
            measured.append(args[3].tolist())
            np.testing.assert_array_equal(args[2], as_floats(tiny.DIGITS, few.test[args[3]]))
            assert jax.config.jax_default_matmul_precision == ours.eval.precision
            stop.ask(stops)
            return true(*args)

        monkeypatch.setattr(study, "is_plain", lambda *_: plain)
        monkeypatch.setattr(study, "trained_models", lambda _: models)
        monkeypatch.setattr(study, "recovery_curves", measure)
        workdir.mkdir(exist_ok=True)
        study.study(runs.Run(ours, workdir, plain, None))
        return (workdir / "study.json").read_bytes(), measured

    return run


@pytest.mark.slow  # four studies, for 5 seconds
def test_a_study_of_more_images_goes_on_from_one_of_fewer_and_measures_none_twice(run):
    fewer, _ = run(3)
    result, measured = run(5)
    order = np.random.RandomState(0).permutation(6)[:5].tolist()
    assert measured == [order[3:]]
    once, measured = run(5, "once")
    assert once == result and measured == [order[:2], order[2:4], order[4:] * 2]
    assert run(3) == (fewer, []) and run(5) == (result, [])


def test_healing_is_measured_with_five_seeds_whose_samples_differ(run):
    healing = json.loads(run()[0])["healing"]["healing"]
    assert [*healing] == [*"01234"] and len({str(summary) for summary in healing.values()}) == 5


def test_recovery_healing_and_stability_are_of_each_model_that_takes_single_steps(run):
    found = json.loads(run(names=("mine", *PACKAGED))[0])
    for section in "recovery", "healing", "stability", "steps":
        assert [*found[section]] == ["mine", "healing"], section
    assert [*found["iwelbo"]] == [*found["plain"]] == ["mine", *PACKAGED]
    assert found["steps"] == {"mine": 12, "healing": 12}


@pytest.mark.slow  # five studies, for 3 seconds
def test_a_stopped_study_is_kept_for_its_settings_and_an_earlier_result_is_set_aside(run, tmp_path):
    settings = [{}, {"eval__samples": 3}, {"seed": 1}, {"eval__precision": "default"}]
    settings += [{"plain": True}, {"w": 1}]
    for changed in settings:
        with pytest.raises(stop.Stopped) as stopped:
            run(stops=143, **changed)
        assert stopped.value.status == 143
    assert not [*tmp_path.glob("on/study.json")]
    assert len([*tmp_path.glob("on/study.partial.*.npz")]) == len(settings)
    result, measured = run()
    assert not measured and run(folder="once")[0] == result
    run(eval__samples=3)
    assert (tmp_path / "on" / "study.previous.json").read_bytes() == result


def test_what_a_study_cannot_do_is_one_line(run, monkeypatch):
    assert "config.eval.images=7" in tiny.fault_of(run, 7)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "--mode=study runs in one process only" in tiny.fault_of(run)


def test_the_study_in_the_package_is_of_the_packaged_models_and_has_the_form_of_a_new_one(run):
    packaged = json.loads((tiny.ROOT / "vnca/report/study.json").read_text())
    ours, theirs = (
        jax.tree.structure(result, is_leaf=lambda x: isinstance(x, list))
        for result in (json.loads(run()[0]), packaged | {"plain": dict.fromkeys(PACKAGED, True)})
    )
    assert ours == theirs
    assert [*packaged["models"]] == [*PACKAGED]
    for name in PACKAGED:
        params = runs.packaged(name).params
        assert packaged["models"][name] == [sha256(params), BUNDLED.identity]
