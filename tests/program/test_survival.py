"""A run that is killed, or whose storage fails or is damaged, is not lost: whatever happens, the
same command goes on to the same bytes.

By default every tenth step of the storage fails. With VNCA_KILLS=30 (of each model) and
VNCA_CALLS=2000 (device calls of the long run), the slow tests make all attacks. With these, memory
grew by 14.5 MB over the last 1,800 calls.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import main
import vnca.report.benchmark  # noqa: F401  (all that main imports, before any fork)
from vnca.program import checkpoint, data, files, metrics, train
from vnca.training import State

KILLS = int(os.environ.get("VNCA_KILLS", 2))
CALLS = int(os.environ.get("VNCA_CALLS", 100))
KEPT = {"baseline": 3, "doubling": 3, "nondoubling": 2}
SETTINGS = {"train__updates": 24, "train__checkpoint_every": 6, "eval__every": 12}
# What a kill hits: a step, the file's name, and up to which time that it comes.
MOMENTS = {
    "in a checkpoint": ("write", "checkpoint", 1000),
    "before its rename": ("replace", "checkpoint", 3),
    "before pruning": ("replaced", "checkpoint", 4),
    "in a picture": ("write", ".png", 4),
    "in the metrics": ("write", "metrics", 9),
    "between calls": ("call", "", 9),
    "at the start": None,  # by a clock, as in the next
    "at any time": None,
}


class Watched:
    """A file each of whose writes is announced."""

    def __init__(self, file, announce):
        self.file, self.announce = file, announce

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *fault):
        return self.file.__exit__(*fault)

    def write(self, content):
        self.announce("write", self.name, self.file, bytes(content))
        return self.file.write(content)

    def writelines(self, lines):
        self.write(b"".join(lines))


def watch(announce, patch=setattr):
    """Has announce(step, path, …) called before each step to the storage, and after a rename."""
    temporary, fsync, replace = files.tempfile.NamedTemporaryFile, os.fsync, os.replace
    read, deal = Path.read_bytes, train.deal

    def announced(step, path, do):
        announce(step, str(path))
        return do()

    def rename(old, new):
        announced("replace", new, lambda: replace(old, new))
        announce("replaced", str(new))

    def make(**how):
        return announced("make", how["dir"], lambda: Watched(temporary(**how), announce))

    def append(path, mode):
        return announced("open", path, lambda: Watched(open(path, mode), announce))

    def sync(file):
        name = f"/proc/self/fd/{file}"  # on Linux
        name = os.readlink(name) if os.path.exists(name) else f"file {file}"
        return announced("sync", name, lambda: fsync(file))

    patch(files.tempfile, "NamedTemporaryFile", make)
    patch(metrics, "open", append, **({} if patch is setattr else {"raising": False}))
    patch(os, "fsync", sync)
    patch(os, "replace", rename)
    patch(Path, "read_bytes", lambda path: announced("read", path, lambda: read(path)))
    patch(train, "deal", lambda *a: announced("call", "", lambda: deal(*a)))


# ---- Killed, and started again ---------------------------------------------------------------


def serve():
    """Runs main.main for each request, a line of JSON, in a fork of this process, which has
    imported it all and started nothing; answers with what waitpid says."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            answer(**request)
        if request.get("seconds"):
            time.sleep(request["seconds"])
            os.kill(child, signal.SIGKILL)
        print(os.waitpid(child, 0)[1], flush=True)


def answer(argv, out, step=None, name="", nth=0, cut=0, keep=None, notes=None, seconds=None):
    """Runs main.main in this process, which at the nth such step is killed."""
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    train.KEEP_CHECKPOINTS = keep or train.KEEP_CHECKPOINTS
    count = 0

    def announce(what, path, file=None, content=b""):
        nonlocal count
        if notes and what == "call":
            note(notes, argv)
        count += what == step and name in path
        if count == nth and what == step and name in path:
            if file:
                file.write(content[: int(cut * len(content))])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    watch(announce)
    status = main.main(argv)
    sys.stdout.flush()
    os._exit(status)


def note(notes, argv):
    """Appends what the process and its workdir hold: pages of memory, open files, sizes."""
    workdir = Path(argv[-1])
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    sizes = {path.name: path.stat().st_size for path in workdir.glob("[!.]*")}
    with open(notes, "a") as file:
        file.write(json.dumps([pages, len(os.listdir("/proc/self/fd")), sizes]) + "\n")


@pytest.fixture(scope="module")
def run():
    """Trains in a process of its own: run(workdir, model, fields, **what befalls it) -> status."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # As a tiny.Command compiles.
        "XLA_FLAGS": f"{tiny.EMITTERS} --xla_force_host_platform_device_count=1",
        "PYTHONPATH": os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests")]),
    }
    server = subprocess.Popen(
        [sys.executable, __file__], cwd=tiny.ROOT, env=os.environ | environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def run(workdir, model, fields, **request):
        fields = tiny.settings(model, **fields)
        argv = ["main.py", f"--config=configs/{model}.py"]
        argv += [f"--config.{field}={value}" for field, value in fields.items()]
        argv += ["--workdir", str(workdir)]
        request |= {"argv": argv, "out": f"{workdir}.out"}
        print(json.dumps(request), file=server.stdin, flush=True)
        return int(server.stdout.readline())

    with server:
        yield run
        server.stdin.close()


def contents(workdir):
    """Each file's bytes, but for the one that says which process has the workdir."""
    files = Path(workdir).iterdir()
    return {path.name: path.read_bytes() for path in files if path.name != ".lock"}


def is_part_of(workdir, whole, before):
    """Whether a killed run has lost nothing; returns the update of its newest checkpoint."""
    if not workdir.exists():
        return 0
    complaints = []
    found = checkpoint.newest(workdir, complaints.append)
    done = int(found[0].stem.split("_")[1]) if found else 0
    assert done >= before and not complaints
    files = contents(workdir)
    for name in files:
        if name.startswith("checkpoint"):
            assert files[name] == whole[name], name
    if done:
        records = whole["metrics.jsonl"].splitlines(keepends=True)
        kept = b"".join(line for line in records if json.loads(line)["update"] <= done)
        assert files["metrics.jsonl"].startswith(kept)
    return done


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """straight(model): the workdir of a run that nothing befell, with every checkpoint."""

    @cache
    def straight(model):
        workdir = tmp_path_factory.mktemp(model) / "straight"
        assert run(workdir, model, SETTINGS, keep=100) == 0
        return workdir

    return straight


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, kills_asked",
    [(m, KILLS) for m in KEPT],
)
def test_a_run_that_is_killed_at_any_moment_ends_in_the_same_bytes(
    run, straight, tmp_path, model, kills_asked, capsys
):  # fmt: skip
    began = time.monotonic()
    whole = contents(straight(model))
    updates, tests = tiny.metrics(straight(model))
    assert [record["update"] for record in updates] == list(range(1, 25))
    assert [record["update"] for record in tests] == [12, 24]
    names = sorted(name for name in whole if name.startswith("checkpoint"))
    wanted = {name: whole[name] for name in whole if name not in names[: -KEPT[model]]}
    length = (time.monotonic() - began) / 2  # of a start that finds all compiled

    seed = [*KEPT].index(model)
    chance, tally, done, runs, log = random.Random(seed), dict.fromkeys(MOMENTS, 0), 0, 0, []
    while True:
        workdir = tmp_path / f"run{runs}"
        kills = sum(tally.values())
        fate = {}
        if kills < kills_asked:
            moment = [*MOMENTS][(kills + seed * 3) % len(MOMENTS)]
            fate = {"seconds": chance.uniform(0.01, 2 if moment == "at the start" else length)}
            if MOMENTS[moment]:
                step, name, most = MOMENTS[moment]
                nth = chance.randint(1, most)
                fate = {"step": step, "name": name, "nth": nth, "cut": chance.random()}
        status = run(workdir, model, SETTINGS, **fate)
        log.append((workdir.name, moment if fate else "to the end", fate, status))
        try:
            if status == signal.SIGKILL:
                tally[moment] += 1
                done = is_part_of(workdir, whole, done)
                continue
            # It came to its end before its fate; the next kills are of a new run.
            assert status == 0, Path(f"{workdir}.out").read_text()
            assert contents(workdir) == wanted
        except BaseException:
            print(f"seed {seed}:", *log, sep="\n")
            raise
        done, runs = 0, runs + 1
        if not fate:
            break
    with capsys.disabled():
        if "VNCA_KILLS" in os.environ:
            print(f"\n{model}: {tally}, {runs} runs, {time.monotonic() - began:.0f} s")


# ---- Storage that fails ----------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capfd):
    """command(workdir, updates) -> exit status and complaints of main.main, with all of its files
    and without its arithmetic, so that hundreds of starts take seconds."""

    def init_state(*_):
        weights = {"weights": jnp.arange(2000.0)}
        return State(weights, weights, jnp.int32(0), pool=())

    def make_update_call(*_):
        def call(state, images, order, count):
            values = np.full((4, 3), state.update + 1 + np.arange(3), np.float32).T
            return jax.tree.map(lambda x: x + x.dtype.type(count), state), values

        return call

    bundled = data.load("bundled")
    replaced = {
        "program.train.init_state": init_state,
        "program.train.make_update_call": make_update_call,
        "program.train.image_bounds": lambda *_: [np.ones((1, 3))],
        "report.figures.training_pictures": lambda *_: dict.fromkeys(["samples", "growth"], b"PNG"),
        "program.machine.update_flops": lambda _: 1e6,
        "program.workdir.load": lambda *_, **__: bundled,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(f"vnca.{name}", value)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is lost here, and disks are slow
    flags = ["TOPOLOGY", "COORDINATOR", "PROCESSES", "PROCESS_ID", "CHECKPOINT", "PLAIN"]
    flags = dict.fromkeys(flags) | {"MODE": "train"}

    def command(workdir, updates=15):
        fields = {"train__updates": updates, "train__checkpoint_every": 3, "eval__every": 6}
        for name, value in {
            **flags, "WORKDIR": str(workdir), "CONFIG": tiny.config(**fields)
        }.items():  # fmt: skip
            monkeypatch.setattr(main, name, SimpleNamespace(value=value))
        monkeypatch.setattr(main, "parse", lambda *_: None)
        capfd.readouterr()
        return main.main([]), capfd.readouterr().err

    kept = signal.getsignal(signal.SIGTERM)
    yield command
    signal.signal(signal.SIGTERM, kept)


def check_refusal(status, complaint, workdir, code, whole):
    """One line names a file, and every checkpoint is whole."""
    assert status == 1 and complaint.count("\n") == 1, complaint
    assert f"{workdir}/" in complaint and os.strerror(code) in complaint
    files = contents(workdir)
    assert not [name for name in files if name.endswith(".tmp")]
    for name in files:
        assert not name.startswith("checkpoint") or files[name] == whole[name], name


# Each step gets one of the errors, or, where much is to be tried, each.
@pytest.mark.parametrize(
    "every, shift",
    [
        (10, 0),
        *(pytest.param(1, n, marks=pytest.mark.slow) for n in range(3 if KILLS >= 30 else 1)),
    ],
)
def test_storage_that_fails_at_any_step_costs_a_line_and_nothing_else(
    command, tmp_path, monkeypatch, every, shift
):
    assert command(tmp_path / "half", 9)[0] == 0
    wanted = shutil.copytree(tmp_path / "half", tmp_path / "wanted")
    assert command(wanted)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "KEEP_CHECKPOINTS", 100)
        assert [command(tmp_path / "whole", updates)[0] for updates in (9, 15)] == [0, 0]
    whole = contents(tmp_path / "whole")
    failing = 1 - every
    while True:
        failing += every
        code = [errno.ENOSPC, errno.EROFS, errno.EIO][(failing + shift) % 3]
        workdir = shutil.copytree(tmp_path / "half", tmp_path / f"run{failing}")
        count = 0

        def announce(step, path, file=None, content=b""):
            nonlocal count
            if not path.startswith(str(workdir)) or step in ("call", "replaced"):  # noqa: B023
                return
            count += 1
            if count == failing:  # noqa: B023
                if file:
                    file.write(content[: len(content) // 2])
                raise OSError(code, os.strerror(code))  # noqa: B023

        with monkeypatch.context() as patch:
            watch(announce, patch.setattr)
            status, complaint = command(workdir)
        if count < failing:
            assert status == 0
            break
        check_refusal(status, complaint, workdir, code, whole)
        assert len(tiny.checkpoints(workdir)) >= 3
        assert command(workdir)[0] == 0
        assert contents(workdir) == contents(wanted)
        shutil.rmtree(workdir)
    assert failing > 100


def test_a_disk_that_is_full_costs_a_line_until_it_has_room(command, tmp_path, monkeypatch):
    def mount(size, *how):
        with_size = ["mount", *how, "-o", f"{'remount,' if not how else ''}size={size}k"]
        return subprocess.run([*with_size, tmp_path / "disk"], capture_output=True, text=True)

    (tmp_path / "disk").mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no program `mount`")
    if (found := mount(4, "-t", "tmpfs", "tmpfs")).returncode:
        pytest.skip(f"no disk can be mounted here: {found.stderr.strip()}")
    try:
        workdir = tmp_path / "disk" / "run"
        assert command(tmp_path / "wanted")[0] == 0
        with monkeypatch.context() as patch:
            patch.setattr(train, "KEEP_CHECKPOINTS", 100)
            assert command(tmp_path / "whole")[0] == 0
        whole, size = contents(tmp_path / "whole"), 4
        while (answer := command(workdir))[0]:
            check_refusal(*answer, workdir, errno.ENOSPC, whole)
            size += 4
            assert not mount(size).returncode
        assert size > 60 and contents(workdir) == contents(tmp_path / "wanted")
    finally:
        subprocess.run(["umount", tmp_path / "disk"])


# ---- Files that are damaged ------------------------------------------------------------------


CONFIG = tiny.config().to_dict()


def small_state(update):
    return State({}, {}, np.int32(update), pool=())


def test_a_checkpoint_that_is_cut_or_has_a_bit_flipped_never_loads_as_another(straight, tmp_path):
    old = checkpoint.save(tmp_path, small_state(18), CONFIG, keep=3)  # small, so soon read
    new = Path(shutil.copy(straight("baseline") / "checkpoint_00000024.npz", tmp_path))
    content, chance = new.read_bytes(), random.Random(0)
    arrays = tiny.arrays(tmp_path, 24)
    config = json.loads(str(arrays.pop("config")))
    del arrays["format"], arrays["sha256"]
    # A header's length is where one bit can shift an array that is too large for one read.
    large = max(arrays, key=lambda name: arrays[name].nbytes)
    header = content.index(b"\x93NUMPY", content.index(f"{large}.npy".encode()))
    bits = [*range(8 * header + 64, 8 * header + 80)]
    bits += [chance.randrange(8 * len(content)) for _ in range(200)]
    spoilt = [content[:length] for length in range(0, len(content), 1024)]
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        spoilt.append(bytes(flipped))
    harmless = 0
    for number, damaged in enumerate(spoilt):
        new.write_bytes(damaged)
        complaints = []
        found, saved, restore = checkpoint.newest(tmp_path, complaints.append)
        if found == old:
            assert len(complaints) == 1 and f"{new} is damaged" in complaints[0]
            continue
        harmless += 1
        assert not complaints and saved == config, number
        for name, array in restore(arrays).items():
            np.testing.assert_array_equal(array, arrays[name], f"{number}: {name}")
    assert harmless < len(bits) / 2


def test_damaged_checkpoints_that_are_newer_do_not_cost_the_last_good_ones(tmp_path):
    for update in (3, 6, 9):
        checkpoint.save(tmp_path, small_state(update), CONFIG, keep=3)
    for update in (6, 9):
        (tmp_path / f"checkpoint_{update:08d}.npz").write_bytes(b"PK")
    checkpoint.save(tmp_path, small_state(4), CONFIG, keep=2)
    assert tiny.checkpoints(tmp_path) == [3, 4, 6, 9]


def test_metrics_that_a_loss_of_power_has_spoilt_are_made_again(command, tmp_path):
    assert command(tmp_path / "run", 9)[0] == 0
    wanted = shutil.copytree(tmp_path / "run", tmp_path / "wanted")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"update": 10, "loss": 1.0}\n' + bytes(40) + b', "kl": 1.0}\n{"upda')
    assert command(wanted)[0] == command(tmp_path / "run")[0] == 0
    assert contents(tmp_path / "run") == contents(wanted)


# ---- A long run ------------------------------------------------------------------------------


PICTURES = {"baseline": ["samples", "reconstructions"]}
PICTURES["nondoubling"] = [*PICTURES["baseline"], "growth", "recovery"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, calls, width",  # at a width of 16, two states that are not let go are 50 MB
    [("baseline", 20, 16), ("nondoubling", CALLS, None)],
)
def test_a_long_run_grows_in_nothing_but_its_metrics(run, tmp_path, model, calls, width, capsys):
    fields = {"model__encoder_width": width} if width else {}
    fields |= {"train__updates": 3 * calls, "train__checkpoint_every": 6, "train__log_every": 30}
    fields["eval__every"] = 3 * (calls // 10)
    began = time.monotonic()
    assert run(tmp_path / "run", model, fields, notes=f"{tmp_path}/notes") == 0
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(notes) == calls + 2  # one of no updates; and the first is a part of one
    memory, opened, sizes = zip(*notes[max(calls // 10, 8) + 2 :], strict=True)
    growth = (max(memory) - memory[0]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    if "VNCA_CALLS" in os.environ:
        with capsys.disabled():
            print(f"\n{calls} calls: {growth:.1f} MB, {time.monotonic() - began:.0f} s")
    assert growth < 50 and max(opened) <= opened[0]
    for held in sizes:
        kept = [name for name in held if name.startswith("checkpoint")]
        assert len(kept) == KEPT[model] and len({held[name] for name in kept}) == 1
        assert held.keys() - kept == {"metrics.jsonl"} | {f"{name}.png" for name in PICTURES[model]}
        # Pictures are compressed; none is larger than its pixels.
        assert max(held[name] for name in held if name.endswith(".png")) < 300_000


if __name__ == "__main__":
    serve()
