"""Several processes that train one model: together they compute what one does, the first writes,
and none goes on alone."""

import contextlib
import os
import random
import re
import signal
import socket

import numpy as np
import pytest
import tiny

pytestmark = pytest.mark.slow  # two processes that compile, for 8 seconds or more
MODEL = "nondoubling"  # it has all that the others have, and a pool
FIELDS = {"train__checkpoint_every": 1000, "eval__every": 1000}
# Of the threads of the library that connects the processes, which write at once, so that a line
# break of one, or the number before it, can stand alone.
GLOO = re.compile(r".*(\[Gloo\]|peer ranks|connected)|[\d\s]*$")
LOWEST = 65535 - 2**12 + 1  # of the ports that JAX makes of the numbers of Slurm's jobs
# Each is given once, since a process binds its own long after it was found. The order is random, so
# that two test runs on one machine seldom meet.
PORTS = iter(random.Random(os.getpid()).sample(range(LOWEST, 65536), 2**12))
# main.py in a process that ends if it opens a file of the workdir, its last argument, to write.
READS_ONLY = """
import os
def refuse(step, paths):
    if step == "open" and str(paths[0]).startswith(workdir) and paths[2] & os.O_CREAT:
        os._exit(99)
workdir = sys.argv[-1].partition("=")[2]
sys.addaudithook(refuse)
if status := main.main(sys.argv):
    os._exit(status)
sys.exit()
"""


def free_port():
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


def by_hand(number, port):
    """The flags of one of two processes, and its environment: none."""
    return [f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={number}"], {}


def by_slurm(number, port):
    """The flags of one of two tasks, and its environment, as Slurm sets it."""
    return ["--coordinator=auto"], {
        "SLURM_JOB_ID": str(port - LOWEST),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "SLURM_STEP_NUM_NODES": "1",
    }


@contextlib.contextmanager
def pair(workdir, *also, join=by_hand, differing=((), ()), **fields):
    """Two processes with four devices each, which do not outlive the `with`. differing: further
    flags of each."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        members = []
        for number in (0, 1):
            flags, environment = join(number, port)
            command = tiny.Command(
                *flags, *also, f"--workdir={workdir}", *differing[number], name=MODEL, devices=4,
                before=READS_ONLY if number else "", environment=environment, **FIELDS | fields,
            )  # fmt: skip
            members.append(stack.enter_context(command))
        yield members


def lines(text):
    """What it says, but for what connects the processes."""
    return [line for line in text.splitlines() if not GLOO.match(line)]


def end_alike(members, status=0, timeout=300):
    """Waits until both have ended with this status."""
    for member in members:
        assert member.end(timeout) == status, member.complained()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, update at which a signal to the second process stopped the run, what each printed
    then and in five updates more, by processes that Slurm starts)."""
    workdir, printed = tmp_path_factory.mktemp("pair") / "run", []
    with pair(workdir, train__updates=1000) as members:
        members[0].wait_for("/1,000  loss")
        members[1].process.send_signal(signal.SIGTERM)
        end_alike(members, 143)
        printed += [lines(member.printed()) for member in members]
    [stopped] = tiny.checkpoints(workdir)
    with pytest.MonkeyPatch.context() as patch:
        tiny.leave_cluster(patch)
        with pair(workdir, join=by_slurm, train__updates=stopped + 5) as members:
            end_alike(members)
            printed += [lines(member.printed()) for member in members]
    return workdir, stopped, printed


def test_two_processes_with_four_devices_train_like_one_with_eight(trained, tmp_path):
    workdir, stopped, _ = trained
    fields = FIELDS | {"train__updates": stopped + 5}
    with tiny.Command(f"--workdir={tmp_path}", name=MODEL, devices=8, **fields) as run:
        end_alike([run])
    ours, theirs = (sum(tiny.metrics(folder), []) for folder in (tmp_path, workdir))
    assert len(theirs) == stopped + 6  # and one test IWELBO
    for our, their in zip(ours, theirs, strict=True):
        assert their == pytest.approx(our, rel=1e-4)
    one, other = (tiny.arrays(folder, stopped + 5) for folder in (tmp_path, workdir))
    for name in one:
        if name.startswith(("params/", "pool/i")):
            np.testing.assert_allclose(other[name], one[name], atol=1e-4)


def test_a_signal_to_any_process_stops_all_and_they_resume_together(trained):
    workdir, stopped, [first, second, again, second_again] = trained
    assert 0 < stopped < 1000 and stopped % 3 == 0  # in whole calls
    assert first[-1].startswith(f"stopped at update {stopped} of 1,000")
    assert any(f"{stopped:08d}.npz at update {stopped}; config.train.upd" in line for line in again)
    for said in first, again:  # joined by hand, and by Slurm
        assert "8 × cpu" in said[0]
    assert second == second_again == []  # only the first process prints, and READS_ONLY: writes


@pytest.mark.parametrize("differs", ["a flag", "a checkpoint"])
def test_processes_with_other_flags_or_checkpoints_end_with_a_line_each(trained, tmp_path, differs):
    theirs = {"a flag": "--config.seed=1", "a checkpoint": f"--workdir={trained[0]}"}[differs]
    with pair(tmp_path, differing=([], [theirs]), train__updates=1000) as members:
        end_alike(members, 1, 60)
        for member in members:
            assert lines(member.complained())[0].startswith("error: "), member.complained()
            assert "Traceback" not in member.complained()
    assert not tiny.checkpoints(tmp_path)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other_and_both_go_on_from_the_checkpoint(
    tmp_path, killed
):
    fields = {"train__checkpoint_every": 3}
    with pair(tmp_path, train__updates=1000, **fields) as members:
        members[0].wait_for("/1,000  loss")
        while not tiny.checkpoints(tmp_path):
            assert members[0].process.poll() is None, members[0].complained()
        members[killed].process.kill()
        assert members[1 - killed].end(timeout=150) != 0
        assert "Traceback" not in members[1 - killed].complained()
    last = tiny.checkpoints(tmp_path)[-1]
    with pair(tmp_path, train__updates=last + 3, **fields) as members:
        end_alike(members)
        assert f"at update {last}" in members[0].printed()
    assert [r["update"] for r in tiny.metrics(tmp_path)[0]] == list(range(1, last + 4))
