"""Signals that ask for an end: training, evaluation and study save their work first, all else ends
at once, and the exit status names the signal."""

import shutil
from signal import SIGHUP, SIGINT, SIGTERM, Signals

import pytest
import tiny
from fates import arguments, is_one_line, outcomes

FIELDS = {"train__updates": 24, "train__checkpoint_every": 6, "eval__every": 6}
LAST = "checkpoint_00000024.npz"
AT_A_CHECKPOINT = {"steps": ["os.rename"], "path": "checkpoint_00000006", "kill": False}
# Of a mode that saves its work: what its first file to save has in its name, how many images it
# takes, and what it makes in the end.
SAVING = {
    "train": ("checkpoint_00000006", None, [LAST, "metrics.jsonl", "samples.png"]),
    "evaluate": ("evaluation.partial", 300, ["evaluation.json"]),
    "study": ("study.partial", 4, ["study.json"]),
}
QUICK = [("train", SIGTERM), ("evaluate", SIGINT)]  # each costs some seconds
ALL = [(mode, number) for mode in SAVING for number in (SIGINT, SIGTERM, SIGHUP)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run that nothing befell."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert outcomes((arguments(workdir, **FIELDS), {}))[0][0] == 0
    return workdir


@pytest.mark.parametrize(
    "mode, number",
    [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL if c not in QUICK)],
)
def test_a_signal_saves_the_work_and_the_same_command_goes_on_to_the_same_bytes(
    trained, tmp_path, mode, number
):
    path, images, files = SAVING[mode]
    fields = FIELDS | {"eval__images": images, "eval__samples": 1, "eval__chunk": 1}
    runs = [tmp_path / "run", tmp_path / "straight"]
    if mode != "train":
        runs = [shutil.copytree(trained, run) for run in runs]
    one, other = (arguments(run, f"--mode={mode}", **fields) for run in runs)
    # It comes twice, as a wrapper passes it on, and is heard in a pause, so at a time that is known
    # for training alone.
    twice = {"signals": [(0.1, number), (0.3, number)], "pause": 0.6 * (mode == "train")}
    stopped, resumed, straight = outcomes(
        (one, AT_A_CHECKPOINT | {"path": path} | twice), (one, {}), (other, {})
    )
    assert (stopped[0], stopped[2]) == (128 + number, "")
    assert f"{Signals(number).name}: stopping after this device call" in stopped[1]
    assert "run the same command again to resume" in stopped[1].splitlines()[-1]
    assert resumed[0] == straight[0] == 0, resumed
    assert "resuming " in resumed[1] or " before" in resumed[1]
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
        *((arguments(folder / name, **FIELDS), AT_A_CHECKPOINT | fates[name]) for name in fates)
    )
    return {name: (folder / name, outcome) for name, outcome in zip(fates, told, strict=True)}


def test_a_second_signal_ends_the_program_at_once(befallen):
    _, (status, out, complaint) = befallen["a later one"]
    assert (status, complaint) == (130, "")  # after 1.5 of the 50 seconds that a write takes
    assert "SIGTERM: stopping" in out and "stopped at update" not in out


@pytest.mark.parametrize("fate, status", [("at the end", 129), ("ignored", 0)])  # by nohup or a &
def test_the_status_names_the_signal_that_came_too_late_but_no_ignored_one(befallen, fate, status):
    workdir, (found, out, complaint) = befallen[fate]
    assert (found, complaint) == (status, "") and "done;" in out and (workdir / LAST).exists()
    assert ("stopping" in out) == (fate == "at the end")


def test_output_that_is_lost_asks_for_a_stop(befallen):
    assert is_one_line(befallen["lost output"][1], "standard output", "Bad file descriptor")
    assert befallen["lost connection"][1][::2] == [129, ""]
    for folder, _ in (befallen["lost output"], befallen["lost connection"]):
        newest = tiny.checkpoints(folder)[-1]
        assert 6 <= newest < 24 and len(tiny.metrics(folder)[0]) == newest


# ---- Where nothing is to be saved ------------------------------------------------------------


def has_ended(outcome, number):
    """Whether a signal has ended a command: by its default effect, or as a status."""
    status, _, complaint = outcome
    assert status in (-number, 128 + number), outcome
    assert "Traceback" not in complaint and complaint.count("\n") <= 1, complaint
    return True


def test_every_mode_ends_in_its_first_second_and_one_that_saves_nothing_at_any_time(trained):
    times = {
        "train": 0.3, "evaluate": 0.3, "summary": 0.3, "operations": 0.3, "check": 0.3,
        "figures": 0.3, "study": 0.3, "benchmark": 3,
    }  # fmt: skip
    numbers = [(SIGINT, SIGTERM, SIGHUP)[n % 3] for n in range(len(times))]
    told = outcomes(
        *(
            (
                arguments(trained, f"--mode={mode}", **FIELDS | {"train__updates": 10**5}),
                {"before": f"(sleep {times[mode]}; kill -{number:d} $PPID) &"},
            )
            for mode, number in zip(times, numbers, strict=True)
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


@pytest.mark.parametrize("nth", [1, 2, 4, 8, 30, 200, 500])
def test_control_c_while_it_starts_is_one_line_or_nothing(nth):
    command = "-c", INTERRUPTED, "--config=configs/quickstart.py", "--mode=summary", nth
    with tiny.Process(*command) as run:
        assert has_ended((run.end(), "", run.complained()), SIGINT)
