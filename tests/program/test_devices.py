"""Several processes that train one model: they compute what one process does, and one writes."""

import contextlib
import os
import re
import signal
import socket

import numpy as np
import pytest
import tiny

import vnca.program.train
from vnca.program import VncaError, devices
from vnca.program.config import cores

MODEL = "nondoubling"  # it has all that the others have, and a pool
FIELDS = {"train__checkpoint_every": 1000, "eval__every": 1000}


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Pair:
    """Two processes with four devices each; both are killed at the end of the `with` statement."""

    def __init__(self, workdirs, **fields):
        port = free_port()
        self.members = [
            tiny.Command(
                f"--workdir={workdir}",
                f"--coordinator=localhost:{port}",
                "--processes=2",
                f"--process_id={number}",
                name=MODEL,
                devices=4,
                **(FIELDS | fields),
            )
            for number, workdir in enumerate(workdirs)
        ]

    def __enter__(self):
        return self.members

    def __exit__(self, *_):
        for member in self.members:
            member.__exit__()


def lines(text):
    """What it says, but for the lines of the library that connects the processes, whose threads
    write at once, so that a line break of one can stand alone."""
    ours = (line for line in text.splitlines() if "[Gloo]" not in line and "peer ranks" not in line)
    return [line for line in ours if line.strip()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes, stopped by a signal to the second, and five updates more."""
    folder = tmp_path_factory.mktemp("pair")
    workdirs, printed = [folder / "first", folder / "second"], []
    with Pair(workdirs, train__updates=1000) as (first, second):
        first.wait_for("/1,000  loss")
        second.process.send_signal(signal.SIGTERM)
        for member in (first, second):
            assert member.end() == 0, member.complained()
        printed.append([lines(member.printed()) for member in (first, second)])
    [stopped] = tiny.checkpoints(workdirs[0])
    with Pair(workdirs, train__updates=stopped + 5) as (first, second):
        for member in (first, second):
            assert member.end() == 0, member.complained()
        printed.append([lines(member.printed()) for member in (first, second)])
    return folder, stopped, printed


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """The same updates in this process, with its eight devices."""
    folder, (_, stopped, _) = tmp_path_factory.mktemp("alone"), pair
    with tiny.fast_compilation():
        vnca.program.train.train(
            tiny.config(MODEL, **FIELDS, train__updates=stopped + 5), folder, print
        )
    return folder


def test_two_processes_with_four_devices_train_like_one_with_eight(pair, alone):
    folder, stopped, _ = pair
    ours, theirs = tiny.metrics(alone), tiny.metrics(folder / "first")
    assert [record["update"] for record in theirs[0]] == list(range(1, stopped + 6))
    for our, their in zip(ours[0], theirs[0], strict=True):
        assert their == pytest.approx(our, rel=1e-4)
    assert theirs[1][-1] == pytest.approx(ours[1][-1], rel=1e-4)  # the test IWELBO
    one, other = (tiny.arrays(f, stopped + 5) for f in (alone, folder / "first"))
    for name in one:
        if name.startswith("params/"):
            np.testing.assert_allclose(other[name], one[name], atol=1e-4)


def test_a_signal_to_any_process_stops_all_at_the_same_update(pair):
    _, stopped, [(first, _), _] = pair
    assert 0 < stopped < 1000 and stopped % 3 == 0  # in whole calls
    assert first[-1].startswith(f"stopped at update {stopped} of 1,000")


def test_processes_resume_together(pair):
    folder, stopped, [_, (first, _)] = pair
    path = folder / "first" / f"checkpoint_{stopped:08d}.npz"
    assert f"resuming {path} at update {stopped}" in first
    assert tiny.checkpoints(folder / "first") == [stopped, stopped + 5]


def test_only_process_0_writes_and_prints(pair):
    folder, _, [(_, stopped), (_, resumed)] = pair
    assert not (folder / "second").exists()
    assert stopped == resumed == []


def test_a_mistake_that_process_0_finds_ends_every_process(tmp_path):
    (tmp_path / "file").touch()
    with Pair([tmp_path / "file" / "run", tmp_path / "second"], train__updates=3) as members:
        for member in members:
            assert member.end(timeout=60) == 1
            [complaint] = lines(member.complained())
            assert complaint.startswith("error: ") and str(tmp_path / "file" / "run") in complaint
    assert not (tmp_path / "second").exists()


def test_a_process_that_is_killed_ends_the_others_and_both_go_on_from_the_checkpoint(tmp_path):
    workdirs = [[tmp_path / str(killed) / str(n) for n in (0, 1)] for killed in (0, 1)]
    with contextlib.ExitStack() as stack:
        pairs = [
            stack.enter_context(Pair(w, train__updates=1000, train__checkpoint_every=3))
            for w in workdirs
        ]
        for killed, members in enumerate(pairs):
            members[0].wait_for("update 9/1,000")
            members[killed].process.kill()
        for killed, members in enumerate(pairs):
            survivor = members[1 - killed]
            assert survivor.end(timeout=150) not in (0, None)  # JAX's own time is 100 s
            assert "Terminating process" in survivor.complained() or lines(survivor.complained())[
                0
            ].startswith("error: another process is lost")
    for first, second in workdirs:
        last = tiny.checkpoints(first)[-1]
        with Pair([first, second], train__updates=last + 3) as members:
            for member in members:
                assert member.end() == 0, member.complained()
            assert f"at update {last}" in members[0].printed()
        assert [r["update"] for r in tiny.metrics(first)[0]] == list(range(1, last + 4))


@pytest.mark.parametrize(
    "given", [("localhost:1", None, None), (None, 2, 0), ("localhost:1", 2, None)]
)
def test_the_flags_of_several_processes_go_together(given):
    with pytest.raises(VncaError, match="--coordinator, --processes and --process_id"):
        devices.initialize(*given)


@pytest.mark.parametrize(
    ("count", "name", "batch", "expected"),
    [
        (2, "baseline", 16, 2),
        (3, "baseline", 16, 2),  # three would not divide it
        (64, "baseline", 16, 4),  # four images each
        (64, "baseline", 128, 8),
        (3, "baseline", 12, 3),
        (1, "baseline", 16, None),
        (2, "baseline", 4, None),
        (2, "nondoubling", 12, None),  # two would have to divide a quarter of it
    ],
)
def test_a_cpu_is_as_many_devices_as_have_work(monkeypatch, count, name, batch, expected):
    monkeypatch.setenv("XLA_FLAGS", "")  # put back at the end
    monkeypatch.setattr("vnca.program.devices.cores", lambda: count)
    config = tiny.config(name, train__batch_size=batch)
    devices.split_cpu(config)
    said = re.search(r"device_count=(\d+)", os.environ["XLA_FLAGS"])
    assert (said and int(said[1])) == expected


def test_what_the_environment_says_of_devices_stands(monkeypatch):
    monkeypatch.setattr("vnca.program.devices.cores", lambda: 2)
    for said in (
        "--xla_force_host_platform_device_count=1 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=60",
        "flags.txt",
    ):
        monkeypatch.setenv("XLA_FLAGS", said)
        devices.split_cpu(tiny.config("baseline", train__batch_size=16))
        assert os.environ["XLA_FLAGS"] == said


def test_the_program_starts_with_the_devices_that_it_has_chosen(tmp_path):
    chosen = {1: "the device", 2: "each of 2 devices", 3: "each of 2 devices"}
    arguments = "--config=configs/quickstart.py", "--mode=summary", f"--workdir={tmp_path}"
    with tiny.Process("main.py", *arguments, XLA_FLAGS="") as program:
        assert program.end() == 0, program.complained()
        assert f"memory of {chosen.get(cores(), 'each of 4 devices')}" in program.printed()
        assert program.complained() == ""
