"""Signals that ask for an end: training, evaluation and study save their work first, all else ends
at once, and the exit status names the signal."""

import contextlib
import errno
import functools
import os
import shutil
import sys
import time
from signal import (
    SIG_IGN,
    SIGHUP,
    SIGINT,
    SIGTERM,
    Signals,
    default_int_handler,
    getsignal,
    raise_signal,
)
from unittest.mock import Mock

import pytest
import tiny
from fates import arguments, is_one_line, outcomes

from vnca.program import stop

FIELDS = {"train__updates": 24, "train__checkpoint_every": 12, "eval__every": 4}
MODELS = {"study": "nondoubling"}  # which measures most of what it does on the run itself
LAST = "checkpoint_00000024.npz"
AT_UPDATE_4 = {"steps": ["os.rename"], "path": "samples.png"}
# Of a mode that saves its work: at which write of which file it is stopped, how many images it
# takes, and what it makes in the end.
SAVING = {
    "train": (1, "samples.png", None, [LAST, "metrics.jsonl", "samples.png"]),
    "evaluate": (1, "evaluation.partial", 300, ["evaluation.json"]),
    "study": (3, "study.partial", 2, ["study.json"]),  # when recovery has been measured
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(model): the workdir of a run that nothing befell, made once."""

    @functools.cache
    def of(model):
        workdir = tmp_path_factory.mktemp(model) / "run"
        assert outcomes((arguments(workdir, name=model, **FIELDS), {}))[0][0] == 0
        return workdir

    return of


@pytest.mark.slow  # three runs or more a test: training and evaluation for 10 seconds, study for 20
@pytest.mark.parametrize("number", [SIGINT, SIGTERM, SIGHUP])
@pytest.mark.parametrize("mode", SAVING)
def test_a_signal_saves_the_work_and_the_same_command_goes_on_to_the_same_bytes(
    trained, tmp_path, mode, number
):
    nth, path, images, files = SAVING[mode]
    runs, model = (tmp_path / "run", tmp_path / "straight"), MODELS.get(mode, "baseline")
    for run in runs * (mode != "train"):
        shutil.copytree(trained(model), run)
    more = {"eval__images": images, "eval__samples": 1, "eval__chunk": 20}
    one, other = (arguments(run, f"--mode={mode}", name=model, **FIELDS | more) for run in runs)
    # It comes twice, as a wrapper passes it on; for training in a write.
    twice = {"signals": [(0.1, number), (0.3, number)], "pause": 0.6 * (mode == "train")}
    stopped, resumed, straight = outcomes(
        (one, AT_UPDATE_4 | {"path": path, "nth": nth} | twice), (one, {}), (other, {})
    )
    assert (stopped[0], stopped[2]) == (128 + number, "")
    assert f"{Signals(number).name}: stopping after this device call" in stopped[1]
    assert "run the same command again to resume" in stopped[1].splitlines()[-1]
    assert resumed[0] == straight[0] == 0, resumed
    if mode == "study":
        assert "images  recovery" in stopped[1] and "images  recovery" not in resumed[1]
    else:
        assert "resuming " in resumed[1] or " before\n" in resumed[1]
    for file in files:
        assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes()


@pytest.fixture(scope="module")
def befallen(tmp_path_factory):
    """{what befell a training: its workdir and outcome}."""
    hung_up = {"signals": [(0, SIGHUP)], "pause": 0.2}
    fates = {
        "a later one": {"signals": [(0, SIGTERM), (1.5, SIGINT)], "pause": 50},
        "at the end": {"path": LAST} | hung_up,
        "ignored": {"ignored": [SIGHUP, SIGINT], "signals": [(0, SIGHUP), (0, SIGINT)]},
        "lost output": {"lost": True},
        "lost connection": {"lost": True} | hung_up,
    }
    folder = tmp_path_factory.mktemp("befallen")
    told = outcomes(
        *((arguments(folder / name, **FIELDS), AT_UPDATE_4 | fates[name]) for name in fates)
    )
    return {name: (folder / name, outcome) for name, outcome in zip(fates, told, strict=True)}


@pytest.mark.slow  # five trainings, for 19 seconds
@pytest.mark.parametrize(
    "fate, status, stopping, done",
    [
        ("a later one", 130, True, False),  # after 1.5 of the 50 seconds that a write takes
        ("at the end", 129, True, True),
        ("ignored", 0, False, True),  # by nohup, or by a script's &
        ("lost connection", 129, False, False),
    ],
)
def test_a_second_signal_ends_at_once_and_the_status_names_the_one_that_came(
    befallen, fate, status, stopping, done
):
    _, (found, out, complaint) = befallen[fate]
    assert (found, complaint) == (status, "") and "stopped at update" not in out
    assert ("stopping after" in out, "done;" in out) == (stopping, done)


@pytest.mark.slow
def test_output_that_is_lost_asks_for_a_stop(befallen):
    assert is_one_line(befallen["lost output"][1], "standard output", "Bad file descriptor")
    for folder, _ in (befallen["lost output"], befallen["lost connection"]):
        newest = tiny.checkpoints(folder)[-1]
        assert 4 < newest < 24 and len(tiny.metrics(folder)[0]) == newest


class Lost:
    """An output that fails."""

    def write(self, text):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_output_that_is_lost_ends_what_saves_its_work_when_it_is_saved_and_all_else_at_once(
    monkeypatch,
):
    monkeypatch.setattr(stop._Now, "lost", None)
    for is_saving in (True, False):
        monkeypatch.setattr(sys, "stdout", Lost())
        asked = None
        with (
            pytest.raises(OSError, match="standard output") as fault,
            stop.saving() if is_saving else contextlib.nullcontext(),
        ):
            stop.say("a line")
            asked = stop.asked()
        assert tiny.one_line(fault, os.strerror(errno.EIO))
        assert asked == (1 if is_saving else None)


def test_a_signal_that_was_ignored_at_the_start_is_not_listened_to(monkeypatch):
    heard = []
    monkeypatch.setattr(stop.signal, "getsignal", {SIGHUP: SIG_IGN}.get)  # as under nohup
    monkeypatch.setattr(stop.signal, "pthread_sigmask", lambda _, numbers: heard.append(numbers))
    monkeypatch.setattr(stop.threading, "Thread", lambda args, **_: heard.extend(args) or Mock())
    stop.listen()
    assert heard == [[SIGINT, SIGTERM]] * 2  # blocked, and waited for


@pytest.mark.parametrize("pause, ends", [(0, stop.Stopped), (1.1, KeyboardInterrupt)])
def test_ctrl_c_in_a_notebook_asks_for_a_stop_and_a_later_one_ends_at_once(pause, ends):
    with pytest.raises(ends), stop.saving():
        raise_signal(SIGINT)
        time.sleep(pause)
        raise_signal(SIGINT)  # at once, it is the same one, passed on
    assert getsignal(SIGINT) is default_int_handler


# ---- Where nothing is to be saved ------------------------------------------------------------


def has_ended(outcome, number):
    """Whether a signal has ended a command: by its default effect, or as a status."""
    status, _, complaint = outcome
    assert status in (-number, 128 + number), outcome
    assert "Traceback" not in complaint and complaint.count("\n") <= 1, complaint
    return True


@pytest.mark.slow  # eight starts, for 7 seconds
def test_every_mode_ends_in_its_first_second_and_one_that_saves_nothing_at_any_time(trained):
    modes = ["train", "evaluate", "summary", "operations", "check", "figures", "study", "benchmark"]
    numbers = [SIGINT, SIGTERM, SIGHUP, SIGINT, SIGTERM, SIGHUP, SIGINT, SIGTERM]
    run = trained("baseline")
    told = outcomes(
        *(
            (
                arguments(run, f"--mode={mode}", **FIELDS | {"train__updates": 10**5}),
                {"before": f"(sleep {0.1 + 2 * (mode == 'benchmark')}; kill -{number:d} $PPID) &"},
            )
            for mode, number in zip(modes, numbers, strict=True)
        )
    )
    assert all(map(has_ended, told, numbers))


# Runs main.py as it is, and sends this process SIGINT at its nth import.
INTERRUPTED = """
import itertools, os, sys
count, nth = itertools.count(1), int(sys.argv.pop())
hook = lambda step, _: step == "import" and next(count) == nth and os.kill(os.getpid(), 2)
sys.addaudithook(hook)
exec(compile(open("main.py").read(), "main.py", "exec"))
"""


@pytest.mark.parametrize(
    "nth", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 30, 500)), 8, 200]
)
def test_control_c_while_it_starts_is_one_line_or_nothing(nth):
    command = "-c", INTERRUPTED, "--config=configs/quickstart.py", "--mode=summary", nth
    with tiny.Process(*command) as run:
        assert has_ended((run.end(), "", run.complained()), SIGINT)
