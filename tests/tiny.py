"""Models that are small enough to compile in seconds, and runs of them by function or command.

`config` and `settings` are the committed configs with tiny sizes. `Command` starts main.py as a
process, and `outcomes` forks many starts from one process that has imported everything. What is
pretended:

- Programs are compiled without XLA's optimizations (`fast_compilation`, `Command`), and loops with
  its older code generator (`EMITTERS`). The numbers are the same up to rounding.
- All tests share a cache of compiled programs.
- A model that stands in for a packaged one is not trained (`in_place_of_packaged`).
- No network is a socket that fails the test (`without_network`).
"""

import ast
import contextlib
import importlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.experimental
import jaxlib.version
import numpy as np
import pytest
from ml_collections import ConfigDict

from vnca import layers
from vnca.fast import cpu
from vnca.likelihoods import binomial
from vnca.model import make_model
from vnca.pool import init_pool, pool_gradient
from vnca.program import VncaError, runs
from vnca.program.metrics import CURVE_POINTS
from vnca.training import Learner

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    path.stem for path in ROOT.glob("configs/*.py") if "def get_config" in path.read_text()
)
FIELDS = {  # doubling: 5,154 parameters
    "data.name": "bundled",
    "model.latent_size": 4,
    "model.encoder_width": 1,
    "model.steps_per_doubling": 1,
    "train.batch_size": 8,
    "train.updates_per_call": 3,
}
OF_MODELS = {
    "doubling": {},
    "baseline": {},
    "nondoubling": {
        "model.steps": 2,
        "model.train_steps": (2, 3),
        "train.batch_size": 32,
        "train.pool_size": 64,
    },
}
HEALING = OF_MODELS["nondoubling"] | {  # from update 2 on with the pool
    "model.channels": 11,  # 1 logit, 2 more that steps change, 4 for the position, 4 for z
    "model.hidden": 6,
    "model.position_waves": 1,
    "train.pool_from": 2,
    "train.pool_fresh": 8,
    "train.warmup_updates": 0,
    "train.encoder_from": None,
    # As when LOSSES were measured. With micro-batches of 2, compiled without optimization, XLA sums
    # the pixels in another order, and the first loss is larger by 1e-5 of it.
    "train.micro_batch": 4,
}
GROWING = OF_MODELS["nondoubling"] | {
    "model.channels": 8,  # 1 logit, 1 for life, 4 for z, 1 more, 1 random number
    "model.hidden": 6,
    "model.start": 6,
    "train.pool_from": 2,
    "train.warmup_updates": 0,
}
FILES = {"healing": "small_healing"}  # of a model without a config of its own name
DIGITS = binomial(32, 1, 1)

# Of updates 1, 10 and 20 of these, as JAX 0.12.0.1 trains them with eight devices.
LOSSES = {
    "doubling": [722.7008056640625, 893.3934326171875, 681.1287231445312],
    "nondoubling": [732.4879760742188, 794.5194091796875, 684.9141845703125],
    "healing": [709.8031005859375, 672.5979614257812, 584.8978881835938],
    "baseline": [574.9651489257812, 574.461669921875, 572.8687744140625],
}

# Compiling is most of the time, and the same few programs come again and again, also in other
# processes: with this cache, which lives as long as the tests, each is compiled once. The first
# process makes it, and those that it starts, pytest-xdist's workers too, find it in the
# environment. Small programs are kept as well: a start that finds them is a second shorter.
if "VNCA_TESTS_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory()  # to be removed when this process ends
    os.environ["VNCA_TESTS_CACHE"] = _cache.name
jax.config.update("jax_compilation_cache_dir", os.environ["VNCA_TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# For the programs that tests start, which would use the user's own cache otherwise.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["VNCA_TESTS_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Loops on a CPU compiled as XLA did before it had its newer emitters, which JAX 0.12 has alone: an
# update of the tiny baseline in 1.4 s of a core, not 3.4. VNCA_EMITTERS=new leaves them to XLA. A
# flag that is not known ends the process, also where libtpu reads it.
OLDER = (0, 7) <= jaxlib.version.__version_info__ < (0, 11)
OLDER = OLDER and not importlib.util.find_spec("libtpu")
OLDER = OLDER and os.environ.get("VNCA_EMITTERS") != "new"
EMITTERS = "--xla_cpu_use_fusion_emitters=false" if OLDER else ""

# Its home before JAX 0.8 was another.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


@contextlib.contextmanager
def fast_compilation():
    """No optimization: half the time to compile, and the numbers are the same up to rounding."""
    before = jax.config.read("jax_disable_most_optimizations")  # True within another
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:  # also where what is compiled is to fail
        jax.config.update("jax_disable_most_optimizations", before)


def committed(name):
    """The config of configs/NAME.py."""
    return importlib.import_module(f"configs.{name}").get_config()


def changed(name, **fields):
    """A committed config with some fields, section__name, set to anything at all; … removes one."""
    nested = committed(name).to_dict()
    for field, value in fields.items():
        *sections, last = field.split("__")
        section = nested
        for s in sections:
            section = section[s]
        if value is ...:
            del section[last]
        else:
            section[last] = value
    return ConfigDict(nested)


def settings(name, **fields):
    """The tiny values of a model's fields, and others, given as train__updates=20."""
    values = dict(FIELDS)
    if name != "doubling":
        del values["model.steps_per_doubling"]
    own = {"healing": HEALING, "growing": GROWING}.get(name) or OF_MODELS[name]
    return values | own | {k.replace("__", "."): v for k, v in fields.items()}


def config(name="doubling", **fields):
    """The tiny config of a model."""
    made = committed(FILES.get(name, name))
    for field, value in settings(name, **fields).items():
        *section, last = field.split(".")
        (made[section[0]] if section else made)[last] = value
    return made


def in_place_of_packaged(name):
    """A tiny model as a packaged one, not trained, but its cells change with each step."""
    made, random = config(name), np.random.RandomState(3)

    def draw(_, shape, *, minval, maxval):  # JAX's own would have to be compiled, for seconds
        return random.uniform(minval, maxval, shape).astype(np.float32)

    model = make_model(made.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "uniform", draw)
        fresh = model.init(jax.random.key(3))
    params = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.02), fresh)
    return runs.Packaged(made, model, params, np.zeros((CURVE_POINTS, 2), np.float32))


def one_line(fault, *words):
    """Whether a fault that pytest caught has one line, with all of these words in it."""
    text = str(fault.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text
    return True


def fault_of(f, *args):
    """The one line of the VncaError that f(*args) raises."""
    with pytest.raises(VncaError) as fault:
        f(*args)
    assert "\n" not in str(fault.value)
    return str(fault.value)


def in_float64(params):
    return jax.tree.map(lambda a: a.astype(np.float64), params)


def close(found, expected, digits=1e-5):
    np.testing.assert_allclose(found, expected, rtol=digits, atol=digits * np.abs(expected).max())


def without_network(monkeypatch):
    """Fails what uses the network from now on."""
    for use in "connect", "bind":
        monkeypatch.setattr(socket.socket, use, lambda *_: pytest.fail("it used the network"))


def imported(source):
    """The modules that a Python source imports anywhere in it, by their full names; of `from a
    import b` a.b, since b may be one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


class Trap:
    """Fails the test that unpickles it."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def published(name):
    """The published config of a model, the whole batch of a device at once."""
    made = committed(name)
    made.train.micro_batch = made.train.batch_size
    return made


def learner_of(config, nn=layers):
    """The Learner of a model, with these layers, and with a pool if the config has one."""
    model = make_model(config.model, nn)
    return Learner(model, pool_gradient, init_pool) if config.train.pool_size else Learner(model)


def use_products(patch, use=True):
    """Makes the CPU's convolutions that are traced from now on products over patches, or makes all
    of them convolutions, whatever their shapes."""
    for name in ("_patches_are_faster", "_products_are_faster"):
        patch.setattr(cpu, name, lambda *_: use)


class Process:
    """A program in a process of its own, with what it prints; it does not outlive the `with`."""

    def __init__(self, *command, out=None, **environment):
        self.out, self.err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT, env=environment, stdout=out or self.out, stderr=self.err,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def printed(self):
        return os.pread(self.out.fileno(), 1 << 20, 0).decode()

    def complained(self):
        return os.pread(self.err.fileno(), 1 << 20, 0).decode()

    def wait_for(self, words, timeout=300):
        """Returns when these words have been printed."""
        deadline = time.monotonic() + timeout
        while words not in self.printed():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"no {words!r} in {self.printed()}\n{self.complained()}")
            time.sleep(0.02)

    def end(self, timeout=300):
        """Waits for the end of the process; its exit status."""
        return self.process.wait(timeout)


# A program for a Command to run first, of whose pictures nothing is asked: each is compiled.
NO_PICTURES = "from vnca.program import pictures\npictures.training_pictures = lambda *_: {}"


class Command(Process):
    """`python main.py` with the tiny config of a model; warnings are errors. It compiles as
    `fast_compilation` does. before: a program to run first, which may replace parts of it."""

    def __init__(
        self, *args, name="doubling", devices=1, before="", environment=None, out=None, **fields
    ):
        fields = settings(name, **fields)
        text = f"import sys, main\n{before}\nsys.exit(main.main(sys.argv))"
        program = ["-c", text] if before else ["main.py"]
        ours = {
            "XLA_FLAGS": f"{EMITTERS} --xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        super().__init__(
            *("-W", "error"),
            *("-W", "ignore:the load_module:DeprecationWarning"),  # of ml_collections
            *program,
            f"--config=configs/{FILES.get(name, name)}.py",
            *(f"--config.{field}={value}" for field, value in fields.items()),
            *args,
            out=out,
            **ours | (environment or {}),
        )


def leave_cluster(patch):
    """Has the environment not be that of a cluster's task."""
    for name in [*os.environ]:
        if re.match("SLURM_|KUBERNETES|OMPI_|TPU_|PMI_|PALS_|PBS_", name):
            patch.delenv(name)


# Reads a program to run first and commands as JSON, runs main.main for each in a fork of a process
# that has imported it all, so that they take a moment together and each starts with flags that
# nothing has touched; writes their results as JSON.
DRIVER = """
import json, os, signal, sys, tempfile
import main, vnca.program.cli, vnca.program.train, vnca.report.benchmark
first, commands = json.load(sys.stdin)
exec(first)
results = []
for argv in commands:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.alarm(180)  # one that hangs is killed
            status = 70  # of a traceback
            try:
                status = main.main(["main.py", *argv])
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, err)]
        results.append([status, *texts])
json.dump(results, sys.stdout)
"""


def outcomes(commands, first=""):
    """[exit status, output, errors] of main.py with each of these lists of arguments; `first` is a
    program to run before them all, which may replace what they would do."""
    answer = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps([first, commands]), capture_output=True,
        text=True, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def metrics(workdir):
    """The objects of metrics.jsonl: those of updates, and those of tests."""
    found = [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]
    tests = [record for record in found if "test_iwelbo" in record]
    return [record for record in found if "test_iwelbo" not in record], tests


def checkpoints(workdir):
    """The updates that there are checkpoints of."""
    return sorted(int(path.stem.split("_")[1]) for path in Path(workdir).glob("checkpoint_*"))


def arrays(workdir, update):
    """The arrays of a checkpoint, by their names."""
    with np.load(Path(workdir, f"checkpoint_{update:08d}.npz"), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
