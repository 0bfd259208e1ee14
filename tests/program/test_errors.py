"""Promise 7: a mistake costs one line that names the flag, field or file, the value, and what it
may be. The exit status is 1, there is no traceback, and nothing is written.

Nearly every case is a command: its arguments, and parts of the line, with … between them.
"""

import errno
import json
import math
import re
import shlex
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import main
from vnca import models
from vnca.program import VncaError, cli, config, machine, runs, stop, train
from vnca.program.learner import own_fields, validate_model

REFUSED = {  # config, or "" for none: arguments, FOLDER an empty folder but for `file`: the line
    "": {
        "": "--config",
        "--config=": "--config",
        "configs/doubling.py": "configs/doubling.py",
        "--config=configs/dubbling.py": "configs/dubbling.py",
        "--config=README.md": "README.md",
        "--config='a\nb'": "a b",
        "--config=" + "a" * 5000: "aaa",
    },
    "doubling": {
        # Flags that do not exist, and words that are none.
        "--nonsense=1": "nonsense",
        "--wrokdir=x": "wrokdir … workdir",
        "evaluate": "evaluate",
        # Flags with a wrong value, or with none.
        "--mode": "mode",
        "--mode=dream": "mode … dream … train … evaluate … study",
        "--plain=perhaps": "plain … perhaps",
        "--workdir=": "--workdir",
        # Flags of another mode.
        "--checkpoint=7": "--checkpoint",
        "--checkpoint=7 --mode=check": "--checkpoint",
        "--topology=h100": "--topology",
        # Machines that there are none of.
        "--mode=compile --topology=h1000": "--topology … h1000",
        # Several hosts.
        "--coordinator=h:1 --processes=1": "process",
        "--processes=2 --process_id=0": "--coordinator",
        "--coordinator=auto --processes=2": "--coordinator",
        "--coordinator=h:1 --processes=0 --process_id=0": "processes",
        "--coordinator=h:1 --processes=2 --process_id=2": "process_id",
        "--coordinator=h --processes=1 --process_id=0": "--coordinator=h … HOST:PORT",
        # Fields that do not exist, or that the model does not have.
        "--config.train.batchsize=8": "batchsize … batch_size",
        "--config.sed=1": "sed … seed",
        "--config.train.pool_size=64": "train.pool_size=64: it must be 0 … doubling",
        "--config.model.name=baseline": "config.model.doublings … baseline",
        # Values of a wrong type, or out of range; below, all fields are tried with more of them.
        "--config.seed=": "seed … whole number from 0 to 2,147,483,647",
        "--config.train.updates=None": "train.updates … None … whole number from 1",
        "--config.train.updates=" + "9" * 5000: "train.updates … whole number from 1",
        "--config.train.clip_norm=nan": "train.clip_norm … nan … number from 1e-30 to 1e+09",
        "--config.model.name=résumé": "model.name='résumé' … "
        "one of baseline, clipped, doubling, growing, healing, nondoubling: the files of vnca/",
        "--config.model.likelihood=gaussian": "model.likelihood='gaussian' … one of binomial",
        "--config.model.size=64": "model.doublings=5: it must be 6 to 9 … 64×64",
        "--config.data.dir=": "data.dir='' … name of a folder or a file",
        "--config.seed=1 --config.train.updates=0 --mode=summary": "train.updates=0",
        # What is found later: folders, files and images.
        "--workdir=FOLDER/file": "FOLDER/file",
        "--mode=evaluate": "FOLDER/run … no checkpoint",
        "--mode=evaluate --checkpoint=7": "--checkpoint … 7",
        "--config.train.start_from=FOLDER/none "
        "--config.data.name=bundled": "start_from=FOLDER/none",
        "--config.data.name=larochelle --config.data.dir=FOLDER/file": "FOLDER/file",
        "--config.data.name=own": "data.dir",
        "--config.data.name=own --config.data.dir=FOLDER": "FOLDER",
        "--config.data.name=own "
        "--config.data.dir=FOLDER/own.npz": "own.npz: train … model.size=32 … model.colours=1",
        "--config.data.name=bundled --config.model.colours=3": "data.name=bundled … colours=1",
        # A test set, a training set, or eight devices, that it does not fit.
        "--config.train.batch_size=60008 "
        "--config.data.name=bundled": "train.batch_size=60008 … 60,000",
        "--config.train.batch_size=12": "train.batch_size=12 … multiple of 8",
        "--config.train.batch_size=12 --mode=summary": "train.batch_size=12",
        "--config.train.batch_size=12 --mode=benchmark": "train.batch_size=12",
    },
    "small_doubling": {
        "--mode=evaluate --config.eval.images=10001": "eval.images=10001 … 10,000",
        "--mode=evaluate --checkpoint=": "--checkpoint",
    },
    "baseline": {
        "--config.model.doublings=5": "model.doublings of clipped, doubling … whole number from 1",
        "--config.train.pool_size=64": "train.pool_size=64: it must be 0 … baseline",
        "--config.data.name=own --config.data.dir=FOLDER/own.npz "
        "--config.model.colours=3": "model.drawn_size=28 … images of own … set it to 32",
    },
    "nondoubling": {
        "--config.model.train_steps=1": "model.train_steps … two whole numbers",
        "--config.train.batch_size=104": "train.batch_size=104 … multiple of 32",
        "--config.train.pool_size=1020": "train.pool_size=1020 … multiple of 8",
        "--config.train.pool_size=64": "train.pool_size=64 … 128",
        "--config.train.pool_size=60008 "
        "--config.data.name=bundled": "train.pool_size=60008 … 60,000",
    },
    "small_healing": {
        "--config.model.channels=28": "model.channels=28 … at least 29",
        "--config.model.channels=20 "
        "--config.model.position_waves=1": "model.channels=20 … at least 21",
        "--config.train.damage_size=32": "train.damage_size=32 … below model.size, 32",
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
# ---- Config files --------------------------------------------------------------------------------

WRITTEN = """
from configs.doubling import get_config as doubling
from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder
import numpy as np
def get_config():
    c = doubling()
    with c.ignore_type():
        {}
    return c
"""
LINES = {  # of a config file's get_config(), and parts of the line
    "c.train.learning_rate = float('nan')": "config.train.learning_rate=nan … number from",
    "c.train.updates = np.arange(3)": "config.train.updates … whole number",
    "c.model.name = ['doubling']": "config.model.name=['doubling'] … one of",
    "c.model.train_steps = (1, 2)": "config.model.train_steps=(1, 2): the model doubling has no "
    "such field; its own are model.latent_size, model.encoder_width, model.doublings, "
    "model.steps_per",
    "c.train.batchsize = 5": "config.train.batchsize",
    "c['a\\nb'] = 1": "config.a b",
    "c.train = 3": "config.train",
    "del c.train": "config.train.updates … whole number",
    "del c.model.name": "config.model.name … one of",
    "c = ConfigDict()": "config.seed … whole number",
    "from ml_collections import FrozenConfigDict; c = FrozenConfigDict(c)": "get_config",
    "c = 3": "get_config … ConfigDict",
    "c[5] = 1": "the config … TypeError … names must be strings",
    "c.x = c": "the config … RecursionError … no section may contain itself",
    "c.seed = required_placeholder(int)": "the config … RequiredValueError … values",
}
RAISES = {  # when the file is imported, or in get_config()
    "raise SystemExit(0)": "FILE … SystemExit",
    "raise ValueError('a\\nb')": "FILE … b",
    "raise AttributeError('no updates')": "FILE … no updates",
    "raise KeyError('no such thing')": "FILE … no such thing",
    "f = lambda: f(); f()": "FILE … RecursionError",
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


CASES = [(name, *case) for name, cases in REFUSED.items() for case in cases.items()]
FILES |= {line.encode(): words for line, words in RAISES.items()}
FILES |= {WRITTEN.format(line).encode(): words for line, words in (LINES | RAISES).items()}
CASES += [(text, "", words) for text, words in FILES.items()]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """The outcome of every case, and the folder."""
    folder, commands = tmp_path_factory.mktemp("refused"), []
    (folder / "file").write_text("text")
    white = np.ones((1, 32, 32, 3), bool)
    np.savez(folder / "own.npz", train=white, test=white)
    for number, (name, given, _) in enumerate(CASES):
        path = f"configs/{name}.py"
        if isinstance(name, bytes):
            path = folder / f"config{number}.py"
            path.write_bytes(name)
        start = [f"--config={path}", f"--workdir={folder}/run"] if name != "" else []
        commands.append(start + shlex.split(given.replace("FOLDER", str(folder))))
    return folder, tiny.outcomes(commands)


def assert_is_refused(result, words):
    """That a command ended with one line that has all of these words, and with status 1."""
    status, _, err = result
    assert status == 1 and err.startswith("error: ") and len(err.splitlines()) == 1, (status, err)
    for part in words.split(" … "):
        assert part in err, (part, err)


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_a_mistake_costs_one_line_that_names_it(refused, number):
    folder, results = refused
    words = CASES[number][2].replace("FOLDER", str(folder))
    assert_is_refused(results[number], words.replace("FILE", f"{folder}/config{number}.py"))


def test_a_mistake_writes_nothing(refused):
    found = {path.name for path in refused[0].rglob("*") if path.suffix != ".py"}
    assert found <= {"file", "own.npz", "run", ".lock"}


# ---- The values of every field -------------------------------------------------------------------

WHOLE = {  # the smallest and the largest whole number of a field
    "seed train.warmup_updates": (0, 2**31 - 1),
    "model.levels": (1, 255),
    "model.latent_size model.encoder_width model.hidden": (1, 4096),
    "model.steps_per_doubling model.steps": (1, 4096),
    "model.doublings": (5, 8),  # for images of 32×32
    "model.channels": (29, 4096),  # with 16 channels of z and 3 waves
    "model.position_waves": (1, 5),  # for images of 32×32
    "train.batch_size train.micro_batch eval.images": (1, 1_000_000),
    "train.pool_size": (0, 1_000_000),
    "train.damage_size": (1, 31),  # of 32, with a pool
    "train.pool_fresh": (1, 500_000),
    "train.updates train.decay_updates train.checkpoint_every train.pool_from": (1, 2**31 - 1),
    "eval.every": (1, 2**31 - 1),
    "train.updates_per_call eval.chunk eval.samples": (1, 10_000),
}
WHOLE = {field: ends for fields, ends in WHOLE.items() for field in fields.split()}
GOOD = WHOLE | {
    "data.name": ("auto", "larochelle", "bundled", "own"),
    "data.dir": ("word", "é"),
    "model.name": ("doubling",),  # a config of another model would lack fields
    "model.likelihood": ("binomial",),
    "model.size": (16, 32, 64, 128),
    "model.colours": (1, 3),
    "model.drawn_size": (28, 30, 32),
    "model.train_steps": ((1, 1000), (7, 7), [1, 2]),
    "train.encoder_from": ("word", "packaged"),
    "train.start_from": ("word", "packaged"),
    "train.learning_rate": (1, 0.5, 2.5, 1e-30, 10),
    "train.kl_weight": (1, 0.5, 1e-30, 1e9),
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
ODD = [..., None, True, "", -1, 0.0, 1e-31, math.nan, math.inf, 2**31, 10**400, (32,)]
ODD += [(63, 32), (0, 32), (True, 63), (1, 1001)]  # …: it is left out
BETWEEN = {  # wrong values between good ones
    "model.size": (17, 48, 96),
    "model.colours": (2,),
    "model.drawn_size": (26, 29, 31, 34),
}


def validated(made):
    config.validate(made)
    validate_model(made)


def with_value(field, value):
    """A config that has the field, with this value."""
    names = "doubling", "small_healing", "baseline"  # together they have all fields
    name = next(n for n in names if field in config.flatten(tiny.committed(n)))
    fields = {"eval__split": "train"}
    if field in ("train.pool_size", "train.damage_size"):
        name = "small_healing"  # which has a pool
    elif field == "model.size":
        fields["model__doublings"] = 7  # which suits every size
    return tiny.changed(name, **fields | {field.replace(".", "__"): value})


@pytest.mark.parametrize("field", GOOD)
def test_a_field_takes_the_values_it_must_and_no_other(field):
    good = [*GOOD[field], *([None] if field in UNSET else [])]
    for value in good:
        validated(with_value(field, value))
    low, high = WHOLE.get(field, (-1, 2**31))
    for value in [*ODD, *BETWEEN.get(field, ()), low - 1, high + 1]:
        if not any(type(value) is type(other) and value == other for other in good):
            message = tiny.fault_of(validated, with_value(field, value))
            assert message.startswith(f"config.{field}") and "it must " in message, value


@pytest.mark.parametrize(
    "name, changed, words",
    [
        ("doubling", {"size": 16, "doublings": 8}, "doublings=8: it must be 4 to 7 for images of"),
        ("doubling", {"size": 64}, "doublings=5: it must be 6 to 9 for images of 64×64"),
        ("doubling", {"colours": 3, "latent_size": 2}, "latent_size=2: it must be at least 3"),
        ("nondoubling", {"colours": 3, "latent_size": 2}, "latent_size=2: it must be at least 3"),
        ("small_healing", {"colours": 3, "channels": 30}, "channels=30: it must be at least 31"),
        ("small_healing", {"position_waves": 6}, "position_waves=6: it must be at most 5 for 32"),
        ("baseline", {"size": 64}, "drawn_size=28: it must be 60, 62 or 64"),
    ],
)
def test_a_setting_that_does_not_suit_the_others_costs_one_line(name, changed, words):
    made = tiny.changed(name, **{f"model__{field}": value for field, value in changed.items()})
    assert tiny.fault_of(validated, made).startswith(f"config.model.{words}")


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_every_size_suits_every_model_in_colours_and_all_levels(size):
    doublings = size.bit_length() - 1
    for name, own in {
        "doubling": {"doublings": doublings},
        "nondoubling": {},
        "small_healing": {"position_waves": doublings, "channels": 3 + 4 * doublings + 16},
        "baseline": {"drawn_size": size},
    }.items():
        fields = {"size": size, "colours": 3, "levels": 255} | own
        fields = {f"model__{field}": value for field, value in fields.items()}
        validated(tiny.changed(name, train__damage_size=size // 2, **fields))


# ---- A model of one's own ------------------------------------------------------------------------

MINE = """
from vnca.model import SettingError
def make(nn, likelihood, width: int, rate: float, spread: tuple, word: str):
    raise SettingError(f"word={word!r}: it must be longer")
"""
SETTINGS = {"width": 1, "rate": 0.5, "spread": (1, 2), "word": "yes"}  # of MINE


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes a file of vnca/models/, mine.py, and returns a config of this model."""

    def write(text, **settings):
        (tmp_path / "mine.py").write_text(text)
        made = tiny.committed("baseline").to_dict()
        names = "likelihood", "size", "colours", "levels"
        model = {name: made["model"][name] for name in names}
        return ConfigDict(made | {"model": model | {"name": "mine"} | settings})

    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setattr(models, "mine", None, raising=False)  # as it is after the test
    yield write
    sys.modules.pop("vnca.models.mine", None)  # another test has another


@pytest.mark.parametrize(
    "settings, words",
    [
        (SETTINGS, "config.model.word='yes': it must be longer"),  # as the model says itself
        (SETTINGS | {"width": 0}, "config.model.width=0: it must be a whole number from 1"),
        (SETTINGS | {"rate": "a"}, "config.model.rate='a': it must be a number between"),
        (SETTINGS | {"rate": math.nan}, "config.model.rate=nan: it must be a number between"),
        (SETTINGS | {"spread": 3}, "config.model.spread=3: it must be two whole numbers"),
        (SETTINGS | {"depth": 3}, "config.model.depth=3: the model mine has no such field; its "
         "own are model.width, model.rate, model.spread, model.word"),
        ({"width": 1}, "config.model.rate is missing: the model mine has it, and it must be a"),
        ({**SETTINGS, "word": ...}, "config.model.word is missing: the model mine has it"),
    ],
)  # fmt: skip
def test_a_wrong_missing_or_foreign_setting_of_ones_own_model_costs_one_line(mine, settings, words):
    made = mine(MINE, **{name: value for name, value in settings.items() if value is not ...})
    assert tiny.fault_of(validated, made).startswith(words)


FAULTS = {  # files of a model: what they raise
    "def make(nn, likelihood:": SyntaxError,
    "import no_such_module": ModuleNotFoundError,
    "def mke(nn, likelihood): pass": AttributeError,
    "def make(nn, likelihood): raise ValueError": ValueError,
    "def make(nn, likelihood): return likelihood.sise": AttributeError,
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_in_a_models_file_keeps_its_traceback(mine, tmp_path, monkeypatch, text):
    made = mine(text)
    config.validate(made)
    monkeypatch.setattr(stop, "listen", lambda: None)  # it would block the signals of these tests
    monkeypatch.setattr(cli, "run", lambda *_: runs.open_run(made, tmp_path / "run"))
    with pytest.raises(FAULTS[text]) as fault:
        main.main([])
    assert "mine" in str(fault.getrepr(style="native")) and not (tmp_path / "run").exists()


def test_ones_own_model_may_have_another_name_for_its_latent_size(mine, monkeypatch, capsys):
    run = SimpleNamespace(
        config=mine("", code=7),
        learner=SimpleNamespace(model=SimpleNamespace(latent_size=7)),
        data=SimpleNamespace(name="own", train=[], test=[]),
    )
    monkeypatch.setattr(train, "update_flops", lambda _: 0)
    train.describe(run, SimpleNamespace(params={}))
    assert "model    mine: 0 parameters, latent 7\n" in capsys.readouterr().out


# ---- What is accepted ----------------------------------------------------------------------------

ACCEPTED = {  # config, then arguments: what the run has besides its config's values
    "doubling --config.seed=1 --config.seed=3": {"seed": 3},
    "doubling --config.train.clip_norm=1": {"train.clip_norm": 1},
    "doubling --config.train.dtype=bfloat16": {"train.dtype": "bfloat16"},
    "doubling --config.train.start_from=é": {"train.start_from": "é"},
    "doubling --config.train.start_from=0": {"train.start_from": "0"},
    "doubling --config.eval.images=None": {},
    "quickstart --config.train.micro_batch=3": {"train.micro_batch": 3},
    "doubling --config.eval.every 5 --config.eval.every None": {},
    "doubling --config.eval.every=None --config.eval.every=5": {"eval.every": 5},
    "quickstart --config.train.decay_updates=None": {"train.decay_updates": None},
    "nondoubling --config.model.train_steps=(1,1000)": {"model.train_steps": [1, 1000]},
    "nondoubling --config.model.train_steps=7,7": {"model.train_steps": [7, 7]},
}
SHOW = """
import vnca.program.train
def show(run):
    del run.config.model_sha256
    print(json.dumps(vnca.program.config.flatten(run.config)))
vnca.program.train.train = show
"""


@pytest.mark.slow  # eighteen starts, for 6 seconds
def test_what_is_accepted_is_what_the_run_has(tmp_path):
    commands = [
        [
            f"--config=configs/{name}.py",
            "--config.data.name=bundled",
            f"--workdir={tmp_path}",
            *args,
        ]
        for name, *args in map(str.split, ACCEPTED)
    ]
    for given, (status, out, err) in zip(ACCEPTED, tiny.outcomes(commands, SHOW), strict=True):
        assert status == 0 and not err, (given, err)
        made = tiny.committed(given.split()[0])
        made.data.name = "bundled"
        machine.fit(made)
        made.eval.chunk = None  # of a training that is not kept
        assert json.loads(out) == config.flatten(made) | ACCEPTED[given], given


# ---- Errors of the runtime -----------------------------------------------------------------------

RUNTIME = jax.errors.JaxRuntimeError  # the class of all of XLA's errors in JAX 0.7.2, 0.10 and 0.12
GLOO = "UNKNOWN: Gloo AllGather failed: connection closed by peer"
LOST, MEMORY = "another process is lost", "too little memory: lower config.train.micro_batch"


@pytest.mark.parametrize(
    "fault, processes, words",
    [
        (RUNTIME(GLOO), 2, LOST),
        (RUNTIME("UNAVAILABLE: the other task died"), 2, LOST),
        (RUNTIME(GLOO), 1, None),
        (RUNTIME("INTERNAL: it is broken"), 2, None),
        (ValueError("UNAVAILABLE"), 2, None),
        (RUNTIME("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 1, MEMORY),
        (RUNTIME("INTERNAL: Error preparing computation: Out of memory allocating"), 2, MEMORY),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory"), 1, None),
        (VncaError("UNAVAILABLE"), 2, "error: UNAVAILABLE\n"),
    ],
)
def test_only_the_runtime_reports_a_lost_process_or_too_little_memory_and_other_faults_are_raised(
    monkeypatch, capsys, fault, processes, words
):
    def run(*_):
        raise fault

    monkeypatch.setattr(stop, "listen", lambda: None)  # it would block the signals of these tests
    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    if words is None:
        with pytest.raises(type(fault)) as raised:
            main.main([])
        assert raised.value is fault
    else:
        assert_is_refused([main.main([]), "", capsys.readouterr().err], words)


# ---- The environment and --help ------------------------------------------------------------------

PLACES = {  # environment: the line
    "JAX_PLATFORMS=cuda": "JAX_PLATFORMS=cuda",
    "JAX_NUM_CPU_DEVICES=x": "jax_num_cpu_devices … x",
    "JAX_ENABLE_X64=perhaps": "JAX_ENABLE_X64 … perhaps",
    "XLA_FLAGS=--xla_force_host_platform_device_count=0": "XLA_FLAGS",
}


def test_an_environment_that_jax_cannot_use_costs_one_line():
    command = "main.py", "--config=configs/quickstart.py", "--mode=summary"
    runs = {place: tiny.Process(*command, **dict([place.split("=", 1)])) for place in PLACES}
    for place, run in runs.items():
        assert_is_refused([run.end(), run.printed(), run.complained()], PLACES[place])


HELP = "--config --workdir --mode --checkpoint --topology plain --coordinator --processes "
HELP += (
    "--process_id train: evaluate: summary: operations: check: benchmark: compile: figures: study:"
)


@pytest.mark.parametrize(
    "name, asked",
    [
        (None, "--help"),  # the fields of all configs, also elsewhere
        ("nondoubling", "--help --config=FILE"),
        ("small_healing", "--config FILE -h"),
    ],
)
def test_help_names_every_flag_mode_and_field_with_what_it_means_and_may_be(
    tmp_path, monkeypatch, capsys, name, asked
):
    file = tiny.ROOT / "configs" / f"{name or 'doubling'}.py"
    models = [tiny.committed(name).model.name] if name else config.listed_models()
    monkeypatch.chdir(tmp_path)
    cli.run(["main.py", *asked.replace("FILE", str(file)).split()], "")
    lines = " ".join(capsys.readouterr().out.split())
    wanted = HELP.split() + re.findall(r"^    .*\.\w+ = .*  # (.+)", file.read_text(), re.MULTILINE)
    fields = dict(config.FIELDS)
    if name:
        del fields["model.mixtures"]  # of another likelihood
    for model in models:
        fields |= own_fields(model)
    assert {*re.findall(r"--config\.([\w.]+): ", lines)} == {*fields}
    wanted += [values.words for values in fields.values()]
    assert not [words for words in wanted if words not in lines]


def test_help_begins_with_what_main_says_of_itself_even_where_docstrings_are_removed():
    with tiny.Process("main.py", "--help", PYTHONOPTIMIZE="2") as run:
        assert run.end() == 0 and not run.complained()
        assert run.printed().startswith(main.__doc__)


def test_help_whose_reader_leaves_is_no_error(monkeypatch):  # --help | head
    def write(_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(stop._Now, "lost", None)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write))
    cli.run(["main.py", "--help"], "")
    assert stop._Now.lost
