"""The training loop: what a run computes, what it refuses, and what it leaves behind."""

import functools
import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from vnca.images import unpack
from vnca.losses import iwelbo
from vnca.noise import normal, stream
from vnca.program import VncaError, data, pictures, runs, train
from vnca.program.clock import Clock
from vnca.program.method import make_method, param_shapes
from vnca.program.metrics import name
from vnca.program.order import fixed_shuffle

SETTINGS = {"train__updates": 20, "train__checkpoint_every": 10, "eval__every": 10}


def trained(workdir, name="baseline", **fields):
    """Trains the tiny config of a model with SETTINGS. Returns the workdir."""
    with tiny.fast_compilation():
        train.train(runs.open_run(tiny.config(name, **(SETTINGS | fields)), workdir))
    return workdir


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The workdir of a tiny model that was trained for 20 updates, by its name."""
    return functools.cache(lambda name: trained(tmp_path_factory.mktemp(name), name))


def params_of(workdir, update):
    """The parameters in a checkpoint, by their names."""
    arrays = tiny.arrays(workdir, update)
    return {name: array for name, array in arrays.items() if name.startswith("params/")}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, key)


@pytest.mark.parametrize("model", tiny.LOSSES)
def test_a_model_loses_what_is_on_record(run_of, model):
    updates, _ = tiny.metrics(run_of(model))
    losses = [updates[n - 1]["loss"] for n in (1, 10, 20)]
    assert losses == pytest.approx(tiny.LOSSES[model], rel=1e-5)


@pytest.mark.parametrize("name", ["baseline", "nondoubling"])  # without a pool, with one
def test_how_many_updates_a_call_makes_changes_no_bit(run_of, tmp_path, monkeypatch, name):
    counts = iter([1, 4, 2, 7, 3, 1, 1, 1, 0])
    monkeypatch.setattr(Clock, "count", lambda clock, done: next(counts))
    fields = dict.fromkeys(["train__updates_per_call", "train__checkpoint_every", "eval__every"])
    trained(tmp_path, name, **fields)
    assert [*counts] == []
    threes, other = tiny.arrays(run_of(name), 20), tiny.arrays(tmp_path, 20)
    del threes["config"], other["config"], threes["sha256"], other["sha256"]
    assert_same(other, threes)
    assert tiny.metrics(tmp_path)[0] == tiny.metrics(run_of(name))[0]


def test_the_clock_fills_three_seconds_and_saves_and_tests_when_it_is_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vnca.program.clock.time.monotonic", lambda: now[0])
    fields = dict.fromkeys(["train__updates_per_call", "train__checkpoint_every", "eval__every"])
    clock = Clock(tiny.config(train__updates=10_000, train__batch_size=16, **fields), 100)
    assert clock.count(100) == 1  # a first line soon
    for count, seconds, following in (
        (1, 0.01, 4),  # at most four times as many
        (4, 0.1, 16),
        (64, 0.64, 125),  # the reproduction's number at most
        (10, 3, 10),
        (10, 15, 2),
        (1, 40, 1),  # an update that takes longer is a call of its own
    ):
        clock.ran(count, seconds)
        assert clock.count(101) == following
    assert clock.count(10_000 - 1) == 1
    now[0] = 59
    assert not clock.is_due("test", 9000) and not clock.is_due("save", 9000)
    now[0] = 61
    assert not clock.is_due("test", 299)  # 3,184 images
    assert clock.is_due("test", 300) and not clock.is_due("test", 301)
    now[0] = 601
    assert clock.is_due("save", 302) and not clock.is_due("save", 303)
    assert clock.is_due("save", 10_000) and clock.is_due("test", 10_000)  # at the end


def test_fixed_numbers_of_updates_are_kept_to(tmp_path):
    trained(tmp_path, train__updates=11, train__checkpoint_every=5, eval__every=4)
    assert tiny.checkpoints(tmp_path) == [5, 10, 11]
    assert [test["update"] for test in tiny.metrics(tmp_path)[1]] == [4, 8, 11]


def test_the_quick_test_is_the_iwelbo_of_test_images(run_of):
    workdir, config = run_of("baseline"), tiny.config("baseline")
    model = make_method(config, plain=True).model
    params = runs.find(workdir, None).restore("params/", param_shapes(model))

    def bound(images):
        """The mean over 64 images, 4 samples each."""
        numbers = fixed_shuffle(64, len(images))

        def noise(sample):
            return normal(stream(config.seed, "evaluation", sample), numbers, model.latent_size)

        rows = jax.jit(lambda p: iwelbo(model, p, unpack(images[numbers]), noise, 4))(params)
        return float(np.mean(rows[0]))

    images, found = data.load("bundled"), tiny.metrics(workdir)[1][-1]
    assert found["test_iwelbo"] == pytest.approx(bound(images.test), rel=1e-5)
    assert found["test_iwelbo"] != pytest.approx(bound(images.train), rel=1e-4)


@pytest.mark.parametrize("name", ["baseline", "nondoubling"])
def test_its_pictures_show_the_model_as_it_is_now(run_of, name):
    workdir, config = run_of(name), tiny.config(name)
    model = make_method(config).model
    found = runs.find(workdir, name)
    params, test = found.restore("params/", param_shapes(model)), data.load("bundled").test
    images = unpack(test[fixed_shuffle(16, len(test))])
    with tiny.fast_compilation():
        drawn = pictures.training_pictures(model, params, images, config.seed)
    assert {"samples", "reconstructions"} < drawn.keys() or name == "baseline"
    for picture, content in drawn.items():
        assert Path(workdir, f"{picture}.png").read_bytes() == content


def test_a_loss_or_an_array_that_is_not_finite_ends_the_run_before_it_is_saved(
    tmp_path, monkeypatch
):
    make, kind = train.make_update_call, None

    def spoil(*given):
        call = make(*given)

        def spoiled(state, images, order, count):
            state, values = call(state, images, order, count)
            if kind == "loss":
                values = np.asarray(values) + np.where(np.arange(3) == 1, np.inf, 0)[:, None]
            if kind == "moments" and state.update == 9:
                moments = jax.tree.map(lambda x: x + np.float32(np.nan), state.moments)
                state = state._replace(moments=moments)
            return state, values

        return spoiled

    monkeypatch.setattr(train, "make_update_call", spoil)
    for kind, update, words in ("loss", 2, "'loss': inf"), ("moments", 9, "moments/"):
        with pytest.raises(
            VncaError, match=f"^update {update} is not finite .*{words}.* --workdir"
        ):
            trained(tmp_path / kind, train__checkpoint_every=9)
        assert not tiny.checkpoints(tmp_path / kind)


def test_a_run_says_what_it_is_and_where_its_rate_ends(run_of, tmp_path, capsys):
    trained(tmp_path, train__updates=2, train__decay_updates=1)
    said = capsys.readouterr().out
    for line in (
        "devices  8 × cpu (",
        "data     bundled: 60,000 training, 10,000 test images",
        "model    baseline: 9,437 parameters, latent 4",
        "update   8 images, ",
        "warning: from update 1 on the learning rate is 0: set config.train.decay_updates=2",
        "compiled in ",
        "update 2/2  loss ",
        "update 2  quick test IWELBO -",
        f"done; checkpoints, metrics.jsonl and pictures are in {tmp_path}",
    ):
        assert f"\n{line}" in f"\n{said}", line
    trained(tmp_path, train__updates=3)
    said = capsys.readouterr().out
    resumed = f"resuming {tmp_path / 'checkpoint_00000002.npz'} at update 2; config.train.updates "
    assert f"{resumed}is 3, was 2; config.train.decay_updates is None, was 1" in said


# ---- Parameters of another run -------------------------------------------------------------------


def test_a_run_starts_from_parameters_wherever_they_are(run_of, tmp_path, monkeypatch):
    source = run_of("baseline")
    packed = runs.pack(source, tmp_path / "packed.npz")
    monkeypatch.setenv("HOME", str(source.parent))
    monkeypatch.setattr(runs, "packaged_path", {"baseline": packed}.get)
    saved = params_of(source, 20)
    halves = {key: array.astype(np.float16) for key, array in saved.items()}
    file = source / "checkpoint_00000010.npz"
    places = {f"~/{source.name}": saved, file: params_of(source, 10)}
    for place, expected in (places | {packed: halves, "packaged": halves}).items():
        config = tiny.config("baseline", train__start_from=str(place))
        given = runs.given_params(config, make_method(config).model)
        leaves = jax.tree.leaves_with_path(given)
        assert_same({f"params/{name(path)}": array for path, array in leaves}, expected)
    fields = {"train__start_from": str(source), "train__learning_rate": 1e-30}
    assert_same(params_of(trained(tmp_path / "run", train__updates=1, **fields), 1), saved)


def test_a_healing_run_takes_the_encoder_of_a_baseline(run_of, tmp_path):
    trained(tmp_path, "healing", train__updates=1, train__encoder_from=str(run_of("baseline")))
    kept, found = params_of(run_of("baseline"), 20), params_of(tmp_path, 1)
    encoder = [key for key in found if "/encoder/" in key]
    assert_same({key: found[key] for key in encoder}, {key: kept[key] for key in encoder})


@pytest.mark.parametrize("field", ["start_from", "encoder_from"])
def test_parameters_that_are_not_there_or_do_not_fit_are_refused(run_of, tmp_path, field):
    other = {"model__encoder_width": 2, "model__latent_size": 3}
    for where, words in (
        (tmp_path, f"train.{field}=.*: there"),
        (run_of("healing"), "not of this m"),
    ):
        with pytest.raises(VncaError, match=words):
            trained(tmp_path / "run", "healing", **{f"train__{field}": str(where)}, **other)


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_thousand_calls_take_no_memory(tmp_path):
    fields = {"train__updates": 2400, "train__checkpoint_every": 200, "eval__every": 200}
    command = tiny.Command(
        f"--workdir={tmp_path}", name="nondoubling", **fields, train__updates_per_call=1
    )
    sizes = []
    with command as running:
        for update in 400, 2200:
            while not any(found >= update for found in tiny.checkpoints(tmp_path)):
                assert running.process.poll() is None, running.complained()
                time.sleep(0.1)
            pages = Path(f"/proc/{running.process.pid}/statm").read_text().split()[1]
            sizes.append(int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    assert sizes[1] < sizes[0] + 50, sizes
