"""The same command goes on: whatever ended a run, a kill, damage or storage that failed, it ends in
the bytes of a run that nothing befell.

All of these tests are slow. VNCA_KILLS=30: kills of each model; VNCA_CALLS=2000: device calls of
the long run.
"""

import errno
import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
from fates import arguments, contents, is_one_line, older, outcomes

from vnca.program import store

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("VNCA_KILLS", 9))
CALLS = int(os.environ.get("VNCA_CALLS", 100))
KEPT = {"baseline": 3, "doubling": 3, "nondoubling": 2}  # checkpoints
FIELDS = {"train__updates": 24, "train__checkpoint_every": 6, "eval__every": 12}
FIELDS |= {"train__warmup_updates": 20, "train__decay_updates": 30}  # each update has its own rate
SECOND, LAST = "checkpoint_00000012.npz", "checkpoint_00000024.npz"
# Of 20 updates of a run whose checkpoints are gone.
OLDER = "".join(
    f'{{"update": {n}, "loss": 1.5, "reconstruction": 1.0, "kl": 0.5, "grad_norm": 9.0}}\n'
    for n in range(1, 21)
)


def at(path, step="os.rename", **deeds):
    """The fate of a run at a step with this path in it: it is killed there, or has these deeds
    done to it."""
    return {"steps": [step], "path": path} | deeds


class Straight:
    """A run that nothing befell, in a folder that had an older one. whole: its contents, with every
    checkpoint; wanted: those that it keeps."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        (self.folder / "metrics.jsonl").write_text(OLDER)
        keeps_all = at("/checkpoint", "os.remove", nth=None, error=errno.EACCES)
        [outcome] = outcomes((arguments(self.folder, name=model, **FIELDS), keeps_all))
        assert outcome[0] == 0, outcome
        self.whole = contents(self.folder)
        self.whole.pop("metrics.previous.jsonl", None)
        dropped = [name for name in sorted(self.whole) if "checkpoint" in name][: -KEPT[model]]
        self.wanted = {name: self.whole[name] for name in self.whole if name not in dropped}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """straight(model): its Straight, made once."""
    return functools.cache(lambda model: Straight(tmp_path_factory.mktemp(model), model))


def survive(straight, folder, *chains):
    """Runs the command in a workdir for each chain of fates, once with each of them and then with
    none. Checks that no run loses a checkpoint, or begins at another than the newest, and that the
    last one leaves what is wanted. Returns what the runs with a fate said."""
    fates = [(folder / f"run{n}", fate) for n, chain in enumerate(chains) for fate in (*chain, {})]
    told = outcomes(
        *(
            (arguments(run, name=straight.model, **FIELDS), {"held": str(run)} | fate)
            for run, fate in fates
        )
    )
    newest = 0
    for (run, fate), (status, out, complaint) in zip(fates, told, strict=True):
        held = json.loads(out.splitlines()[0])
        found = {name: held[name] for name in held if name.startswith("checkpoint")}
        updates = [0, *(int(name[11:19]) for name in found)]
        if "before" not in fate:
            assert found.items() <= straight.whole.items() and max(updates) >= newest
            assert {*re.findall(r"_0*(\d+).npz at update", out)} <= {str(max(updates))}
        newest = max(updates) if fate else 0
        assert fate or status == 0 and contents(run) == straight.wanted, complaint
    return [outcome for (_, fate), outcome in zip(fates, told, strict=True) if fate]


# ---- Killed, and started again ---------------------------------------------------------------


def test_metrics_are_of_each_update_once_and_an_older_runs_are_set_aside(straight):
    workdir = straight("baseline").folder
    updates, tests = ([record["update"] for record in part] for part in tiny.metrics(workdir))
    assert (updates, tests) == (list(range(1, 25)), [12, 24])
    assert (workdir / "metrics.previous.jsonl").read_text() == OLDER


def moments(chance):
    """Fates of runs, for ever: where and when a kill hits them."""
    while True:
        nth, part = chance.randint(1, 3), chance.random()
        for path, size in ((".checkpoint", 138_000), ("/metrics.jsonl", 3000)):
            yield at(path, "open", nth=nth, cut=1 + int(size * part))
        yield at("/checkpoint", "os.remove")  # before pruning
        yield at(".png", "open", nth=nth, cut=1 + int(3000 * part))
        yield at("/.checkpoint", nth=nth)
        yield {"before": f"(sleep {2.5 * part}; kill -9 $PPID 2> /dev/null) &"}
        yield {"before": f"(sleep {0.5 * part}; kill -9 $PPID 2> /dev/null) &"}


@pytest.mark.parametrize("model", KEPT)
def test_a_run_that_is_killed_at_any_moment_ends_in_the_same_bytes(straight, tmp_path, model):
    fates = moments(random.Random(f"{model}{KILLS}"))
    chains = [[next(fates) for _ in range(3)] for _ in range(0, KILLS, 3)]
    told = survive(straight(model), tmp_path, *chains)
    killed = [status < 0 for status, *_ in told]
    assert sum(killed) > KILLS // 2  # others came to their end before
    for outcome, (_, out, complaint) in zip(killed, told, strict=True):
        assert not complaint and "warning" not in out
        assert outcome or re.search("done; |nothing to do", out)


def test_a_run_survives_a_damaged_checkpoint_and_damaged_metrics(straight, tmp_path):
    run = tmp_path / "run0"
    spoil = rf"""cd {run} && printf X | dd of={SECOND} bs=1 seek=70000 conv=notrunc status=none
        sed -i.old '1{{h;s/"loss": [^,]*/"loss": "low"/p;x;}}' metrics.jsonl && rm *.old
        printf '{{"update": 13, "loss": 1.0}}\n\0\0, "kl": 1.0}}\n{{"upda' >> metrics.jsonl"""
    killed, again = survive(
        straight("baseline"), tmp_path, [at("checkpoint_00000018"), {"before": spoil}]
    )
    assert f"{run / SECOND} is damaged" in again[1] and "_00000006.npz at update 6" in again[1]


# ---- Storage that fails ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [range(n, 60, 3) for n in (1, 2, 3)])
def test_storage_that_fails_at_any_step_costs_a_line_and_the_same_command_goes_on(
    straight, tmp_path, steps
):
    chains = []
    for run, nth in enumerate(steps):
        code = (errno.ENOSPC, errno.EROFS, errno.EIO)[run % 3]
        fate = at(f"{tmp_path}/run{run}", nth=nth, error=code)
        chains.append([fate | {"steps": ["open", "os.rename", "os.mkdir"]}])
    told = survive(straight("baseline"), tmp_path, *chains)
    failed = [outcome for outcome in told if outcome[0]]  # what only tidies up may fail
    assert all(is_one_line(outcome, f"{tmp_path}/run", ": ") for outcome in failed)
    assert len(failed) > len(steps) // 3 and not told[-1][0]  # it had less


def test_a_disk_that_is_full_or_read_only_costs_a_line_until_it_has_room(straight, tmp_path):
    [outcome] = survive(straight("baseline"), tmp_path, [{"limit": 100_000}])
    assert is_one_line(outcome, "checkpoint_00000006.npz", os.strerror(errno.EFBIG))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    ways = {"size=200k": "No space left", "ro": "Read-only", "rw,size=4m": ""}
    try:
        fates = [{"before": f"mount -o remount,{way} {disk}"} for way in ways]
        told = survive(straight("baseline"), disk, fates)
    finally:
        subprocess.run(["umount", disk])
    assert all(
        is_one_line(o, disk / "run0", w) for o, w in zip(told[:2], ways.values(), strict=False)
    )


# ---- One run in a workdir --------------------------------------------------------------------


def test_one_training_has_a_workdir_until_it_ends_in_any_way(straight, tmp_path):
    run, said = tmp_path / "run0", tmp_path / "said"
    second = shlex.join([sys.executable, "main.py", *arguments(run, **FIELDS)])
    meanwhile = f"{second} > {said} 2>&1; echo $? >> {said}"  # and then the first is killed
    survive(straight("baseline"), tmp_path, [at(SECOND, shell=meanwhile, kill=True)])
    complaint, status = said.read_text().splitlines()
    assert is_one_line((int(status), "", f"{complaint}\n"), f"--workdir={run} is in use")
    assert not os.access(run / ".lock", os.X_OK)


def test_a_run_whose_folder_was_replaced_ends_and_leaves_the_new_one_alone(straight, tmp_path):
    new, commands = straight("baseline"), []
    runs = {"compiling": at("-cache", "open"), "training": at("/checkpoint", "os.remove")}
    for run, where in runs.items():
        replace = f"cd {tmp_path}; rm -r {run}; cp -r {new.folder} {run}; rm {run}/*previous*"
        fields = FIELDS | {"train__checkpoint_every": 3}
        commands.append((arguments(tmp_path / run, **fields), where | {"shell": replace}))
    for run, outcome in zip(runs, outcomes(*commands), strict=True):
        assert is_one_line(outcome, f"--workdir={tmp_path / run}")
        assert contents(tmp_path / run) == new.whole


# ---- Workdirs of before ----------------------------------------------------------------------


def test_a_workdir_of_another_version_goes_on_to_the_same_bytes(straight, tmp_path):
    run, wanted = tmp_path / "run", straight("baseline").wanted
    [outcome] = outcomes((arguments(run, **FIELDS), at("checkpoint_00000018")))
    assert outcome[0] == -signal.SIGKILL, outcome
    config, arrays = store.load(run / SECOND)
    config = older(config)
    # A field that is gone, and some that were fitted to a machine and kept.
    config["train"] |= {"debug_nans": False, "updates_per_call": 125, "checkpoint_every": 100_000}
    store.save(run / SECOND, config, arrays)
    [(_, out, complaint)] = outcomes((arguments(run, **FIELDS), {}))
    assert f"{SECOND} at update 12" in out, complaint
    assert wanted.items() - contents(run).items() == {(SECOND, wanted[SECOND])}


# ---- A long run ------------------------------------------------------------------------------


def peak(workdir, model, calls, width):
    """The largest memory, in MB, of a run of so many device calls."""
    fields = {"train__updates": 3 * calls, "train__checkpoint_every": 6, "eval__every": 30}
    fields["model__encoder_width"] = width
    with tiny.Command(f"--workdir={workdir}", name=model, **fields) as run:
        _, status, used = os.wait4(run.process.pid, 0)
    assert status == 0, run.complained()
    return used.ru_maxrss / 1e3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory has another unit")
@pytest.mark.parametrize(
    "model, calls, width",  # at a width of 16, two states that are not let go are 50 MB
    [("baseline", 40, 16), ("nondoubling", CALLS, 1)],
)
def test_a_long_run_takes_no_more_memory_than_a_short_one(tmp_path, model, calls, width):
    short, long = (peak(tmp_path / f"{n}", model, n, width) for n in (12, calls))
    assert long < short + 50
