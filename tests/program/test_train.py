"""The training loop: what a run leaves behind, and what interruptions and mistakes do to it."""

import hashlib
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tiny

import vnca.program.train
from vnca.images import unpack
from vnca.losses import iwelbo
from vnca.noise import normal, stream
from vnca.program import VncaError, checkpoint, config, data
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_method
from vnca.program.nans import first_not_finite
from vnca.program.order import batches, fixed_shuffle
from vnca.program.workdir import lock
from vnca.report.figures import training_pictures
from vnca.training import init_state

SETTINGS = {"train__updates": 20, "train__checkpoint_every": 4, "eval__every": 10}


def train(workdir, name="baseline", draw=lambda *_: {}, **fields):
    """Trains with the tiny config and SETTINGS; returns what it says."""
    lines = []
    with tiny.fast_compilation():
        vnca.program.train.train(
            tiny.config(name, **(SETTINGS | fields)), workdir, lines.append, draw
        )
    return "\n".join(lines)


class Calls(logging.Handler):
    """What the loop hands to each device call, and how many programs it compiles for it."""

    def __init__(self, make):
        super().__init__()
        self.make, self.images, self.host_bytes, self.compiled = make, [], [], []
        self.counts = []

    def emit(self, record):
        self.compiled[-1] += "XLA compilation" in record.getMessage()

    def __call__(self, *args):
        update_call = self.update_call = self.make(*args)

        def call(*given):
            self.images.append(given[1])
            host = [x for x in jax.tree.leaves(given) if not isinstance(x, jax.Array)]
            self.host_bytes.append(sum(x.nbytes for x in host))
            self.compiled.append(0)
            self.counts.append(int(given[-1]))
            logging.getLogger("jax").addHandler(self)
            try:
                with jax.log_compiles():
                    return update_call(*given)
            finally:
                logging.getLogger("jax").removeHandler(self)

        return call


UPDATES = 300


def command(workdir):
    """Goes on with a run on one device to update UPDATES, with no checkpoint on the way."""
    fields = dict.fromkeys(["train__updates", "train__checkpoint_every", "eval__every"], UPDATES)
    return tiny.Command(
        f"--workdir={workdir}", name="baseline", devices=1, before=tiny.NO_PICTURES, **fields
    )


def train_in_two_ways(folder, name):
    """20 updates at a stretch; 10; and 10, a kill, and 10 more. Returns the calls of the first."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.without_network(patch)
        calls = Calls(vnca.program.train.make_update_call)
        patch.setattr(vnca.program.train, "make_update_call", calls)
        train(folder / "straight", name)
        # The same program, which would come from the cache, but be traced again.
        patch.setattr(vnca.program.train, "make_update_call", lambda *_: calls.update_call)
        train(folder / "half", name, train__updates=10)
        shutil.copytree(folder / "half", folder / "resumed")
        with open(folder / "resumed" / "metrics.jsonl", "ab") as file:
            # It went on to update 12, and was killed there while it wrote.
            file.write(b'{"update": 11, "loss": 1.5}\n{"update": 12, "test_iwelbo": -1.0}\n{"upda')
        train(folder / "resumed", name)
    return calls


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The two ways, for a model without a pool and one with; and one that goes on on one device,
    by the command line, meanwhile."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("baseline", "nondoubling")}
    calls = {}
    calls["baseline"] = train_in_two_ways(folders["baseline"], "baseline")
    workdir = shutil.copytree(folders["baseline"] / "half", folders["baseline"] / "one device")
    with command(workdir) as running:
        calls["nondoubling"] = train_in_two_ways(folders["nondoubling"], "nondoubling")
        yield Runs(folders, calls, running)


class Runs(NamedTuple):
    folders: dict  # of the models: straight, half, resumed
    calls: dict  # of the models: those of straight
    on_one_device: tiny.Command

    def uninterrupted(self):
        """The workdir of the run on one device, when it has ended."""
        assert self.on_one_device.end() == 0, self.on_one_device.complained()
        assert not self.on_one_device.complained()
        return self.folders["baseline"] / "one device"


@pytest.fixture
def finished(runs, tmp_path):
    """A copy of a run of 20 updates."""
    return shutil.copytree(runs.folders["baseline"] / "straight", tmp_path / "finished")


def contents(workdir):
    """Each file's name and the hash of its bytes."""
    files = Path(workdir).iterdir()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


every_kind = pytest.mark.parametrize("name", ["baseline", "nondoubling"])  # without a pool, with


# ---- Resuming --------------------------------------------------------------------------------


@every_kind
def test_ten_and_ten_more_updates_are_twenty_to_the_bit(runs, name):
    folder, last = runs.folders[name], "checkpoint_00000020.npz"
    one, other = (contents(folder / run)[last] for run in ("straight", "resumed"))
    assert one == other
    after, before = tiny.arrays(folder / "straight", 20), tiny.arrays(folder / "half", 10)
    changed = {array for array in after if not np.array_equal(after[array], before[array])}
    assert {"update", *(array for array in after if array.startswith("params/"))} <= changed


@every_kind
def test_the_same_updates_lose_what_they_lose_with_the_newest_jax(runs, name):
    losses = [record["loss"] for record in tiny.metrics(runs.folders[name] / "straight")[0]]
    assert [losses[n - 1] for n in (1, 10, 20)] == pytest.approx(tiny.LOSSES[name], rel=1e-5)


@every_kind
def test_metrics_hold_every_update_once_even_after_a_kill(runs, name):
    folder = runs.folders[name]
    updates, tests = tiny.metrics(folder / "resumed")
    assert [record["update"] for record in updates] == list(range(1, 21))
    assert all({"loss", "reconstruction", "kl"} <= record.keys() for record in updates)
    assert updates == tiny.metrics(folder / "straight")[0]
    assert all(record.keys() == {"update", "test_iwelbo"} for record in tests)
    assert [record["update"] for record in tests] == [10, 12, 20]


def test_a_run_whose_config_is_from_an_older_version_goes_on_to_the_bit(runs, tmp_path):
    folder = runs.folders["nondoubling"]
    workdir = shutil.copytree(folder / "half", tmp_path / "run")
    arrays = tiny.arrays(workdir, 10)
    saved = json.loads(str(arrays["config"]))
    del saved["eval"]["split"]
    saved["model"] |= {"channels": None, "hidden": None, "position_waves": 0}
    saved["train"] |= {"pool_from": 1, "pool_fresh": None, "encoder_from": None}
    state = {name: arrays[name] for name in arrays if name not in ("config", "format", "sha256")}
    checkpoint.write_state(workdir / "checkpoint_00000010.npz", state, saved)
    train(workdir, "nondoubling")
    after, straight = contents(workdir), contents(folder / "straight")
    assert after["checkpoint_00000020.npz"] == straight["checkpoint_00000020.npz"]


@pytest.fixture
def given(monkeypatch):
    """What a run gives to `init_state`, where it then ends."""
    given = []

    def begin(model, config, images, trained):
        given.append(trained)
        raise VncaError("that will do")

    monkeypatch.setattr(vnca.program.train, "init_state", begin)
    return given


def named(tree, prefix):
    """The arrays of a pytree by their names in a checkpoint."""
    return {
        prefix + jax.tree_util.keystr(path, simple=True, separator="/"): array
        for path, array in jax.tree.leaves_with_path(tree)
    }


def are_arrays_of(arrays, folder):
    saved = tiny.arrays(folder, 20)
    assert len(arrays) > 10
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], saved[name])


def test_a_run_takes_the_encoder_of_the_run_that_it_names(runs, tmp_path, monkeypatch, given):
    folder = runs.folders["baseline"] / "straight"
    monkeypatch.setenv("HOME", str(folder.parent))
    for where in (str(folder), "~/straight", None):
        with pytest.raises(VncaError, match="that will do"):
            train(tmp_path / "run", "healing", train__encoder_from=where)
    assert given[2] == {} and list(given[0]) == ["encoder"]
    [newest] = folder.glob("checkpoint_*20.npz")
    with pytest.raises(VncaError, match="that will do"):
        train(tmp_path / "run", "healing", train__encoder_from=str(newest))
    for other in given[1], given[3]:
        jax.tree.map(np.testing.assert_array_equal, given[0], other)
    are_arrays_of(named(given[0], "params/"), folder)
    assert len(jax.tree.leaves(given[0])) == 12


def test_a_run_starts_from_the_parameters_of_the_run_that_it_names(runs, tmp_path):
    folder, run = runs.folders["baseline"] / "straight", tmp_path / "run"
    fields = {"train__start_from": str(folder), "train__learning_rate": 1e-30}
    said = train(run, **fields, train__updates=1)
    assert f"start    from the parameters of {folder}" in said
    arrays = tiny.arrays(run, 1)
    assert arrays["update"] == 1
    params = {name: array for name, array in arrays.items() if name.startswith("params/")}
    are_arrays_of(params, folder)
    assert "resuming" in train(run, **fields, train__updates=2)
    with pytest.raises(VncaError, match="config.train.start_from is None, was "):
        train(run, train__learning_rate=1e-30, train__updates=3)


def test_a_damaged_checkpoint_of_the_run_that_it_names_costs_a_line(runs, tmp_path):
    folder = shutil.copytree(runs.folders["baseline"] / "straight", tmp_path / "named")
    newest = max(folder.glob("checkpoint_*.npz"))
    newest.write_bytes(newest.read_bytes()[:1000])
    said = train(tmp_path / "run", train__start_from=str(folder), train__updates=1)
    assert f"{newest} is damaged" in said


def test_a_run_starts_from_the_packaged_model(runs, tmp_path, given):
    made, lines = tiny.in_place_of_packaged("healing"), []
    folder = runs.folders["baseline"] / "straight"
    fields = {"train__start_from": "packaged", "train__encoder_from": str(folder)}

    def start(**more):
        vnca.program.train.train(
            tiny.config("healing", **SETTINGS, **fields, **more),
            tmp_path / "run",
            lines.append,
            None,
            packaged=lambda kind: {"nondoubling": (made.config, made.params, "its file")}[kind],
        )

    with pytest.raises(VncaError, match="from=packaged: its parameters have other shapes"):
        start(model__hidden=9)
    assert not given
    with pytest.raises(VncaError, match="that will do"):
        start()
    assert "start    from the parameters of the packaged nondoubling model" in lines
    assert f"start    from the encoder of {folder}" in lines
    # If another run is named for the encoder, the encoder is that run's.
    jax.tree.map(np.testing.assert_array_equal, given[0]["decoder"], made.params["decoder"])
    are_arrays_of(named(given[0]["encoder"], "params/encoder/"), folder)
    for begun in "packaged", None:
        fields |= {"train__start_from": begun, "train__encoder_from": "packaged"}
        with pytest.raises(VncaError, match="that will do"):
            start()
    jax.tree.map(np.testing.assert_array_equal, given[1], made.params)
    jax.tree.map(np.testing.assert_array_equal, given[2], {"encoder": made.params["encoder"]})
    with pytest.raises(VncaError, match="encoder_from=packaged: its parameters have other shapes"):
        start(model__encoder_width=9)


@pytest.mark.parametrize(
    ("name", "field", "folder", "fields", "words"),
    [
        ("healing", "encoder", "nowhere", {}, "config.train.encoder_from={}: there is no"),
        ("healing", "encoder", "straight", {"model__latent_size": 5}, "{}.* is float32 .* it is"),
        ("baseline", "start", "nowhere", {}, "config.train.start_from={}: there is no checkpoint"),
        ("baseline", "start", "straight", {"model__latent_size": 5}, "{}.* is float32 .* it is"),
    ],
)
def test_parameters_that_are_not_there_or_do_not_fit_are_refused(
    runs, tmp_path, name, field, folder, fields, words
):
    where = str(runs.folders["baseline"] / folder)
    with pytest.raises(VncaError, match=words.format(where)):
        train(tmp_path / "run", name, **{f"train__{field}_from": where}, **fields)


def test_a_finished_run_that_was_killed_before_it_pruned_is_pruned(finished):
    [last] = finished.glob("checkpoint_*20.npz")
    for update in range(14, 20):
        shutil.copy(last, finished / f"checkpoint_{update:08d}.npz")
    train(finished)
    assert tiny.checkpoints(finished) == [18, 19, 20]


def test_a_finished_run_has_nothing_to_do(finished):
    before = contents(finished)
    said = train(finished)
    assert "at update 20" in said and "nothing to do" in said and ", was " not in said
    assert contents(finished) == before


def test_a_resumed_run_says_what_has_changed_and_where_its_rate_ends(finished):
    resuming = f"resuming {finished / 'checkpoint_00000020.npz'} at update 20; "
    said = train(finished, train__updates=21, train__decay_updates=20)
    changed = "config.train.decay_updates is 20, was None; config.train.updates is 21, was 20"
    assert resuming + changed in said
    assert "warning: from update 20 on the learning rate is 0" in said
    assert "config.train.decay_updates=21, or None" in said
    said = train(finished, train__updates=22, train__decay_updates=22)
    assert "learning rate is 0" not in said


def test_another_config_is_refused_with_the_fields_that_differ(finished):
    before = contents(finished)
    with pytest.raises(VncaError) as caught:
        train(finished, seed=7, model__latent_size=5, eval__every=11)
    message = str(caught.value)
    assert (
        "config.seed is 7, was 0" in message and "config.model.latent_size is 5, was 4" in message
    )
    assert message.count(", was ") == 2 and "\n" not in message
    assert contents(finished) == before


def test_what_was_fitted_to_a_machine_is_kept_on_another(finished, monkeypatch):
    saved = json.loads(str(tiny.arrays(finished, 20)["config"]))
    unset = [f.name for f in config.FIELDS.values() if f.fitted and tiny.config()[f.name] is None]
    assert "train.micro_batch" in unset  # eval.chunk is fitted anew: no result depends on it
    assert not [field for field in unset if config.flatten(saved)[field] is None]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # which would fit 8 and 125
    said = train(finished, train__updates_per_call=None, train__checkpoint_every=None)
    assert "3 per device call" in said and "nothing to do" in said
    assert "checking" not in said  # of the fast form, which nothing would be computed by


def test_auto_is_settled_once_and_for_all(runs, tmp_path, monkeypatch):
    asked = []

    def load(name, *_, **__):
        asked.append(name)
        found = data.load("bundled")
        return found if name == "bundled" else found._replace(name="larochelle")

    monkeypatch.setattr("vnca.program.workdir.load", load)
    said = train(tmp_path, draw=training_pictures, data__name="auto", train__updates=1)
    assert asked[0] == "auto" and "data     larochelle: 60,000 training" in said
    asked.clear()
    train(tmp_path, data__name="auto", train__updates=1)
    assert set(asked) == {"larochelle"}
    with pytest.raises(VncaError, match="config.data.name is 'bundled', was 'larochelle'"):
        train(tmp_path, data__name="bundled", train__updates=1)
    # The run above was as short as can be, and has all that a long one has.
    assert [record["update"] for record in tiny.metrics(tmp_path)[0]] == [1]
    pictures = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert pictures.keys() == {"samples", "reconstructions"}
    assert all(picture.startswith(b"\x89PNG\r\n\x1a\n") for picture in pictures.values())


# ---- Checkpoints -----------------------------------------------------------------------------


def test_intervals_round_up_to_whole_calls_and_the_last_checkpoints_are_kept(runs):
    folder = runs.folders["baseline"]  # 3 updates a call: 4 become 6, and 10 become 12
    assert tiny.checkpoints(folder / "straight") == [12, 18, 20]
    assert [record["update"] for record in tiny.metrics(folder / "straight")[1]] == [12, 20]
    assert tiny.checkpoints(folder / "half") == [6, 10]
    assert tiny.checkpoints(runs.folders["nondoubling"] / "straight") == [18, 20]  # half a GB each


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(finished):
    newest = finished / "checkpoint_00000020.npz"
    newest.write_bytes(newest.read_bytes()[:-1000])
    before = contents(finished)
    said = train(finished, train__updates=18)
    assert f"{newest} is damaged" in said
    assert f"resuming {finished / 'checkpoint_00000018.npz'} at update 18" in said
    assert contents(finished) == before


def test_where_all_checkpoints_are_damaged_nothing_is_begun_or_deleted(finished):
    for path in finished.glob("*.npz"):
        path.write_bytes(b"")
    before = contents(finished)
    with pytest.raises(VncaError, match="no checkpoint in .* can be read"):
        train(finished)
    assert contents(finished) == before


@pytest.fixture
def poisoned(monkeypatch):
    """A function from an array's name to its value after update 6, in every device call."""
    make, poison = vnca.program.train.make_update_call, {}

    def made(*args):
        update_call = make(*args)

        def call(state, images, order, count):
            # As many updates as would pass it are done in two calls, with the poison between.
            done = int(state.update)
            if poison and done == 6:
                path = jax.tree_util.keystr
                state = jax.tree.map_with_path(
                    lambda p, x: poison.get(path(p, simple=True, separator="/"), lambda x: x)(x),
                    state,
                )
            return update_call(state, images, order, count)

        return call

    monkeypatch.setattr(vnca.program.train, "make_update_call", made)
    return poison


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(tmp_path, poisoned):
    poisoned["params/encoder/conv0/bias"] = lambda x: x * np.nan
    with pytest.raises(VncaError, match=r"^update 7 is not finite [^\n]*debug_nans=True[^\n]*$"):
        train(tmp_path, train__checkpoint_every=3)
    assert tiny.checkpoints(tmp_path) == [3, 6]
    assert all(np.isfinite(x).all() for x in tiny.arrays(tmp_path, 6).values() if x.ndim)
    assert [record["update"] for record in tiny.metrics(tmp_path)[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "update, updates, what",
    [(6, 20, "params/encoder/conv0/bias"), (20, 20, "quick test IWELBO nan")],
)
def test_an_update_that_leaves_a_model_that_is_not_finite_is_named(
    tmp_path, monkeypatch, update, updates, what
):
    make = vnca.program.train.make_update_call

    def made(*args):
        update_call = make(*args)

        def call(*given):
            state, values = update_call(*given)
            if int(state.update) == update:
                bias = state.params["encoder"]["conv0"]["bias"]
                state.params["encoder"]["conv0"]["bias"] = bias * np.nan
            return state, values

        return call

    monkeypatch.setattr(vnca.program.train, "make_update_call", made)
    with pytest.raises(VncaError, match=rf"^update {update} is not finite \({what}\)[^\n]*$"):
        train(tmp_path, train__checkpoint_every=6, train__updates=updates)
    assert update not in tiny.checkpoints(tmp_path)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


IN_EXP = r"invalid value \(inf\) encountered in exp, at \S+/vnca/losses\.py:\d+ \(reparametrize\)"


@pytest.mark.parametrize(
    "name, array, value, found",
    [
        ("baseline", "params/encoder/conv0/bias", np.nan, "{} was not finite before the update"),
        ("nondoubling", "pool/cells", np.nan, "{} was not finite before the update"),
        *(
            pytest.param(kind, "params/encoder/linear/bias", 2000, IN_EXP, marks=marks)
            for kind, marks in [
                ("baseline", []),
                ("doubling", pytest.mark.slow),
                ("nondoubling", pytest.mark.slow),
            ]
        ),
    ],
)
def test_debug_nans_names_what_made_the_first_one(tmp_path, poisoned, name, array, value, found):
    poisoned[array] = lambda x: x + np.float32(value)
    found = found.format(array)
    with pytest.raises(VncaError, match=rf"^update 7 is not finite [^\n]*\. {found}[^\n]*$"):
        train(tmp_path, name, train__debug_nans=True)
    assert tiny.checkpoints(tmp_path) == [6]


@pytest.mark.parametrize(
    "platform, capability, lacks",
    [("gpu", "7.5", True), ("gpu", "8.0", False), ("gpu", "12.0", False), ("gpu", "gfx942", False)],
)
def test_a_card_of_before_2020_has_no_bfloat16(platform, capability, lacks):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert vnca.program.train.lacks_bfloat16(device) == lacks
    assert not vnca.program.train.lacks_bfloat16(jax.devices("cpu")[0])


def test_debug_nans_repeats_the_call_up_to_the_faulty_update_and_searches_the_plain_method(
    tmp_path, poisoned, monkeypatch
):
    tried, make, found = [], vnca.program.train.make_update_call, {}

    def made(method, config):  # the second update of the call from 7 has a loss that is not finite
        update_call = make(method, config)

        def call(state, images, order, count):
            state, values = update_call(state, images, order, count)
            tried.append((int(state.update), int(count)))
            row = 8 - int(state.update) + int(count) - 1
            return state, values.at[row, 0].set(np.nan) if tried[-1] == (9, 3) else values

        return call

    def search(method, config, state, images, indices):
        found.update(method=method, state=state, indices=indices)
        return "found it"

    monkeypatch.setattr(vnca.program.train, "make_update_call", made)
    monkeypatch.setattr(vnca.program.train, "first_not_finite", search)
    with pytest.raises(VncaError, match=r"^update 8 is not finite .*found it$"):
        train(tmp_path, train__debug_nans=True, train__updates_per_call=3)
    assert int(found["state"].update) == 7 and tried[-1] == (7, 1)
    settings = tiny.config("baseline")
    assert found["method"] == make_method(settings, plain=True)  # whichever form trains
    batch, count = settings.train.batch_size, len(data.load("bundled").train)
    np.testing.assert_array_equal(found["indices"], batches(settings.seed, 8, 1, batch, count)[0])


def test_an_update_that_is_finite_when_it_is_repeated_is_said_to_be():
    config = fit_to_machine(tiny.config("baseline"))
    method, images = make_method(config, plain=True), data.load("bundled").train
    state = jax.device_get(init_state(method, config, images))
    indices = np.arange(config.train.batch_size)
    said = first_not_finite(method, config, state, images, indices)
    assert said == "The update is finite when the plain method repeats it on one device"


def test_the_quick_bound_is_the_iwelbo_of_64_images_with_4_samples():
    model = make_method(tiny.config("baseline"), plain=True).model
    params, test = model.init(jax.random.key(3)), data.load("bundled").test
    indices = fixed_shuffle(64, len(test))

    def noise_of(s):
        return normal(stream(5, "evaluation", s), indices, model.latent_size)

    bounds, *_ = jax.jit(lambda p, x: iwelbo(model, p, x, noise_of, 4))(
        params, unpack(test[indices])
    )
    found = vnca.program.train.quick_bound(model, params, test, 5)
    assert found == pytest.approx(float(bounds.mean()), rel=1e-5)


def test_pictures_are_of_the_first_images_of_the_shuffle_and_of_the_runs_seed(tmp_path):
    given = []

    def draw(model, params, images, seed):
        given.append((images, seed))
        return {}

    train(tmp_path, draw=draw, train__updates=1, seed=4)
    [(images, seed)] = given
    test = data.load("bundled").test
    np.testing.assert_array_equal(images, unpack(test[fixed_shuffle(16, len(test))]))
    assert seed == 4


def test_a_second_training_in_a_workdir_is_told_who_has_it(finished):
    before = contents(finished)
    with lock(finished, print), pytest.raises(VncaError) as caught:
        train(finished)
    assert f"--workdir={finished} is in use by process {os.getpid()} on " in str(caught.value)
    assert "\n" not in str(caught.value) and contents(finished) == before
    assert "nothing to do" in train(finished)


# ---- Devices ---------------------------------------------------------------------------------


def test_the_loop_hands_over_indices_and_no_images(runs):
    calls = runs.calls["baseline"]
    images = calls.images[0]
    assert all(other is images for other in calls.images)
    assert images.shape == (60_000, 98) and images.dtype == np.uint8
    assert images.is_fully_replicated and images.sharding.device_set == set(jax.devices())
    assert set(calls.host_bytes) == {3 * 8 * 4 + 4}  # three updates of eight indices; a count


def test_the_first_call_is_a_part_and_the_second_ends_where_whole_ones_do(runs):
    assert runs.calls["baseline"].counts == [0, 1, 2, 3, 3, 3, 3, 3, 2]  # 3 a call; 0 compiles


@every_kind
def test_the_update_is_compiled_once(runs, name):
    calls = runs.calls[name]
    assert calls.compiled[0] and len(calls.compiled) > 7
    assert not any(calls.compiled[1:])


# ---- One device, by the command line, with signals -------------------------------------------


def test_a_checkpoint_of_eight_devices_goes_on_alike_on_one(runs):
    on_one, _ = tiny.metrics(runs.uninterrupted())
    on_eight, _ = tiny.metrics(runs.folders["baseline"] / "straight")
    assert on_one[:10] == on_eight[:10]  # from before
    for one, eight in zip(on_one[10:20], on_eight[10:], strict=True):
        assert one == pytest.approx(eight, rel=1e-4)
    assert [record["update"] for record in on_one] == list(range(1, UPDATES + 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["doubling", "nondoubling"])
def test_two_hundred_updates_on_eight_devices_and_on_one_lose_alike(tmp_path, name):
    fields = {"train__updates": 200, "train__checkpoint_every": 200, "eval__every": 200}
    with tiny.Command(f"--workdir={tmp_path}/one", name=name, devices=1, **fields) as run:
        train(tmp_path / "eight", name, **fields)
        assert run.end() == 0, run.complained()
    one, eight = (tiny.metrics(tmp_path / folder)[0] for folder in ("one", "eight"))
    assert len(one) == 200
    for record, other in zip(one, eight, strict=True):
        assert record == pytest.approx(other, rel=1e-4)  # seen: 3e-6


@pytest.mark.slow
def test_a_pool_of_eight_devices_goes_on_alike_on_one(runs, tmp_path):
    folder = runs.folders["nondoubling"]
    workdir = shutil.copytree(folder / "half", tmp_path / "run")
    fields = dict.fromkeys(["train__updates", "train__checkpoint_every", "eval__every"], 20)
    with tiny.Command(
        f"--workdir={workdir}", name="nondoubling", devices=1, before=tiny.NO_PICTURES, **fields
    ) as run:
        assert run.end() == 0, run.complained()
    on_one, on_eight = tiny.metrics(workdir)[0], tiny.metrics(folder / "straight")[0]
    for one, eight in zip(on_one, on_eight, strict=True):
        assert one == pytest.approx(eight, rel=1e-4)
    one, eight = tiny.arrays(workdir, 20), tiny.arrays(folder / "straight", 20)
    np.testing.assert_array_equal(one["pool/indices"], eight["pool/indices"])
    np.testing.assert_allclose(one["pool/cells"], eight["pool/cells"], atol=1e-4)


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM,),
        pytest.param((signal.SIGINT, signal.SIGHUP, signal.SIGTERM), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_signals_stop_saves_and_goes_on_to_the_same_bytes(runs, tmp_path, numbers):
    uninterrupted = runs.uninterrupted()
    workdir = shutil.copytree(runs.folders["baseline"] / "half", tmp_path / "run")
    for number in numbers:
        with command(workdir) as run:
            run.wait_for(f"/{UPDATES}  loss")
            run.process.send_signal(number)
            assert run.end(timeout=30) == 128 + number, run.complained()
        done = tiny.checkpoints(workdir)[-1]
        assert f"{number.name}: stopping" in run.printed()
        assert f"stopped at update {done} of {UPDATES}" in run.printed()
        assert 10 < done < UPDATES and not run.complained()
    with command(workdir) as run:
        assert run.end() == 0, run.complained()
    name = f"checkpoint_{UPDATES:08d}.npz"
    assert contents(workdir)[name] == contents(uninterrupted)[name]
    assert tiny.metrics(workdir)[0] == tiny.metrics(uninterrupted)[0]


IN_A_CALL = """
import jax, jax.numpy as jnp
from vnca.program.signals import stop_signals
endless_from_1 = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, jnp.sin, x))
endless_from_1(3.0).block_until_ready()  # so it is compiled
with stop_signals(lambda line: print(line, flush=True)):
    print("ready", flush=True)
    endless_from_1(1.0).block_until_ready()
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_device_call_at_once(number, status):
    with tiny.Process("-c", IN_A_CALL) as run:
        run.wait_for("ready")
        run.process.send_signal(number)
        run.wait_for(f"{number.name}: stopping after this device call", timeout=10)
        run.process.send_signal(number)  # the same one, as a wrapper passes it on
        time.sleep(1.2)
        assert run.process.poll() is None
        run.process.send_signal(number)
        assert run.end(timeout=10) == status
