"""Promise 7: a mistake costs one line that names the flag, field or file, the value, and what it
may be. The exit status is 1, there is no traceback, and nothing is written.

Nearly every case is a command: its arguments, and parts of the line, with … between them.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
import tiny

from vnca.program import config

REFUSED = {  # config, or "" for none: arguments, FOLDER an empty folder but for `file`: the line
    "": {
        "": "--config",
        "--config": "--config",
        "--config=": "--config",
        "configs/doubling.py": "--config",
        "--config.seed=3 --config=configs/doubling.py": "--config",
        "--config=configs/dubbling.py": "configs/dubbling.py",
        "--config=configs": "configs",
        "--config=.": "--config",
        "--config=/dev/null": "/dev/null",
        "--config=README.md": "README.md",
        "--config='a\nb'": "a b",
        "--config=" + "a" * 5000: "aaa",
        "--mode=evaluate": "--config",
    },
    "doubling": {
        # Flags that do not exist, and words that are none.
        "--nonsense": "nonsense",
        "--nonsense=1": "nonsense",
        "--wrokdir=x": "wrokdir … workdir",
        "--seed=3": "seed",
        "--Mode=train": "Mode",
        "--nomode": "mode",
        "--noworkdir": "workdir",
        "--config_=3": "config_",
        "--é=1": "é",
        "--'a\nb'=1": "a b",
        "evaluate": "evaluate",
        "-mode train study": "study",
        "mode=study": "mode=study",
        "config.seed=3": "config.seed=3",
        "--plain false": "false",
        "-- --config.seed=3": "--config.seed=3",
        # Flags with a wrong value, or with none.
        "--mode": "mode",
        "--mode=": "mode",
        "--mode=dream": "mode … dream … train … evaluate … study",
        "--mode=TRAIN,evaluate": "mode … train",
        "--plain=perhaps": "plain … perhaps",
        "--workdir": "workdir",
        "--workdir=": "--workdir",
        "--workdir= --mode=evaluate": "--workdir",
        "--coordinator": "coordinator",
        "--processes=x": "processes … x",
        "--processes": "processes",
        # Flags of another mode.
        "--checkpoint=7": "--checkpoint",
        "--checkpoint=7 --mode=summary": "--checkpoint",
        "--checkpoint=7 --mode=benchmark": "--checkpoint",
        "--topology=h100": "--topology",
        "--topology= --mode=summary": "--topology",
        "--topology=h100 --mode=study": "--topology",
        # Machines that there are none of.
        "--mode=compile --topology=h1000": "--topology … h1000",
        "--mode=compile --topology=é": "--topology … é",
        "--mode=compile --topology=": "--topology",
        # Several hosts.
        "--coordinator=h:1": "--coordinator … --processes … --process_id",
        "--coordinator=h:1 --processes=1": "--processes … --process_id",
        "--processes=2 --process_id=0": "--coordinator … --processes",
        "--process_id=0": "--coordinator … --process_id",
        "--coordinator=auto --processes=2": "--coordinator … auto … --processes",
        "--coordinator=h:1 --processes=0 --process_id=0": "processes",
        "--coordinator=h:1 --processes=2 --process_id=2": "process_id",
        "--coordinator=h:1 --processes=2 --process_id=-1": "process_id",
        "--coordinator=h --processes=1 --process_id=0": "--coordinator … h … HOST:PORT",
        "--coordinator= --processes=1 --process_id=0": "--coordinator … HOST:PORT",
        "--coordinator=h:0 --processes=1 --process_id=0": "--coordinator … h:0",
        "--coordinator=h:65536 --processes=1 --process_id=0": "--coordinator … h:65536",
        "--coordinator=h:abc --processes=1 --process_id=0": "--coordinator … h:abc",
        "--coordinator='a\nb:1' --processes=1 --process_id=0": "--coordinator … a b:1",
        # Fields that do not exist, or that the model does not have.
        "--config.train.batchsize=8": "batchsize … batch_size",
        "--config.batch_size=8": "batch_size",
        "--config.sed=1": "sed … seed",
        "--config.train=1": "train",
        "--config.train.=1": "train.",
        "--config..train=1": ".train",
        "--config.=1": "config",
        "--config.train..updates=1": "train..updates",
        "--config.train.updates.x=1": "updates",
        "--config.TRAIN.UPDATES=1": "TRAIN",
        "--config.lock=1": "lock",
        "--config.seed[0]=1": "seed[0]",
        "--config.'seed '=1": "seed",
        "--config.é=1": "é",
        "--noconfig.seedx": "seedx",
        "--config.train.debug_nans=True": "debug_nans",
        "--config.train.pool_size=64": "train.pool_size … doubling",
        "--config.model.train_steps=(32,63)": "model.train_steps … doubling",
        "--config.train.pool_size=None": "train.pool_size … doubling",
        "--config.train.encoder_from=None": "train.encoder_from … doubling",
        "--config.model.name=baseline": "config.model.doublings … baseline",
        "--config.model.name=nondoubling": "config.model.doublings … nondoubling",
        # Values of a wrong type, or out of range.
        "--config.seed": "seed",
        "--config.seed=": "seed … whole number from 0 to 2,147,483,647",
        "--config.seed=-1": "seed=-1 … whole number from 0 to 2,147,483,647",
        "--config.train.updates=word": "train.updates … word … whole number from 1",
        "--config.train.updates=0.5": "train.updates … 0.5 … whole number from 1",
        "--config.train.updates=1e3": "train.updates … 1e3 … whole number from 1",
        "--config.train.updates=True": "train.updates … True … whole number from 1",
        "--config.train.updates=None": "train.updates … None … whole number from 1",
        "--config.train.updates=[1]": "train.updates … [1] … whole number from 1",
        "--config.train.updates='a\nb'": "train.updates … a b … whole number from 1",
        "--config.train.updates=0": "train.updates=0 … whole number from 1",
        "--config.train.updates=2147483648": "train.updates=2147483648 … 2,147,483,647",
        "--config.train.updates=" + "9" * 5000: "train.updates … whole number from 1",
        "--config.train.batch_size=1000001": "train.batch_size=1000001 … 1,000,000",
        "--config.train.clip_norm=": "train.clip_norm … number from 1e-30 to 1e+09",
        "--config.train.clip_norm=nan": "train.clip_norm … nan … number from 1e-30 to 1e+09",
        "--config.train.clip_norm … inf": "train.clip_norm … inf … number from 1e-30 to 1e+09",
        "--config.train.clip_norm=1e-300": "train.clip_norm=1e-300 … number from 1e-30",
        "--config.train.clip_norm=True": "train.clip_norm … True … number from 1e-30",
        "--config.train.clip_norm=1" + "0" * 400: "train.clip_norm … number from 1e-30",
        "--config.train.learning_rate=11": "train.learning_rate=11 … 1e-30 to 10",
        "--config.train.dtype=float16": "train.dtype='float16' … float32 … bfloat16",
        "--config.train.dtype=": "train.dtype … float32 … bfloat16",
        "--config.train.dtype=None": "train.dtype … None … float32 … bfloat16",
        "--config.model.name=résumé": "model.name='résumé' … doubling … healing",
        "--config.data.name=mnist": "data.name='mnist' … auto … bundled … own",
        "--config.data.dir=": "data.dir='' … name of a folder or a file",
        "--config.eval.split=all": "eval.split='all' … test … train",
        "--config.eval.images=word": "eval.images … word … whole number from 1",
        "--config.seed=1 --config.train.updates=0 --mode=summary": "train.updates=0",
        # What is found later: folders, files and images.
        "--workdir=FOLDER/file": "FOLDER/file",
        "--workdir=FOLDER/file --mode=evaluate": "FOLDER/file",
        "--workdir=FOLDER/file/run": "FOLDER/file/run",
        "--workdir=FOLDER/link": "FOLDER/link",
        "--mode=evaluate": "FOLDER/run … no checkpoint",
        "--mode=evaluate --checkpoint=7": "--checkpoint … 7",
        "--mode=study --checkpoint=9" + "9" * 30: "--checkpoint … 999",
        "--mode=evaluate --checkpoint=FOLDER/none.npz": "--checkpoint … FOLDER/none.npz",
        "--mode=evaluate --checkpoint=FOLDER": "FOLDER",
        "--mode=figures --checkpoint=FOLDER/file": "FOLDER/file",
        "--config.train.start_from=FOLDER/none "
        "--config.data.name=bundled": "start_from=FOLDER/none",
        "--config.data.name=larochelle --config.data.dir=FOLDER/none": "FOLDER/none",
        "--config.data.name=larochelle --config.data.dir=FOLDER/file": "FOLDER/file",
        "--config.data.name=own": "data.dir",
        "--config.data.name=own --config.data.dir=FOLDER/none": "FOLDER/none",
        "--config.data.name=own --config.data.dir=FOLDER": "FOLDER",
        "--config.data.name=own --config.data.dir=FOLDER/file": "FOLDER/file",
        # A test set, a training set, or eight devices, that it does not fit.
        "--config.train.batch_size=60008 "
        "--config.data.name=bundled": "train.batch_size=60008 … 60,000",
        "--config.train.batch_size=12": "train.batch_size=12 … multiple of 8",
        "--config.train.batch_size=12 --mode=summary": "train.batch_size=12 … multiple of 8",
        "--config.train.batch_size=3": "train.batch_size=3 … multiple of 8",
    },
    "small_doubling": {
        "--mode=evaluate --config.eval.images=10001": "eval.images=10001 … 10,000",
        "--mode=evaluate --checkpoint=": "--checkpoint",
    },
    "baseline": {
        "--config.model.doublings=5": "model.doublings … baseline",
        "--config.model.doublings=None": "model.doublings … baseline",
    },
    "nondoubling": {
        "--config.model.steps_per_doubling=8": "model.steps_per_doubling … nondoubling",
        "--config.model.hidden=8": "model.hidden … nondoubling",
        "--config.train.pool_from=1": "train.pool_from … nondoubling",
        "--config.model.train_steps=1": "model.train_steps … two whole numbers",
        "--config.model.train_steps=": "model.train_steps … two whole numbers",
        "--config.model.train_steps=None": "model.train_steps … None … two whole numbers",
        "--config.model.train_steps=(1,2.0)": "model.train_steps … two whole numbers",
        "--config.model.train_steps=(1,True)": "model.train_steps … two whole numbers",
        "--config.model.train_steps=(1,2,3)": "model.train_steps … two whole numbers",
        "--config.model.train_steps=(63,32)": "model.train_steps … two whole numbers",
        "--config.model.train_steps='((1,2),3)'": "model.train_steps … two whole numbers",
        "--config.model.train_steps=(1": "model.train_steps … two whole numbers",
        "--config.model.train_steps={}": "model.train_steps … two whole numbers",
        "--config.model.train_steps=" + "(" * 300: "model.train_steps … two whole numbers",
        "--config.train.batch_size=104": "train.batch_size=104 … multiple of 32",
        "--config.train.pool_size=1020": "train.pool_size=1020 … multiple of 8",
        "--config.train.pool_size=64": "train.pool_size=64 … 128",
        "--config.train.pool_size=60008 "
        "--config.data.name=bundled": "train.pool_size=60008 … 60,000",
    },
    "small_nondoubling": {
        "--config.model.doublings=5": "model.doublings",
        "--config.model.channels=28": "model.channels=28 … at least 29",
        "--config.model.channels=20 "
        "--config.model.position_waves=1": "model.channels=20 … at least 21",
        "--config.train.damage_size=32": "train.damage_size=32 … a cell",
        "--config.train.batch_size=128 --config.train.pool_size=1024 "
        "--config.train.pool_fresh=48": "train.pool_fresh=48 … 128",
        "--config.train.batch_size=128 --config.train.pool_size=1024 "
        "--config.train.pool_fresh=4": "train.pool_fresh=4 … devices",
        "--config.train.batch_size=128 --config.train.pool_size=1024 "
        "--config.train.pool_fresh=128": "train.pool_fresh=128 … half",
        "--config.train.batch_size=128 --config.train.pool_size=1024 "
        "--config.train.pool_fresh=16 "
        "--config.train.encoder_from=FOLDER/none": "train.encoder_from=FOLDER/none",
    },
}  # fmt: skip
CASES = [(name, *case) for name, cases in REFUSED.items() for case in cases.items()]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Of every case (config, arguments): exit status, output, errors; and the folder."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "file").write_text("text")
    (folder / "link").symlink_to(folder / "nowhere")
    commands = {
        (name, given): [
            *([f"--config=configs/{name}.py", f"--workdir={folder}/run"] if name else []),
            *shlex.split(given.replace("FOLDER", str(folder))),
        ]
        for name, given, _ in CASES
    }
    return folder, dict(zip(commands, tiny.outcomes([*commands.values()]), strict=True))


def assert_is_refused(result, words):
    """That a command ended with one line that has all of these words, and with status 1."""
    status, _, err = result
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, (status, err)
    assert len(err.splitlines()) == 1 and len(err) < 6000
    for part in words.split(" … "):
        assert part in err, (part, err)


@pytest.mark.parametrize("name, given, words", CASES)
def test_a_mistake_costs_one_line_that_names_it(refused, name, given, words):
    folder, results = refused
    assert_is_refused(results[name, given], words.replace("FOLDER", str(folder)))


def test_a_mistake_writes_nothing(refused):
    folder, _ = refused
    assert {path.name for path in folder.rglob("*")} <= {"file", "link", "run", ".lock"}
    assert {path.name for path in folder.glob("run/*")} <= {".lock"}
    assert (folder / "file").read_text() == "text"
    assert not (tiny.ROOT / "file").exists()


# ---- The values of every field -------------------------------------------------------------------

WHOLE = {  # the smallest and the largest whole number of a field
    "seed train.warmup_updates": (0, 2**31 - 1),
    "model.latent_size": (1, 4096),
    "model.encoder_width": (1, 512),
    "model.doublings": (5, 8),
    "model.channels": (29, 4096),  # with 16 channels of z and 3 waves
    "model.hidden": (1, 4096),
    "model.position_waves": (1, 5),
    "model.steps_per_doubling model.steps": (1, 1000),
    "train.batch_size train.pool_size train.micro_batch eval.images": (1, 1_000_000),
    "train.damage_size": (1, 31),
    "train.pool_fresh": (1, 500_000),
    "train.updates train.decay_updates train.checkpoint_every train.pool_from": (1, 2**31 - 1),
    "eval.every eval.samples": (1, 2**31 - 1),
    "train.updates_per_call eval.chunk": (1, 10_000),
}
WHOLE = {field: ends for fields, ends in WHOLE.items() for field in fields.split()}
GOOD = WHOLE | {
    "data.name": ("auto", "larochelle", "bundled", "own"),
    "data.dir": ("word", "é"),
    "model.name": ("doubling",),  # a config of another model would lack fields
    "model.train_steps": ((1, 1000), (7, 7), [1, 2]),
    "train.encoder_from": ("word", "packaged"),
    "train.start_from": ("word", "packaged"),
    "train.learning_rate": (1, 0.5, 2.5, 1e-30, 10),
    "train.clip_norm": (1, 48, 0.5, 1e-30, 1e9),
    "train.dtype": ("float32", "bfloat16"),
    "eval.split": ("test", "train"),
    "eval.precision": ("highest", "default"),
}
UNSET = {  # fields that may be
    *("data.dir", "train.pool_fresh", "train.encoder_from", "train.start_from"),
    *("train.decay_updates", "train.micro_batch", "train.updates_per_call"),
    *("train.checkpoint_every", "eval.images", "eval.every", "eval.chunk"),
}
ODD = [..., None, True, "", -1, 0.0, 1e-31, math.nan, math.inf, 2**31, 10**400, [], b"x", (32,)]
ODD += [(63, 32), (0, 32), (32.0, 63), (True, 63), (1, 1001), (1, 2, 3)]  # …: it is left out


def with_value(field, value):
    """A config that has the field, with this value."""
    names = "doubling", "small_nondoubling"  # together they have all fields
    name = next(n for n in names if field in config.flatten(tiny.committed(n)))
    return tiny.changed(name, **{"eval__split": "train", field.replace(".", "__"): value})


@pytest.mark.parametrize("field", GOOD)
def test_a_field_takes_the_values_it_must_and_no_other(field):
    good = [*GOOD[field], *([None] if field in UNSET else [])]
    for value in good:
        config.check(with_value(field, value))
    low, high = WHOLE.get(field, (-1, 2**31))
    for value in [*ODD, low - 1, high + 1]:
        if not any(type(value) is type(other) and value == other for other in good):
            message = tiny.fault_of(config.check, with_value(field, value))
            assert message.startswith(f"config.{field}") and "it must " in message, value


# ---- What is accepted ----------------------------------------------------------------------------

ACCEPTED = {  # config, then arguments: what the run has besides its config's values
    "doubling --config.seed=1 --config.seed=3": {"seed": 3},
    "doubling --config.train.clip_norm=1e3": {"train.clip_norm": 1000},
    "doubling --config.train.clip_norm=1": {"train.clip_norm": 1},
    "doubling --config.train.dtype=bfloat16": {"train.dtype": "bfloat16"},
    "doubling --config.train.start_from=é": {"train.start_from": "é"},
    "doubling --config.train.start_from=0": {"train.start_from": "0"},
    "doubling --config.eval.images=None": {},
    "doubling --config.eval.every=5 --config.eval.every=None": {},
    "doubling --config.eval.every=None --config.eval.every=5": {"eval.every": 5},
    "quickstart --config.train.decay_updates=None": {"train.decay_updates": None},
    "small_nondoubling --config.train.encoder_from=None": {"train.encoder_from": None},
    "small_nondoubling --config.model.train_steps=(1,1000)": {"model.train_steps": [1, 1000]},
    "small_nondoubling --config.model.train_steps=7,7": {"model.train_steps": [7, 7]},
}
SHOW = """
import vnca.program.train
def show(run):
    print(json.dumps(vnca.program.config.flatten(run.config)))
vnca.program.train.train = show
"""


def test_what_is_accepted_is_what_the_run_has(tmp_path):
    commands = []
    for number, given in enumerate(ACCEPTED):
        name, *args = given.split()
        rest = f"--workdir={tmp_path}/{number}", "--config.data.name=bundled"
        commands.append([f"--config=configs/{name}.py", *rest, *args])
    for given, (status, out, err) in zip(ACCEPTED, tiny.outcomes(commands, SHOW), strict=True):
        assert status == 0 and not err, (given, err)
        committed = config.flatten(tiny.committed(given.split()[0])) | {"data.name": "bundled"}
        shown, wanted = json.loads(out.splitlines()[-1]), committed | ACCEPTED[given]
        assert shown.keys() == wanted.keys()
        fitted = {"train.micro_batch", "eval.chunk"}  # to the machine
        assert {f: shown[f] for f in wanted if f not in fitted} == {
            f: value for f, value in wanted.items() if f not in fitted
        }, given


# ---- Config files --------------------------------------------------------------------------------

WRITTEN = """
from configs.doubling import get_config as doubling
from ml_collections import ConfigDict
import numpy as np
def get_config():
    c = doubling()
    with c.ignore_type():
        {}
    return c
"""
LINES = {  # of a config file's get_config(), and parts of the line
    "c.train.learning_rate = float('nan')": "config.train.learning_rate=nan … number from",
    "c.train.clip_norm = 1j": "config.train.clip_norm=1j … number from",
    "c.train.clip_norm = np.float32(1)": "config.train.clip_norm … number from",
    "c.train.updates = np.arange(3)": "config.train.updates … whole number",
    "c.train.updates = '5'": "config.train.updates='5' … whole number",
    "c.train.updates = True": "config.train.updates=True … whole number",
    "c.train.updates = ConfigDict()": "config.train.updates … whole number",
    "c.train.updates = ConfigDict({'a': 1})": "config.train.updates",
    "c.train.updates = 10**5000": "FILE",
    "c.train.updates = c.train.get_ref('batch_size') // 0": "FILE … ZeroDivisionError",
    "c.model.name = ['doubling']": "config.model.name=['doubling'] … one of",
    "c.model.name = 'a\\nb'": "config.model.name … one of",
    "c.model.name = None": "config.model.name=None … one of",
    "c.model.train_steps = (1, 2)": "config.model.train_steps … doubling",
    "c.train.batchsize = 5": "config.train.batchsize",
    "c.extra = ConfigDict()": "config.extra",
    "c.train.extra = {}": "config.train.extra",
    "c['a\\nb'] = 1": "config.a b",
    "c.train.loop = c": "FILE",
    "c.train = 3": "config.train",
    "c.train = None": "config.train",
    "c.train = ConfigDict()": "config.train.updates is missing … whole number",
    "c.train = ConfigDict({1: 2})": "1",
    "del c.train": "config.train.updates is missing … whole number",
    "del c.model.name": "config.model.name is missing … one of",
    "c = ConfigDict()": "config.seed is missing … whole number",
    "from ml_collections import FrozenConfigDict; c = FrozenConfigDict(c)": "FILE",
    "c = 3": "get_config … ConfigDict",
    "c = None": "get_config … ConfigDict",
    "c = {'seed': 0}": "get_config … ConfigDict",
}
RAISES = {  # when the file is imported, or in get_config()
    "raise SystemExit(0)": "FILE … SystemExit",
    "raise SystemExit('a\\nb')": "FILE … SystemExit",
    "raise MemoryError": "FILE … MemoryError",
    "raise ValueError('a\\nb')": "FILE … b",
    "raise AttributeError('no updates')": "FILE … no updates",
    "raise KeyError('no such thing')": "FILE … no such thing",
    "f = lambda: f(); f()": "FILE … RecursionError",
    "1 + 'a'": "FILE … TypeError",
    "open('/nowhere/at/all')": "/nowhere/at/all",
    "import no_such_module": "FILE … no_such_module",
}
FILES = {  # whole files
    b"\x00\x01": "FILE",
    b"x = '\xe9'": "FILE … SyntaxError",
    b"x = " + b"(" * 500: "FILE … SyntaxError",
    b"if 1:\n\tx = 1\n        y = 2": "FILE … TabError",
    b"": "FILE … get_config",
    b"get_config = 3": "FILE",
    b"def get_config(x): return x": "FILE",
    b"def get_config(): yield 1": "ConfigDict",
}


def test_a_config_file_that_is_broken_or_odd_costs_one_line(tmp_path):
    texts = {WRITTEN.format(line).encode(): words for line, words in (LINES | RAISES).items()}
    texts |= {line.encode(): words for line, words in RAISES.items()} | FILES
    paths = [tmp_path / f"written{number}.py" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    found = tiny.outcomes([[f"--config={path}"] for path in paths])
    for path, (text, words), result in zip(paths, texts.items(), found, strict=True):
        try:
            assert_is_refused(result, words.replace("FILE", str(path)))
        except AssertionError as fault:
            raise AssertionError(text.decode("latin-1")) from fault
    assert not [*tmp_path.glob("runs")]


# ---- The environment -----------------------------------------------------------------------------

PLACES = {  # environment: the line
    "JAX_PLATFORMS=cuda": "JAX_PLATFORMS=cuda",
    "JAX_PLATFORMS=tpu": "JAX_PLATFORMS=tpu",
    "JAX_PLATFORMS=cudo": "JAX_PLATFORMS=cudo",
    "JAX_NUM_CPU_DEVICES=x": "jax_num_cpu_devices … x",
    "JAX_ENABLE_X64=perhaps": "JAX_ENABLE_X64 … perhaps",
    "JAX_DEFAULT_MATMUL_PRECISION=seven": "jax_default_matmul_precision … seven",
    "XLA_FLAGS=--xla_force_host_platform_device_count=0": "XLA_FLAGS",
}


def test_an_environment_that_jax_cannot_use_costs_one_line(tmp_path):
    command = "main.py", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run"
    runs = {place: tiny.Process(*command, **dict([place.split("=", 1)])) for place in PLACES}
    for place, words in PLACES.items():
        with runs[place] as run:
            assert_is_refused([run.end(), run.printed(), run.complained()], words)
    assert not [*tmp_path.rglob("*")]


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit counts otherwise")
def test_a_disk_without_room_for_temporary_files_costs_one_line():
    command = f"ulimit -f 0; exec {sys.executable} main.py --config=configs/doubling.py"
    ended = subprocess.run(
        ["sh", "-c", f"{command} --mode=summary"], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert_is_refused([ended.returncode, ended.stdout, ended.stderr], "temporary directory")


def test_the_program_ends_with_the_status_wherever_it_is_started(tmp_path):
    command = [sys.executable, str(tiny.ROOT / "main.py")]
    environment = os.environ | {"PYTHONPATH": ""}
    found = [
        subprocess.run(
            [*command, arg], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        for arg in ("--help", "--nonsense")
    ]
    assert found[0].returncode == 0 and "--workdir" in found[0].stdout and not found[0].stderr
    assert_is_refused([found[1].returncode, found[1].stdout, found[1].stderr], "--config")


# ---- --help --------------------------------------------------------------------------------------


def test_help_names_every_flag_mode_and_field_with_what_it_means_and_may_be():
    names = "doubling", "nondoubling", "small_nondoubling"
    helps = tiny.outcomes([["--help"], *([f"--config=configs/{n}.py", "--help"] for n in names)])
    assert [status for status, _, _ in helps] == [0] * 4 and not any(err for _, _, err in helps)
    assert helps[0] == helps[1] and helps[0][1].startswith("python main.py --config=")
    words = "--config --workdir --mode --checkpoint --topology plain --coordinator --processes "
    words += "--process_id train: evaluate: summary: operations: check: benchmark: compile: "
    for word in (words + "figures: study:").split():
        assert word in helps[0][1], word
    for name, (_, text, _) in zip(names, helps[1:], strict=True):
        lines = " ".join(text.split())
        model = tiny.committed(name).model.name
        for field in config.FIELDS:
            assert (f"--config.{field.name}" in lines) == (model in field.models), field.name
            assert model not in field.models or field.values.words in lines, field.name
        source = (tiny.ROOT / "configs" / f"{name}.py").read_text()
        for comment in re.findall(r"^    .*\.\w+ = .*  # (.+)", source, re.MULTILINE):
            assert comment in lines, comment
