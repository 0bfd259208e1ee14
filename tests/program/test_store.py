"""Files: each holds what was written, or is found to be damaged and not used; a write that fails or
is killed leaves the file before it, and nothing for ever."""

import errno
import fcntl
import os
import pickle
import random
import shutil
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny
from fates import arguments, contents, is_one_line, outcomes

from vnca.program import runs, store

HEADER = {"model": {"name": "baseline"}, "rate": 1e-3}
KERNEL, INDICES, UPDATE = np.ones((3, 5), np.float32), np.arange(7), np.array(7, np.int32)
ARRAYS = {"params/kernel": KERNEL, "pool/indices": INDICES, "update": UPDATE}
FIELDS = {"train__updates": 6, "train__checkpoint_every": 3, "eval__every": 6}
NEWEST = "checkpoint_00000006.npz"


def exactly(arrays):
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}


@pytest.fixture
def written(tmp_path):
    """A file as `store.save` writes it."""
    store.save(tmp_path / NEWEST, HEADER, ARRAYS)
    return tmp_path / NEWEST


# ---- Damage ----------------------------------------------------------------------------------


def test_a_file_that_is_cut_or_has_a_bit_flipped_never_loads_as_another(written):
    content, chance = written.read_bytes(), random.Random(0)
    size = len(content)
    spoilt = [content[:n] for n in (*range(size - 100, size), *chance.choices(range(size), k=100))]
    # All of the zip's end record: some of its bits send zipfile to a place before the file.
    for bit in (*range(8 * size - 176, 8 * size), *chance.choices(range(8 * size), k=3000)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        spoilt.append(flipped)
    found = 0
    for damaged in [*spoilt, b"", pickle.dumps(tiny.Trap())]:
        written.write_bytes(damaged)
        try:  # a bit of a field that nobody reads, such as a time, is harmless
            header, arrays = store.load(written)
            assert header == HEADER and exactly(arrays) == exactly(ARRAYS)
        except store.Damaged as fault:
            assert str(written) in str(fault)
            found += 1
    assert found > len(spoilt) / 2


FORGERIES = {
    "a pickle": {"update": np.array(tiny.Trap())},
    "another dtype": {"pool/indices": INDICES.view(np.float64)},
    "another shape": {"params/kernel": KERNEL.reshape(5, 3)},
    "exchanged": {"update": INDICES, "pool/indices": UPDATE},
}


@pytest.mark.parametrize("changes", FORGERIES.values(), ids=FORGERIES)
def test_arrays_that_do_not_match_the_checksum_are_damage(written, changes):
    with np.load(written) as file:
        np.savez(written, **dict(file) | changes)
    with pytest.raises(store.Damaged):
        store.load(written)


def test_too_little_memory_is_no_damage_for_which_an_older_file_would_be_taken(
    written, monkeypatch
):
    store.save(store.checkpoint(written.parent, 3), HEADER, ARRAYS)
    faults, load = iter([MemoryError()]), np.load

    def load_with_little_memory(*args, **given):
        for fault in faults:  # the first file alone does not fit
            raise fault
        return load(*args, **given)

    monkeypatch.setattr(np, "load", load_with_little_memory)
    with pytest.raises(OSError, match="too little memory") as fault:
        runs.find(written.parent, None)
    assert tiny.one_line(fault, written)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with checkpoints of updates 3 and 6."""
    run = tmp_path_factory.mktemp("run") / "run"
    assert outcomes((arguments(run, **FIELDS), {}))[0][0] == 0
    return run


@pytest.mark.slow  # five runs, for 9 seconds
def test_the_file_before_a_damaged_one_is_used_but_not_one_before_failing_storage(run, tmp_path):
    damaged, lost, failing = (shutil.copytree(run, tmp_path / name) for name in "abc")
    for path in [damaged / NEWEST, *lost.glob("checkpoint*")]:
        path.write_bytes(path.read_bytes()[:-300])
    before = contents(lost), contents(failing)
    result = damaged / "evaluation.json"
    evaluate = arguments(damaged, "--mode=evaluate", **FIELDS, eval__images=16, eval__samples=1)
    fails = {"steps": ["open"], "path": f"{failing}/{NEWEST}", "error": errno.EIO}
    # One bit of the zip's end record, as zipfile finds a place before the file: EINVAL.
    of_end = 'dd of="$f" bs=1 conv=notrunc status=none seek=$(($(wc -c < "$f") - 5))'
    flip = f"""f=$(echo {damaged}/*.partial.*) && printf '\\200' | {of_end}
        mv {result} {tmp_path}"""
    used, anew, none, refused = outcomes(
        (evaluate, {}),
        (evaluate, {"before": flip}),
        (arguments(lost, **FIELDS), {}),
        (arguments(failing, **FIELDS | {"train__updates": 9}), fails),
    )
    assert used[0] == anew[0] == 0 and f"{damaged / NEWEST} is damaged" in used[1], (used, anew)
    assert '"checkpoint": "checkpoint_00000003.npz"' in result.read_text()
    assert "evaluated before" not in anew[1]
    assert result.read_bytes() == (tmp_path / result.name).read_bytes()
    assert is_one_line(none, lost)
    assert is_one_line(refused, failing / NEWEST, os.strerror(errno.EIO))
    assert before == (contents(lost), contents(failing))


# ---- Writes ----------------------------------------------------------------------------------


def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["save", "fsync", "replace"])
def test_a_failed_write_leaves_the_file_before_it_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"before")
    if step != "save":
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left") as fault:
        store.write(path, lambda file: file.write(b"half") and step == "save" and fail())
    assert tiny.one_line(fault, path)
    if step == "fsync":
        with pytest.raises(OSError, match="No space left") as fault:
            store.append(path, b"", sync=True)
        assert tiny.one_line(fault, path)
    assert path.read_bytes() == b"before" and [*tmp_path.iterdir()] == [path]


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_then(tmp_path, monkeypatch):
    steps, replace, link = [], os.replace, tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    (tmp_path / "of the user").touch()

    def sync(number):
        steps.append(stat.S_ISDIR(os.fstat(number).st_mode))
        if steps[-1]:
            raise OSError(errno.EINVAL, "storage that cannot do this")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *paths: steps.append("name") or replace(*paths))
    store.write(link, lambda file: file.write(b"whole"))
    assert steps == [False, "name", True]
    assert link.is_symlink() and (tmp_path / "file").read_bytes() == b"whole"
    assert link.stat().st_mode == (tmp_path / "of the user").stat().st_mode


def test_two_writes_of_a_file_at_once_are_each_whole(tmp_path):
    path = tmp_path / "samples.png"

    def save(file):
        store.write(path, lambda other: other.write(b"the first to end"))
        assert path.read_bytes() == b"the first to end"
        file.write(b"the last")

    store.write(path, save)
    assert path.read_bytes() == b"the last" and [*tmp_path.iterdir()] == [path]


def test_a_write_whose_new_file_is_cleaned_away_before_it_is_locked_makes_another(
    tmp_path, monkeypatch
):
    cleaner, locked = threading.Thread(target=store.clean, args=[tmp_path]), threading.Event()
    lock = fcntl.flock

    def later(file, how):
        if threading.current_thread() is cleaner:
            lock(file, how)
            locked.set()
        elif not cleaner.ident:
            cleaner.start()
            assert locked.wait(9)
            lock(file, how)

    monkeypatch.setattr(fcntl, "flock", later)
    store.write(tmp_path / "file", lambda file: cleaner.join() or file.write(b"whole"))
    assert (tmp_path / "file").read_bytes() == b"whole" and len([*tmp_path.iterdir()]) == 1


def test_newer_checkpoints_that_are_damaged_do_not_cost_the_last_good_ones(tmp_path):
    (tmp_path / "checkpoint_best.npz").touch()  # of the user
    at = {n: store.checkpoint(tmp_path, n) for n in (3, 6, 9, 4, 10**8)}
    for path in at.values():
        store.save(path, HEADER, ARRAYS)
    store.prune(at[4], 1)  # it would not be at 4 if those from 6 on were not damaged
    assert store.checkpoints(tmp_path) == [at[n] for n in (10**8, 9, 6, 4)]
    assert len([*tmp_path.iterdir()]) == 5


KILLED = """
import os, signal, sys
from vnca.program import runs, store
for path in sys.argv[1:]:
    if not os.fork():
        store.write(path, lambda file: os.kill(os.getpid(), signal.SIGKILL))
    os.wait()
"""


@pytest.mark.slow  # three runs, for 9 seconds
def test_the_next_run_removes_what_killed_writes_left_in_any_folder_and_nothing_else(run, tmp_path):
    work = shutil.copytree(run, tmp_path / "run")
    (work / "figures").mkdir()
    for name in (".notes.tmp", ".draft.12345678.txt.tmp", "figures/.keep"):  # of the user
        (work / name).touch()
    before, names = {*contents(work)}, ["checkpoint_00000009.npz", "study.json"]
    names += ["samples.png", "evaluation.partial.0123456789abcdef.npz", "figures/samples.png"]
    subprocess.run([sys.executable, "-c", KILLED, *(work / n for n in names)], cwd=tiny.ROOT)
    assert len(contents(work)) == len(before) + len(names)
    # Another program's write, which goes on meanwhile, stays.
    store.write(work / "evaluation.json", lambda _: outcomes((arguments(work, **FIELDS), {})))
    assert {*contents(work)} == before | {"evaluation.json"}
