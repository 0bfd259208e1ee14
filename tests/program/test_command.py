"""The command line: whatever is asked is done, or refused in one line that names it.

Every case runs main.main. In most of them training and evaluation only show the config that has
come to them. tests/program/test_config.py has every field with all its values.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from vnca.program import config

DOUBLING = "--config=configs/doubling.py"
NONDOUBLING = "--config=configs/nondoubling.py"
QUICKSTART = "--config=configs/quickstart.py"
SEED = "--config.seed=3"
HOSTS = [DOUBLING, "--coordinator=h:1", "--processes=1", "--process_id=0"]

# Each table below has cases: arguments, and words of the error; or, as a dict, what the run has
# besides the defaults of its config file.


def values():
    """One field of each type with the texts that it takes, and with others."""
    table = {
        "train.updates": (
            {"1": 1},
            ["", "word", "0.5", "1e3", "True", "None", "[1]", "'1'", "a\nb", "0", "9" * 5000],
        ),
        "train.clip_norm": (
            {"1": 1, "0.5": 0.5, "1e3": 1000},
            ["", "nan", "-inf", "1e-300", "True", "None", str(10**400)],
        ),
        "train.debug_nans": ({"True": True, "0": False}, ["", "word", "2", "None"]),
        "train.dtype": ({"bfloat16": "bfloat16"}, ["", "float16", "None"]),
        "data.dir": (
            {"é": "é", "0": "0", "5\n--config.x=3": "5\n--config.x=3", "None": None},
            [""],
        ),
        "model.train_steps": (
            {"(1,1000)": [1, 1000], "7,7": [7, 7], "[1,2]": [1, 2]},
            ["", "1", "(1,2.0)", "(1,True)", "((1,2),3)", "(1", "(" * 300, "{}", "None"],
        ),
        "eval.images": ({"10000": 10_000, "None": None}, ["", "10001", "1.5", "word"]),
    }
    for field, (taken, refused) in table.items():
        file = NONDOUBLING if field == "model.train_steps" else DOUBLING
        for text, value in taken.items():
            yield [file, f"--config.{field}={text}"], {field: value}
        for text in refused:
            yield [file, f"--config.{field}={text}"], f"config.{field}"
    yield [DOUBLING, "--config.eval.images", "None", "--config.seed", "3"], {"seed": 3}
    yield [QUICKSTART, "--config.train.decay_updates=None"], {"train.decay_updates": None}
    yield [DOUBLING, "--config.train.debug_nans", SEED], {"train.debug_nans": True, "seed": 3}
    yield [DOUBLING, "--noconfig.train.debug_nans", "--mode=evaluate"], {"mode": "evaluate"}
    every = "--config.train.log_every"
    yield [DOUBLING, f"{every}=None", f"{every}=5"], {"train.log_every": 5}
    yield [DOUBLING, f"{every}=5", every, "None"], {"train.log_every": None}
    yield (
        [DOUBLING, "--config.train.encoder_from=None"],
        "config.train.encoder_from=None: the",
    )
    yield [DOUBLING, "--config.model.name=baseline"], "config.model.doublings=5: the model baseline"


def names():
    """Names that are not quite those of fields."""
    for name in ("train", "train.", ".train", "train..updates", "train.updates.x", "updates", "é"):
        yield [DOUBLING, f"--config.{name}=1"], f"config.{name}="
    for name in ("train['updates']", "TRAIN.UPDATES", "lock", "seed ", "seed\n", "seed[0]", ""):
        yield [DOUBLING, f"--config.{name}=1"], f"config.{name}="
    yield [DOUBLING, "--noconfig.seedx"], "config.seedx: there is no"
    yield [DOUBLING, "--config.train.batchsize=8"], "did you mean config.train.batch_size?"


def of_flags():
    """Flags that are repeated, unknown, without a value, out of order or out of range."""
    yield [DOUBLING, "--config.seed=1", SEED, "--mode=evaluate"], {"seed": 3, "mode": "evaluate"}
    yield [DOUBLING, "--workdir=a", "--workdir=b\nc"], {"workdir": "b\nc"}
    yield ["-config", DOUBLING[9:], "-config.seed", "3"], {"seed": 3}
    yield [DOUBLING, "--config.data={'name': 'auto', 'dir': 'x'}"], {"data.dir": "x"}
    yield [DOUBLING, "--config.data={'name': 'auto', 'dir': 'x', 'y': {}}"], "config.data.y"
    yield [DOUBLING, "--config.train={'updates': 5}"], "config.train.batch_size is missing"
    yield [], "--config is missing"
    yield [DOUBLING, NONDOUBLING], NONDOUBLING
    yield [NONDOUBLING, DOUBLING, "--config.model.steps=3"], DOUBLING
    yield [SEED, DOUBLING], f"was specified; put {DOUBLING} first"
    yield [DOUBLING, "--", SEED], f"{SEED!r} is not a flag: leave out the -- before it"
    yield [DOUBLING[9:]], f"--config is missing: did you mean {DOUBLING}?"
    yield [DOUBLING, DOUBLING[9:]], f"{DOUBLING[9:]!r} is not a flag: leave it out"
    yield [DOUBLING, "evaluate"], "'evaluate' is not a flag: did you mean --mode=evaluate?"
    yield [DOUBLING, "-mode", "train", "study"], "'study' is not a flag: leave it out"
    yield [DOUBLING, SEED[2:]], f"{SEED[2:]!r} is not a flag: did you mean {SEED}?"
    yield [DOUBLING, "mode=study"], "'mode=study' is not a flag: did you mean --mode=study?"
    yield [DOUBLING, "--plain", "false"], "'false' is not a flag: give a flag its value after an"
    yield [DOUBLING, "--flagfile=/nowhere"], "error: Unable to open flagfile"
    yield [DOUBLING, "--workdir="], "--workdir is empty"
    yield [DOUBLING, "--mode=dream"], "dream"
    yield [DOUBLING, "--checkpoint=7"], "--checkpoint=7: an update or a path, for evaluate"
    yield [DOUBLING, "--topology=h100"], "--topology=h100 needs --mode=compile, not --mode=train"
    for flag in ("config", "workdir", "mode", "coordinator", "processes", "config.data.dir"):
        yield [f"--{flag}"] if flag == "config" else [DOUBLING, f"--{flag}"], f"--{flag}"
        yield [*[DOUBLING] * (flag != "config"), f"--{flag}", SEED], f"--{flag} has no value"
    for flag in ("seed", "wrokdir", "Mode", "-mode", "nomode", "noworkdir", "config_", "é", "a\nb"):
        yield [DOUBLING, f"--{flag}=train"], flag
    for file in (".", "configs", "/dev/null", "a" * 5000, "a\nb", "configs/dubbling.py"):
        yield [f"--config={file}"], f"--config={file}"
    for flag in ("--processes=" + "9" * 400, "--processes=0", "--process_id=1", "--process_id=x"):
        yield [*HOSTS, flag], flag.split("=")[0]
    for flags in (HOSTS[1:2], HOSTS[2:], HOSTS[1:3]):
        yield [DOUBLING, *flags], "--coordinator, --processes and --process_id go together"
    yield [DOUBLING, "--coordinator=auto", "--processes=2"], "--coordinator=auto sets --processes"
    for address in ("h:65536", "h:0", "h:-1", "h:abc", "h", "", "a\nb:1"):
        yield [*HOSTS, f"--coordinator={address}"], f"--coordinator={address}: it must be HOST:PORT"


WRITTEN = """
import numpy as np
from configs.doubling import get_config as doubling
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict
from ml_collections.config_dict import placeholder
def get_config():
    c = doubling()
    with c.ignore_type():
        {}
    return c
"""
LINES = {  # of a config file's get_config()
    "c.train.learning_rate = float('nan')": "config.train.learning_rate=nan",
    "c.train.clip_norm = np.inf": "config.train.clip_norm=inf",
    "c.train.clip_norm = np.float32(1)": "config.train.clip_norm=",
    "c.train.clip_norm = 10**400": "--config={}: int too large",
    "c.train.clip_norm = 1j": "config.train.clip_norm=1j",
    "c.train.clip_norm = np.float64(2)": {"train.clip_norm": 2},
    "c.train.updates = np.int64(5)": "config.train.updates=",
    "c.train.updates = np.arange(3)": "config.train.updates=",
    "c.train.updates = '5'": "config.train.updates='5'",
    "c.train.updates = 10**5000": "--config={}: ValueError",
    "c.train.updates = ConfigDict({'a': 1})": "config.train.updates.a",
    "c.train.updates = ConfigDict()": "config.train.updates=",
    "c.train.updates = FieldReference(7)": {"train.updates": 7},
    "c.train.updates = c.train.get_ref('batch_size') + 1": {"train.updates": 33},
    "c.train.updates = c.train.get_ref('batch_size') // 0": "ZeroDivisionError",
    "c.train.updates = placeholder(int, required=True)": "--config={}: RequiredValueError",
    "c.train.log_every = placeholder(str)": {},
    "c.model.name = ['doubling']": "config.model.name=['doubling']",
    "c.model.name = 'a\\nb'": "config.model.name=",
    "c.model.train_steps = (1, 2)": "config.model.train_steps=[1, 2]",
    "c.extra = ConfigDict()": "config.extra",
    "c.train.extra = {}": "config.train.extra",
    "c['a\\nb'] = 1": "config.a b",
    "c.train.loop = c": "--config={}: RecursionError",
    "c.train = 3": "config.train=3",
    "c.train = ConfigDict()": "config.train.updates is missing",
    "c.train = ConfigDict({1: 2})": "config.train.1",
    "del c.train": "config.train.updates is missing",
    "del c.model.name": "config.model.name is missing",
    "c = FrozenConfigDict(c)": "--config={}: ",
    "c = ConfigDict()": "config.seed is missing",
    "c = 3": "get_config() returned 3",
    "c = type('C', (), {'__repr__': lambda _: 'a\\nb'})()": "get_config() returned a b",
    "c.lock()": {},
}
RAISES = {  # as the file is imported, or in get_config()
    "raise SystemExit(0)": "SystemExit: 0",
    "raise SystemExit('a\\nb')": "SystemExit: b",
    "raise GeneratorExit": "GeneratorExit",
    "raise MemoryError": "MemoryError",
    "raise ValueError('a\\nb')": "b",
    "raise AttributeError('no updates')": "no updates",
    "raise KeyError('no such thing')": "KeyError: 'no such thing'",
    "f = lambda: f(); f()": "RecursionError",
    "1 + 'a'": "TypeError: ",
    "None.updates": "'NoneType' object has no attribute 'updates'",
    "open('/nowhere/at/all')": "OSError: ",
    "import no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
}
FILES = {  # whole config files, as bytes
    b"\x00\x01": "SyntaxError",
    b"\x7fELF\xff\xfe": "SyntaxError",
    b"x = '\xe9'": "SyntaxError",
    b"x = " + b"(" * 500: "SyntaxError",
    b"if 1:\n\tx = 1\n        y = 2": "TabError",
    b"": "get_config",
    b"get_config = 3": "TypeError",
    b"class get_config: pass": "ConfigDict",
    b"def get_config(x): return x": "TypeError",
    b"def get_config(): yield 1": "ConfigDict",
}


def of_files(folder):
    """Config files, and one of flags, that are broken, odd or unusual."""
    texts = {WRITTEN.format(line): words for line, words in LINES.items()}
    for line, fault in RAISES.items():
        texts |= dict.fromkeys([line, WRITTEN.format(line)], "--config={}: " + fault)
    for number, (text, words) in enumerate((texts | FILES).items()):
        path = folder / f"written{number}.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if isinstance(words, dict):
            yield [f"--config={path}"], words | {"workdir": f"runs/{path.stem}"}
            continue
        yield [f"--config={path}"], words.format(path)
        if text in texts and "raise" in text:  # no field is to blame for what the file does
            yield [f"--config={path}", "--config.train.updates=9"], words.format(path)
    path = folder / "dict.py"
    path.write_text("def get_config():\n    return {'seed': 0}\n")
    yield [f"--config={path}", "--config.train.updates=4"], "ConfigDict with the sections"
    path = folder / "latin.flags"
    path.write_bytes("--workdir=Übung".encode("latin-1"))
    yield [DOUBLING, f"--flagfile={path}"], "--flagfile: it is not UTF-8"


SHOW = """
def show(settings, workdir, log, **_):
    given = {"mode": main.MODE.value, "workdir": workdir}
    print(json.dumps(vnca.program.config.flatten(settings) | given))
vnca.program.train.train = vnca.program.evaluate.evaluate = show
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The cases by their group, each with its exit status, output and errors."""
    folder = tmp_path_factory.mktemp("configs")
    groups = {"values": values(), "names": names(), "flags": of_flags(), "files": of_files(folder)}
    groups = {group: list(cases) for group, cases in groups.items()}
    results = iter(tiny.outcomes([args for cases in groups.values() for args, _ in cases], SHOW))
    return {group: [(*case, next(results)) for case in cases] for group, cases in groups.items()}


def assert_is_one_line(args, result, words):
    status, out, err = result
    assert status == 1 and not out, args
    is_one_line = err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1
    assert is_one_line and " ".join(words.splitlines()) in err, (args, words, err)


@pytest.mark.parametrize("group", ["values", "names", "flags", "files"])
def test_what_is_asked_is_done_or_refused_in_one_line_that_names_it(asked, group):
    for args, wanted, result in asked[group]:
        if isinstance(wanted, str):
            assert_is_one_line(args, result, wanted)
            continue
        others = [Path(arg).stem for arg in args if arg in (NONDOUBLING, QUICKSTART)]
        name = others[0] if others else "doubling"
        defaults = config.flatten(tiny.committed(name))
        defaults |= {"mode": "train", "workdir": f"runs/{name}"}
        status, out, err = result
        assert status == 0 and not err, (args, err)
        assert json.loads(out) == defaults | wanted, args


SHOW_WHICH = """
import vnca.program.train
import vnca.report.benchmark, vnca.report.check, vnca.report.figures, vnca.report.study
def show(settings, workdir, log, *_, which=None, make_method, **__):
    print(main.MODE.value, which, make_method.keywords["plain"])
vnca.program.train.train = vnca.report.check.check = vnca.report.benchmark.benchmark = show
vnca.report.figures.figures = vnca.report.study.study = vnca.program.evaluate.evaluate = show
"""


def test_the_modes_that_take_a_checkpoint_are_given_it():
    modes = "evaluate", "figures", "study"
    flags = ["--config=configs/doubling.py", "--checkpoint=7"]
    found = tiny.outcomes([[*flags, f"--mode={mode}"] for mode in modes], SHOW_WHICH)
    assert [out for _, out, _ in found] == [f"{mode} 7 False\n" for mode in modes]


def test_every_mode_that_computes_the_method_does_it_plainly_if_asked():
    modes = "train", "evaluate", "figures", "study", "check", "benchmark"
    flags = ["--config=configs/doubling.py", "--plain"]
    found = tiny.outcomes([[*flags, f"--mode={mode}"] for mode in modes], SHOW_WHICH)
    assert [out.splitlines()[-1] for _, out, _ in found] == [f"{mode} None True" for mode in modes]


MISTAKES = {  # that are found later: arguments, with {} for a folder, and words of the error
    "checkpoint that is not there": (
        ["--mode=evaluate", "--checkpoint=7", "--workdir={}/run"],
        "--checkpoint=7: there is no file {}/run/checkpoint_00000007.npz",
    ),
    "batch that eight devices do not divide": (
        ["--config.train.batch_size=12", "--workdir={}/run"],
        "train.batch_size=12: it must be a multiple of 8 on 8 devices: 8 or 16 would do",
    ),
    "workdir inside a file": (
        ["--workdir={}/file/run"],
        "cannot make {}/file/run: Not a directory; choose another --workdir (",
    ),
    "data folder that is none": (
        ["--config.data.dir={}/nowhere", "--config.data.name=larochelle", "--workdir={}/run"],
        "data.dir={}/nowhere is not a folder",
    ),
    "nothing to evaluate": (
        ["--mode=evaluate", "--config.data.name=bundled", "--workdir={}/run"],
        "{}/run has no checkpoint",
    ),
}
HELP = ["--help", "-help", "-h", "--helpfull", "--helpshort"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What became of each of MISTAKES and each cry for help, and the folder: exit status, output,
    errors."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "file").touch()
    commands = [[DOUBLING, *(arg.format(folder) for arg in args)] for args, _ in MISTAKES.values()]
    commands += [[arg] for arg in HELP] + [[DOUBLING, "--config.train.batch_size=8", "--help"]]
    found = tiny.outcomes(commands)
    return folder, dict(zip(MISTAKES, found, strict=False)), found[len(MISTAKES) :]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_is_found_later_costs_one_line_as_well(done, mistake):
    (folder, results, _), (args, words) = done, MISTAKES[mistake]
    assert_is_one_line(args, results[mistake], words.replace("{}", str(folder)))


def test_a_mistake_leaves_no_files_but_a_lock(done):
    folder, _, _ = done
    assert {path.name for path in folder.iterdir()} <= {"file", "run"}
    assert {path.name for path in folder.glob("run/*")} <= {".lock"}


def test_an_interrupt_in_a_config_file_is_the_users_own(tmp_path):
    (tmp_path / "config.py").write_text("raise KeyboardInterrupt")
    assert tiny.outcomes([[f"--config={tmp_path}/config.py"]]) == [[130, "", "interrupted\n"]]


def test_help_shows_our_flags_first_and_says_what_each_does(done):
    _, _, answers = done
    assert [status for status, _, _ in answers] == [0] * len(answers)
    assert all(answer == answers[0] for answer in answers) and not answers[0][2]
    lines = answers[0][1].splitlines()
    assert lines[0].startswith("python main.py --config=")
    shown = [re.match(r"  --([\w.]+)\s+(\S.*)", line) for line in lines if line.startswith("  --")]
    names = [match[1] for match in shown]
    ours = ["config", "workdir", "mode", "checkpoint", "topology", "plain"]
    ours += ["coordinator", "processes", "process_id"]
    assert names[: len(ours)] == ours
    assert all(len(match[2]) > 10 for match in shown)
    assert names[len(ours) :] == [f"config.{field}" for field in config.FIELDS]
    first, last = (next(i for i, line in enumerate(lines) if f" {words}" in line)
                   for words in ("train: from", "study: damage"))  # fmt: skip
    modes = [line.split(":")[0].split()[-1] for line in lines[first : last + 1]]
    assert modes[:2] == ["train", "evaluate"] and len(modes) == 9  # each on its own line
    below = lines.index(next(line for line in lines if "--config.model.steps " in line)) + 1
    assert lines[below].strip() == "a whole number from 1 to 1,000 (nondoubling and healing only)"


WITHOUT_CONFIGS = """
import sys
sys.modules["configs"] = None  # as where the package is installed, and no checkout is near
from vnca.program import command
command.flags.DEFINE_string("workdir", None, "Folder.")
print(command.usage(sys.argv[1], ["workdir"]))
"""


def test_help_needs_no_folder_of_configs():
    with tiny.Process("-c", WITHOUT_CONFIGS, tiny.ROOT / "main.py") as program:
        assert program.end() == 0, program.complained()
        assert "--config.train.learning_rate" in program.printed()


def test_the_program_itself_exits_with_the_status(tmp_path):
    # Side by side, and from another folder than its own.
    command = [sys.executable, str(tiny.ROOT / "main.py")]
    environment = os.environ | {"PYTHONPATH": ""}
    good, bad = (
        subprocess.Popen(
            [*command, *args], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for args in (["--help"], [f"--config={tiny.ROOT}/configs/doubling.py", "--nonsense"])
    )  # fmt: skip
    try:
        out, err = good.communicate(timeout=60)
        assert good.returncode == 0 and "--workdir" in out and not err
        out, err = bad.communicate(timeout=60)
        assert bad.returncode == 1 and not out
        assert "nonsense" in err and err.count("\n") == 1
    finally:
        for process in (good, bad):
            process.kill()
            process.wait()


STREAMS = """
import os, sys
from vnca.program import command
command.open_streams()
os.write(2, b"what XLA says")
print("a line", flush=True)
print("an error", file=sys.stderr, flush=True)
os._exit(len(open(sys.argv[1]).read()))
"""


def test_closed_streams_do_not_write_into_files_that_are_opened_later(tmp_path):
    (tmp_path / "file").touch()
    command = f'exec {sys.executable} -c "$0" "$1" 2>&-'
    later = STREAMS.replace("os.write", "file = open(sys.argv[1], 'a')\nos.write", 1)
    ended = subprocess.run(["sh", "-c", command, later, str(tmp_path / "file")], cwd=tiny.ROOT)
    assert ended.returncode == 0
