"""Several processes that train one model: they compute what one process does, and one writes."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket

import jax
import numpy as np
import pytest
import tiny

import vnca.program.train
from vnca.program import VncaError, evaluate, hosts

MODEL = "nondoubling"  # it has all that the others have, and a pool
FIELDS = {"train__checkpoint_every": 1000, "eval__every": 1000}


# While process 0 compiles what draws the pictures, JAX lets the other wait for 30 seconds.
ONE_PICTURE = (
    "from vnca.report import figures\n"
    "figures.training_pictures = lambda *given: {'samples': figures.samples(*given)}"
)
GLOO = re.compile(r".*(\[Gloo\]|peer ranks|connected)|[\d\s]*$")
LOWEST = 65535 - 2**12 + 1  # of the ports that JAX makes of the numbers of Slurm's jobs
# Each is given once, since a process binds its own long after it was found. The order is random, so
# that two test runs on one machine seldom meet.
PORTS = iter(random.Random(os.getpid()).sample(range(LOWEST, 65536), 2**12))


def free_port():
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


def by_hand(workdir, number, port):
    """The flags of one of two processes, and its environment: none."""
    flags = f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={number}"
    return (f"--workdir={workdir}", *flags), {}


def by_slurm(workdir, number, port):
    """The flags of one of two tasks, and its environment, as Slurm sets it."""
    return (f"--workdir={workdir}", "--coordinator=auto"), {
        "SLURM_JOB_ID": str(port - LOWEST),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "SLURM_STEP_NUM_NODES": "1",
    }


class Pair:
    """Two processes, of four devices unless told, which are killed at the end of the `with`.
    before: a program for each to run first; also: further flags."""

    def __init__(
        self, workdirs, join=by_hand, before=("", ""), name=MODEL, devices=4, also=(), **fields
    ):
        port = free_port()
        self.members = []
        for number, workdir in enumerate(workdirs):
            flags, environment = join(workdir, number, port)
            self.members.append(
                tiny.Command(
                    *flags,
                    *also,
                    name=name,
                    devices=devices,
                    before=before[number],
                    environment=environment,
                    **(FIELDS | fields),
                )
            )

    def __enter__(self):
        return self.members

    def __exit__(self, *_):
        for member in self.members:
            member.__exit__()


def lines(text):
    """What it says, but for the lines of the library that connects the processes, whose threads
    write at once, so that a line break of one, or the number before it, can stand alone."""
    return [line for line in text.splitlines() if not GLOO.match(line)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes, stopped by a signal to the second, and five updates more, of two
    that Slurm starts."""
    folder = tmp_path_factory.mktemp("pair")
    workdirs, printed = [folder / "first", folder / "second"], []
    with Pair(workdirs, train__updates=1000) as (first, second):
        first.wait_for("/1,000  loss")
        second.process.send_signal(signal.SIGTERM)
        for member in (first, second):
            assert member.end() == 143, member.complained()
        printed.append([lines(member.printed()) for member in (first, second)])
    [stopped] = tiny.checkpoints(workdirs[0])
    with pytest.MonkeyPatch.context() as patch:
        tiny.leave_cluster(patch)
        members = Pair(workdirs, by_slurm, [ONE_PICTURE] * 2, train__updates=stopped + 5)
    with members as (first, second):
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
            tiny.config(MODEL, **FIELDS, train__updates=stopped + 5), folder, print, lambda *_: {}
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
    changed = f"config.train.updates is {stopped + 5}, was 1000"
    assert f"resuming {path} at update {stopped}; {changed}" in first
    assert tiny.checkpoints(folder / "first") == [stopped, stopped + 5]


def test_slurm_brings_its_processes_together(pair):
    _, _, printed = pair
    for first, _ in printed:  # joined by hand, and by Slurm
        assert "8 × cpu" in first[0] and "on 2 hosts" in first[0]


def test_only_process_0_writes_and_prints(pair):
    folder, _, [(_, stopped), (_, resumed)] = pair
    assert not (folder / "second").exists()
    assert [path.name for path in (folder / "first").glob("*.png")] == ["samples.png"]
    assert stopped == resumed == []


@pytest.mark.slow
def test_two_processes_evaluate_like_one_and_go_on_from_what_the_first_has_kept(pair, tmp_path):
    folder, *_ = pair
    one = shutil.copytree(folder / "first", tmp_path / "one")
    two = shutil.copytree(folder / "first", tmp_path / "two")
    fields = {"eval__samples": 2, "eval__chunk": 2}
    for images in 16, 21:
        with Pair(
            [two, tmp_path / "second"], also=["--mode=evaluate"], eval__images=images, **fields
        ) as members:
            for member in members:
                assert member.end() == 0, member.complained()
    assert "16 images were evaluated before" in members[0].printed()
    config = tiny.config(MODEL, **FIELDS, eval__images=21, **fields)
    with tiny.fast_compilation():
        evaluate.evaluate(config, one, print, None)
    found, wanted = (json.loads((f / "evaluation.json").read_text()) for f in (two, one))
    assert found["images"] == 21 and not (tmp_path / "second").exists()
    for name in "iwelbo", "stderr", "reconstruction", "kl":
        assert found[name] == pytest.approx(wanted[name], rel=1e-4)


@pytest.mark.slow
def test_a_mistake_that_process_0_finds_ends_every_process(tmp_path):
    (tmp_path / "file").touch()
    with Pair([tmp_path / "file" / "run", tmp_path / "second"], train__updates=3) as members:
        for member in members:
            assert member.end(timeout=60) == 1
            [complaint] = lines(member.complained())
            assert complaint.startswith("error: ") and str(tmp_path / "file" / "run") in complaint
    assert not (tmp_path / "second").exists()


# Device calls that wait for those of the other process, as updates do, and compile in a moment.
CALLS = """
import jax, jax.numpy as jnp, numpy as np
from vnca.program import train
from vnca.training import State
together = jax.pmap(lambda x: jax.lax.psum(x, "devices"), "devices")
def call(state, images, order, count):
    values = together(np.ones((jax.local_device_count(), 3, 4), np.float32)).addressable_data(0)[0]
    return state._replace(update=state.update + count), values
train.init_state = lambda *_: State({"weight": jnp.ones(3)}, {}, jnp.int32(0), ())
train.make_update_call = lambda *_: call
"""
FAULT = """
def deal(config, first, *_):
    if first > 4: raise ValueError('of ours')
    return given(config, first, *_)
given, train.deal = train.deal, deal
"""


@pytest.mark.parametrize("number", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_any_fault_of_one_process_ends_both(tmp_path, number):
    before = [CALLS, CALLS]
    before[number] += FAULT
    workdirs = tmp_path / "first", tmp_path / "second"
    # With one device each and no pool, the other is told by a lost connection: it need not wait
    # until JAX misses a heartbeat.
    sizes = {"name": "baseline", "devices": 1}
    with Pair(workdirs, before=before, **sizes, train__updates=100_000) as members:
        assert members[number].end() == 1, members[number].complained()
        assert "of ours" in members[number].complained()
        assert members[1 - number].end() != 0


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "fault, words",
    [
        (VncaError("no room\nat all"), "error: no room at all\n"),
        *(
            (jax.errors.JaxRuntimeError(f"{word}: gone\nfar"), "error: another process is lost ")
            for word in ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "NCCL", "Gloo")
        ),
        (ValueError("UNKNOWN: Gloo all-reduce failed"), "error: another process is lost "),
        (jax.errors.JaxRuntimeError("INTERNAL: a fault"), "Traceback "),
        (ValueError("a fault"), "Traceback "),
        (KeyboardInterrupt(), "interrupted\n"),
    ],
)
def test_one_of_several_processes_says_why_and_ends_outright(
    fault, words, number, monkeypatch, capsys
):
    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    slept = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: number)
    monkeypatch.setattr(hosts.os, "_exit", end)
    monkeypatch.setattr(hosts.time, "sleep", slept.append)
    status = 130 if isinstance(fault, KeyboardInterrupt) else 1
    with pytest.raises(Ended, match=f"^{status}$"), hosts.ends_for_all():
        raise fault
    assert capsys.readouterr().err.startswith(words)
    if isinstance(fault, VncaError):  # process 0, whose end aborts the others, goes last
        assert slept == [3 if number else 5]
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    with pytest.raises(type(fault)), hosts.ends_for_all():
        raise fault


def test_a_device_without_memory_costs_a_line_that_says_what_to_lower():
    words = "lower config.train.micro_batch .* config.eval.chunk"
    with pytest.raises(VncaError, match=words), hosts.ends_for_all():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 GB")


@pytest.mark.parametrize(
    "fault, words",
    [
        ("UNKNOWN: Failed to start RPC server", "Its port may be in use on this host"),
        ("DEADLINE_EXCEEDED", "Check that process 0 is running"),
    ],
)
def test_processes_that_cannot_meet_are_told_what_to_check(monkeypatch, fault, words):
    def fail(*_):
        raise RuntimeError(f"{fault}\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(VncaError, match=words) as caught:
        hosts.initialize("host0:1234", 2, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_heard_after_processes_have_met(number, tmp_path):
    before = f"""
import os, time
from vnca.program import machine
find = machine.find_devices
machine.find_devices = lambda: find() or os.kill(os.getpid(), {int(number)}) or time.sleep(5)
"""
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=1", "--process_id=0"]
    flags += ["--config=configs/quickstart.py", "--mode=summary", f"--workdir={tmp_path}"]
    [(status, out, _)] = tiny.outcomes([flags], before)
    assert status == 128 + number and not out


@pytest.mark.slow  # JAX misses a heartbeat for 100 s before it acts
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
            # JAX's threads may log that they lost it before the program says what that means.
            complaint = survivor.complained()
            assert "Terminating process" in complaint or any(
                line.startswith("error: another process is lost") for line in lines(complaint)
            ), complaint
            assert "Traceback" not in complaint
    for first, second in workdirs:
        last = tiny.checkpoints(first)[-1]
        with Pair([first, second], train__updates=last + 3) as members:
            for member in members:
                assert member.end() == 0, member.complained()
            assert f"at update {last}" in members[0].printed()
        assert [r["update"] for r in tiny.metrics(first)[0]] == list(range(1, last + 4))
