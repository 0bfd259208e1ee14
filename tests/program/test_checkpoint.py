"""Checkpoints: what was saved comes back, and a fault of the storage costs no older one."""

import copy
import errno
import json
import os
import time
import weakref
import zipfile

import jax
import numpy as np
import pytest
import tiny

from vnca.pool import Pool
from vnca.program import VncaError, checkpoint
from vnca.training import State

CONFIG = json.loads(json.dumps(tiny.config("nondoubling").to_dict()))


def state(update=7, seed=0):
    random = np.random.RandomState(seed)
    params = {
        "decoder": {"blocks": [{"kernel": random.randn(2, 3)}, {"kernel": random.randn(2, 3)}]},
        "encoder": {"bias": random.randn(4)},
    }
    params = jax.tree.map(np.float32, params)
    moments = {"mean": jax.tree.map(np.square, params)}
    return State(params, moments, np.int32(update), pool=())


def same(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    )


def rewrite(path, **changes):
    """The file again, with some of its entries changed."""
    with np.load(path) as file:
        entries = dict(file) | changes
    np.savez(path, **entries)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    path = checkpoint.save(tmp_path, state(), CONFIG, keep=3)
    config, restore = checkpoint.load(path)
    assert config == CONFIG
    assert same(restore(state(seed=1)), state())


def test_a_checkpoint_is_read_by_numpy_without_pickle(tmp_path):
    path = checkpoint.save(tmp_path, state(), CONFIG, keep=3)
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    assert sorted(arrays) == [
        "config",
        "format",
        "moments/mean/decoder/blocks/0/kernel",
        "moments/mean/decoder/blocks/1/kernel",
        "moments/mean/encoder/bias",
        "params/decoder/blocks/0/kernel",
        "params/decoder/blocks/1/kernel",
        "params/encoder/bias",
        "sha256",
        "update",
    ]
    expected = state().params["decoder"]["blocks"][1]["kernel"]
    assert np.array_equal(arrays["params/decoder/blocks/1/kernel"], expected)
    assert json.loads(str(arrays["config"])) == CONFIG
    assert arrays["update"] == 7


def test_equal_states_make_equal_bytes_wherever_and_whenever(tmp_path, monkeypatch):
    first, second = tmp_path / "one", tmp_path / "another"
    first.mkdir(), second.mkdir()
    one = checkpoint.save(first, state(), CONFIG, keep=3)
    later, local = time.time() + 4e8, time.localtime
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(time, "localtime", lambda *_: local(later))
    other = checkpoint.save(second, state(), dict(reversed(CONFIG.items())), keep=3)
    assert one.read_bytes() == other.read_bytes()
    assert one.name == other.name


def test_the_newest_few_are_kept(tmp_path):
    for update in (100, 5, 20, 1000):
        checkpoint.save(tmp_path, state(update), CONFIG, keep=3)
    names = [f"checkpoint_{n:08d}.npz" for n in (1000, 100, 20)]
    assert [path.name for path in checkpoint.paths(tmp_path)] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_an_update_of_nine_digits_is_newer_than_one_of_eight(tmp_path):
    for update in (99_999_999, 100_000_000):
        path = checkpoint.save(tmp_path, state(update), CONFIG, keep=3)
    assert checkpoint.newest(tmp_path)[0] == path


def test_an_old_one_that_cannot_be_removed_costs_nothing(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(checkpoint.Path, "unlink", denied)
    for update in (5, 6):
        checkpoint.save(tmp_path, state(update), CONFIG, keep=1)
    assert len(checkpoint.paths(tmp_path)) == 2


def test_the_newest_is_found_with_its_config(tmp_path):
    assert checkpoint.newest(tmp_path) is checkpoint.newest("a" * 5000) is None
    for update in (5, 20):
        path = checkpoint.save(tmp_path, state(update, seed=update), CONFIG, keep=3)
    found, config, restore = checkpoint.newest(tmp_path)
    assert (found, config) == (path, CONFIG)
    assert same(restore(state()), state(20, seed=20))


# ---- Files that are damaged, or another's ----------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"\x93NUMPY") + 150] ^= 1  # in the first array
    path.write_bytes(content)


def pickled(path):
    rewrite(path, update=np.array([object()]))


def without_config(path):
    with np.load(path) as file:
        np.savez(path, **{name: file[name] for name in file.files if name != "config"})


def zero_its_start(path):
    path.write_bytes(bytes(512) + path.read_bytes()[512:])


DAMAGES = [truncate, empty, flip_a_bit, pickled, without_config, zero_its_start]
every_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)


@every_damage
def test_a_damaged_newest_is_reported_and_the_one_before_it_used(tmp_path, damage):
    old = checkpoint.save(tmp_path, state(5, seed=5), CONFIG, keep=3)
    new = checkpoint.save(tmp_path, state(6), CONFIG, keep=3)
    damage(new)
    lines = []
    found, _, restore = checkpoint.newest(tmp_path, lines.append)
    assert found == old and same(restore(state()), state(5, seed=5))
    [line] = lines
    assert line.startswith(f"warning: {new} is damaged, or not a checkpoint (")
    assert line.endswith("; the one before it is tried") and "\n" not in line
    assert "load it unsafely" not in line  # NumPy's advice
    assert new.exists()


def test_a_pickle_in_a_checkpoint_is_never_run(tmp_path):
    path = checkpoint.save(tmp_path, state(), CONFIG, keep=3)
    rewrite(path, update=np.array(tiny.Trap()))
    with pytest.raises(VncaError, match="damaged"):
        checkpoint.load(path)


def test_a_format_of_the_future_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, state(), CONFIG, keep=3)
    rewrite(path, format=np.array(checkpoint.FORMAT + 1))
    with pytest.raises(VncaError) as fault:
        checkpoint.load(path)
    assert tiny.one_line(fault, path, f"format {checkpoint.FORMAT + 1}")


def test_an_array_of_another_model_is_named_with_both_shapes(tmp_path):
    path = checkpoint.save(tmp_path, state(), CONFIG, keep=3)
    _, restore = checkpoint.load(path)
    name = "params/decoder/blocks/1/kernel"
    wider, longer, other = state(), state(), state()
    wider.params["decoder"]["blocks"][1]["kernel"] = np.zeros((2, 5), np.float32)
    other.params["decoder"]["blocks"][1]["kernel"] = np.zeros((2, 3), np.int32)
    longer.params["decoder"]["blocks"].append({"kernel": np.zeros((2, 3), np.float32)})
    with pytest.raises(VncaError) as fault:
        restore(wider)
    assert tiny.one_line(fault, f"{name} is float32 [2, 3], not float32 [2, 5]")
    with pytest.raises(VncaError) as fault:
        restore(other)
    assert tiny.one_line(fault, f"{name} is float32 [2, 3], not int32 [2, 3]")
    with pytest.raises(VncaError) as fault:
        restore(longer)
    assert tiny.one_line(fault, "params/decoder/blocks/2/kernel is missing")


def test_arrays_under_their_earlier_names_are_found(tmp_path):
    def tree(last_layer, seed):
        random = np.random.RandomState(seed)
        layer = {"kernel": random.randn(2, 3), "bias": random.randn(3)}
        return {"decoder": {last_layer: jax.tree.map(np.float32, layer)}}

    def moments(last_layer):
        return {"mean": tree(last_layer, 1), "square": tree(last_layer, 2)}

    cells, indices = np.ones((2, 3), np.float32), np.array([5, 7], np.int32)
    before = {"params": tree("update", 0), "moments": moments("update"), "update": np.int32(7)}
    before["pool"] = {"cells": cells, "numbers": indices}
    checkpoint.write_state(tmp_path / "checkpoint_00000007.npz", before, CONFIG)
    with np.load(tmp_path / "checkpoint_00000007.npz") as file:
        assert {"params/decoder/update/kernel", "pool/numbers"} < set(file.files)
    wanted = State(
        tree("residual", 0), moments("residual"), np.int32(7), Pool(cells=cells, indices=indices)
    )
    _, _, restore = checkpoint.newest(tmp_path)
    assert same(restore(jax.tree.map(np.zeros_like, wanted)), wanted)

    packaged = {"params": jax.tree.map(np.float16, before["params"])}
    checkpoint.write_state(tmp_path / "packaged.npz", packaged, CONFIG)
    halves = {"params": jax.tree.map(np.float16, wanted.params)}
    _, restore = checkpoint.load(tmp_path / "packaged.npz")
    assert same(restore(jax.tree.map(np.zeros_like, halves)), halves)


def test_a_restored_state_is_held_by_its_owner_alone(tmp_path):
    _, restore = checkpoint.load(checkpoint.save(tmp_path, state(), CONFIG, keep=3))
    restored = restore(state(seed=1))
    bias = weakref.ref(restored.params["encoder"]["bias"])
    del restored
    assert bias() is None and restore  # which a training holds to its end


def changed(**sections):
    """CONFIG with fields changed, or removed by …, or a whole section removed."""
    config = copy.deepcopy(CONFIG)
    for section, fields in sections.items():
        if fields is ...:
            del config[section]
        else:
            config[section] |= fields
    return config


@pytest.mark.parametrize(
    "config, words",
    [
        (changed(train={"momentum": 0.9}), "config.train.momentum"),  # of a later version
        (changed(train=...), "config.train.updates is missing"),
        (changed(train={"updates": "many"}), "config.train.updates='many'"),
        (changed(model={"name": "transformer"}), "config.model.name='transformer'"),
        (changed(model={"channels": 200}), "channels=200"),  # that only older versions had
        ({"model": {"name": []}, "train": 3}, "config.data"),
    ],
)
def test_a_config_that_this_version_cannot_use_is_refused_in_one_line(tmp_path, config, words):
    checkpoint.save(tmp_path, state(6), CONFIG, keep=3)
    path = checkpoint.save(tmp_path, state(7), config, keep=3)
    with pytest.raises(checkpoint.Unreadable) as fault:
        checkpoint.newest(tmp_path)
    assert tiny.one_line(fault, path, words, "use the version that made it")


@pytest.mark.parametrize("config", [[], {"model": []}, None])
def test_a_config_that_is_none_is_damage(tmp_path, config):
    path = checkpoint.save(tmp_path, state(7), config, keep=3)
    with pytest.raises(VncaError) as fault:
        checkpoint.load(path)
    assert tiny.one_line(fault, path, "is damaged")
    assert not isinstance(fault.value, checkpoint.Unreadable)  # so an older one is tried


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "EMFILE", "EACCES"])
@pytest.mark.parametrize("step", ["open", "read"])
def test_storage_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch, code, step):
    checkpoint.save(tmp_path, state(6), CONFIG, keep=3)
    path = checkpoint.save(tmp_path, state(7), CONFIG, keep=3)
    number = getattr(errno, code)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    def hide(*_):  # as zipfile does it, which hides the cause
        try:
            fail()
        except OSError:
            raise zipfile.BadZipFile("File is not a zip file")  # noqa: B904

    if step == "open":
        monkeypatch.setattr(checkpoint.np, "load", fail)
    else:
        monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", hide)
    with pytest.raises(checkpoint.Unreadable) as fault:
        checkpoint.newest(tmp_path)
    assert tiny.one_line(fault, path, os.strerror(number)) and "damaged" not in str(fault.value)
    assert "delete" not in str(fault.value)


def test_memory_that_is_too_small_is_no_damage(tmp_path, monkeypatch):
    for update in (6, 7):
        checkpoint.save(tmp_path, state(update), CONFIG, keep=3)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(checkpoint.np, "load", fail)
    with pytest.raises(checkpoint.Unreadable, match="00000007.npz: not enough memory"):
        checkpoint.newest(tmp_path)


def test_any_wrong_bit_in_a_files_last_record_is_damage_or_harmless(tmp_path):
    # Some send zipfile to a place before the file: an OSError with a number, EINVAL.
    old = checkpoint.save(tmp_path, state(6), CONFIG, keep=3)
    path = checkpoint.save(tmp_path, state(7), CONFIG, keep=3)
    content = path.read_bytes()
    for bit in range(22 * 8):
        flipped = bytearray(content)
        flipped[-1 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found, _, restore = checkpoint.newest(tmp_path, [].append)
        assert found == old or found == path and same(restore(state()), state(7))


def test_a_workdir_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(checkpoint.os, "listdir", denied)
    with pytest.raises(VncaError) as fault:
        checkpoint.newest(tmp_path)
    assert tiny.one_line(fault, tmp_path, "Permission denied", "get permission")


def test_a_checkpoint_that_a_training_removes_meanwhile_is_no_damage(tmp_path, monkeypatch):
    old = checkpoint.save(tmp_path, state(6), CONFIG, keep=3)
    load, new = checkpoint.load, tmp_path / "checkpoint_00000009.npz"

    def late(path):
        if path == old and old.exists():
            checkpoint.save(tmp_path, state(9), CONFIG, keep=1)
        return load(path)

    monkeypatch.setattr(checkpoint, "load", late)
    assert checkpoint.newest(tmp_path, pytest.fail)[0] == new


def test_other_files_of_the_user_are_no_checkpoints(tmp_path):
    path = checkpoint.save(tmp_path, state(6), CONFIG, keep=3)
    for name in ("checkpoint_00000006_copy.npz", "checkpoint_best.npz", "checkpoint_6.npz"):
        (tmp_path / name).write_bytes(b"")
    assert checkpoint.paths(tmp_path) == [path]
    os.mkfifo(tmp_path / "checkpoint_00000009.npz")
    with pytest.raises(VncaError, match="00000009.npz is not a file: move it away"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_is_chosen_by_its_update_or_its_path(tmp_path, monkeypatch):
    for update in (5, 20):
        checkpoint.save(tmp_path, state(update), CONFIG, keep=3)
    five = tmp_path / "checkpoint_00000005.npz"
    for workdir, which in ((tmp_path, "5"), ("elsewhere", str(five))):
        assert checkpoint.named(workdir, which)[0] == five
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint.named("elsewhere", f"~/{five.name}")[0] == five
    for which in ("6", "checkpoint_00000006.npz"):
        with pytest.raises(VncaError) as fault:
            checkpoint.named(tmp_path, which)
        words = f"--checkpoint={which}: ", "00000006.npz", "those of updates 20, 5"
        assert tiny.one_line(fault, *words)
    np.savez(tmp_path / "mine.npz", a=1)
    with pytest.raises(VncaError) as fault:
        checkpoint.named(tmp_path, str(tmp_path / "mine.npz"))
    assert tiny.one_line(fault, "mine.npz is damaged, or not a checkpoint", "another --checkpoint")


@pytest.mark.parametrize("which", ["9" * 5000, "{}", "a\nb", "checkpoint_00000005.npz"])
def test_a_checkpoint_that_is_not_there_is_named(tmp_path, which):
    which = which.format(tmp_path)
    with pytest.raises(VncaError) as fault:
        checkpoint.named(tmp_path, which)
    assert str(fault.value).startswith(f"--checkpoint={which}: there is no file")
