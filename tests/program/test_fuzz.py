"""Whatever is asked, on the command line or by a config file, is done or refused in one line.

Every case runs main.main; training and evaluation only show the config that has come to them.
"""

import ast
import json
import math
import os
from typing import NamedTuple

import numpy as np
import pytest
import test_config
import test_data
import tiny

from vnca.program import VncaError, checkpoint, config, data

SHOW = """
def show(settings, workdir, log, **_):
    given = {"mode": main.MODE.value, "workdir": workdir}
    print(json.dumps(vnca.program.config.flatten(settings) | given))
vnca.program.train.train = vnca.program.evaluate.evaluate = show
"""
MODELS = "doubling", "nondoubling", "healing", "baseline"
# Of a field that has texts: those that it takes, from the table of test_config.
GOOD = {field: [str(value) for value in values] for field, values in test_config.GOOD.items()} | {
    "data.dir": ["a folder", "é", "0"],  # any text: the folder is looked for later
    "model.name": [],  # each config has its own
    "model.train_steps": ["(1,1000)", "7,7", "[1,2]", "(1,2)"],
    "eval.images": ["1", "10000"],  # of the test set
    "train.encoder_from": ["a folder", "é", "0"],  # as data.dir
    "train.clip_norm": ["1", "0.5", "1e3", "1e-30", "1e9"],
    "train.debug_nans": ["True", "False", "1", "0"],
}
for _field in test_config.UNSET:
    GOOD[_field].append("None")
TEXTS = "data.dir", "train.encoder_from"
ODD = [
    *("", "word", "é", "½", "True", "None", "'1'", '"1"', "[1]", "[1,2]", "(1,2)", "(1,2.0)"),
    *("(2,1)", "(1,True)", "((1,2),3)", "(1", "(" * 300, "{}", "{'a': 1}", "a\nb"),
    *("0", "-1", "0.5", "1e3", "1e30", "1e-300", "nan", "inf", "-inf", "5\n--config.x=3"),
    *(str(2**31), str(2**63), str(10**400), "9" * 5000),
]  # fmt: skip
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
LINES = {  # of a config file's get_config(): what the error has in it, or what the run has
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


class Case(NamedTuple):
    """Arguments, and what must become of them."""

    args: list[str]
    words: str | None = None  # in the error, where they are refused
    asked: dict | None = None  # else: what the run sees, besides the defaults of its config file


def file_of(name):
    """The name of a model's config file."""
    return tiny.FILES.get(name, name)


def flags(name, values):
    """A model's config with these values of its fields."""
    return [
        f"--config=configs/{file_of(name)}.py",
        *(f"--config.{f}={v}" for f, v in values.items()),
    ]


def meant(field, text):
    """The value that a text stands for."""
    if field == "train.debug_nans":
        return text in ("True", "1")
    if text == "None":
        return None
    if field.startswith("data.") or field in TEXTS or text[0] not in "(['0123456789":
        return text
    value = ast.literal_eval(text)
    return list(value) if isinstance(value, tuple) else value


def has(name, field):
    return name in config.FIELDS[field].models


def values(field):
    """Every text for a field, of the first model that has it; and a good one for every model."""
    first = next(name for name in MODELS if has(name, field))
    low, high = test_config.WHOLE.get(field, (0, 0))
    beyond = [str(low - 1), str(high + 1)] if field in test_config.WHOLE else []
    for text in dict.fromkeys([*GOOD[field], *beyond, *ODD]):
        good = text in GOOD[field] or (field in TEXTS and text)
        asked = {field: meant(field, text)} if good else None
        yield Case(flags(first, {field: text}), f"config.{field}", asked)
    for name in MODELS:
        text = GOOD[field][0] if GOOD[field] else name
        asked = {field: meant(field, text)} if has(name, field) else None
        yield Case(flags(name, {field: text}), f"config.{field}", asked)


def near_names(field, random):
    """Names that are not quite the field's."""
    at, (section, _, last) = random.randint(len(field)), field.rpartition(".")
    names = {field[:at] + s + field[at + 1 :] for s in ("", field[at] * 2, "é", "\n")}
    names |= {f"{section}..{last}", f".{field}", f"{field}.", f"{field}.x", f"{field}[0]", "lock"}
    names |= {f"{field} ", f"{section}['{last}']", field.upper(), field.replace("_", "-"), last, ""}
    for name in [*random.permutation(sorted(names - {field}))[:9], section or "train"]:
        yield Case(flags("doubling", {name: 1}), f"config.{name}=")
    yield Case([*flags("doubling", {}), f"--noconfig.{field}x"], f"config.{field}x: there is no")


def combinations(count, random):
    """Two or three fields at once, with values together and apart, of which some are wrong."""
    for _ in range(count):
        name = random.choice(config.KINDS)  # healing's fields depend on each other
        fields = [f for f in config.FIELDS if has(name, f) and f != "model.name"]
        texts, wrong, args = {}, [], flags(name, {})
        for field in random.permutation(fields)[: random.randint(2, 4)].tolist():
            pool = GOOD[field] if random.rand() < 0.75 else ODD
            text = texts[field] = pool[random.randint(len(pool))]
            if text not in GOOD[field] and (field not in TEXTS or not text):
                wrong.append(field)
            flag = f"--config.{field}"
            together = (
                field == "train.debug_nans" or random.rand() < 0.5
            )  # a flag without a value, too
            args += [f"{flag}={text}"] if together else [flag, text]
        asked = {field: meant(field, text) for field, text in texts.items()} if not wrong else None
        yield Case(args, "|".join(f"config.{field}" for field in wrong), asked)


def of_flags():
    """Flags that are repeated, unknown, without a value, out of order or out of range."""
    d, n = "--config=configs/doubling.py", "--config=configs/nondoubling.py"
    seed, hosts = "--config.seed=3", [d, "--coordinator=h:1", "--processes=1", "--process_id=0"]
    yield Case(
        [d, "--config.seed=1", seed, "--mode=evaluate"], None, {"seed": 3, "mode": "evaluate"}
    )
    yield Case([d, "--workdir=a", "--workdir=b\nc"], None, {"workdir": "b\nc"})
    yield Case(["-config", d[9:], "-config.seed", "3"], None, {"seed": 3})
    yield Case([d, "--config.data={'name': 'auto', 'dir': 'x'}"], None, {"data.dir": "x"})
    yield Case([d, "--config.data={'name': 'auto', 'dir': 'x', 'y': {}}"], "config.data.y")
    yield Case([d, "--config.train={'updates': 5}"], "config.train.batch_size is missing")
    yield Case([d, n], n)
    yield Case([n, d, "--config.model.steps=3"], d)
    yield Case([seed, d], seed)
    yield Case([d, "--", seed], seed)
    for flag in ("config", "workdir", "mode", "coordinator", "processes", "config.data.dir"):
        yield Case([f"--{flag}"] if flag == "config" else [d, f"--{flag}"], f"--{flag}")
        yield Case([*[d] * (flag != "config"), f"--{flag}", seed], f"--{flag} has no value")
    for flag in ("seed", "wrokdir", "Mode", "-mode", "nomode", "noworkdir", "config_", "é", "a\nb"):
        yield Case([d, f"--{flag}=train"], flag)
    for file in (".", "configs", "/dev/null", "a" * 5000, "a\nb", "configs/doubling.py:x"):
        yield Case([f"--config={file}"], f"--config={file}")
    for flag in ("--processes=" + "9" * 400, "--processes=0", "--process_id=1", "--process_id=x"):
        yield Case([*hosts, flag], flag.split("=")[0])
    for address in ("h:65536", "h:0", "h:-1", "h", "", "a\nb:1"):
        yield Case([*hosts, f"--coordinator={address}"], f"--coordinator={address}")


def of_files(folder):
    """Config files that are broken, odd or unusual."""
    texts = {WRITTEN.format(line): words for line, words in LINES.items()}
    for line, fault in RAISES.items():
        texts |= dict.fromkeys([line, WRITTEN.format(line)], "--config={}: " + fault)
    for number, (text, words) in enumerate((texts | FILES).items()):
        path = folder / f"written{number}.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if isinstance(words, dict):
            yield Case([f"--config={path}"], None, words | {"workdir": f"runs/{path.stem}"})
            continue
        yield Case([f"--config={path}"], words.format(path))
        if text in texts and "raise" in text:  # no field is to blame for what the file does
            yield Case([f"--config={path}", "--config.train.updates=9"], words.format(path))


def some(cases, share, random):
    """A share of the cases: of those that are accepted and of those that are refused, one or more
    each, where there are any."""
    for good in (True, False):
        kind = [case for case in cases if (case.asked is not None) == good]
        yield from (kind[i] for i in random.permutation(len(kind))[: math.ceil(share * len(kind))])


@pytest.fixture(
    scope="module", params=[0.1, pytest.param(1, marks=pytest.mark.slow)], ids=["a tenth", "all"]
)
def share(request):
    """How much of what there is to try is tried."""
    return request.param


@pytest.fixture(scope="module")
def found(share, tmp_path_factory):
    """The cases by their group, each with its exit status, output and errors."""
    random, folder = np.random.RandomState(0), tmp_path_factory.mktemp("configs")
    groups = {field: [*values(field), *near_names(field, random)] for field in config.FIELDS}
    groups["combinations"] = list(combinations(200, random))
    groups["flags"], groups["files"] = list(of_flags()), list(of_files(folder))
    groups = {group: list(some(cases, share, random)) for group, cases in groups.items()}
    results = iter(tiny.outcomes([c.args for cases in groups.values() for c in cases], SHOW))
    return {group: [(case, next(results)) for case in cases] for group, cases in groups.items()}


def is_as_it_must_be(case, result):
    status, out, err = result
    if case.asked is None:
        one_line = err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1
        named = any(" ".join(w.splitlines()) in err for w in case.words.split("|"))
        return status == 1 and one_line and named and not out
    given = "".join(case.args[:2])
    name = next((n for n in map(file_of, MODELS) if f"configs/{n}.py" in given), "doubling")
    defaults = config.flatten(tiny.committed(name))
    defaults |= {"mode": "train", "workdir": f"runs/{name}"}
    return status == 0 and not err and json.loads(out) == defaults | case.asked


@pytest.mark.parametrize("group", [*config.FIELDS, "combinations", "flags", "files"])
def test_what_is_asked_is_done_or_refused_in_one_line_that_names_it(found, group):
    for case, result in found[group]:
        assert is_as_it_must_be(case, result), (case, result)


def test_both_ends_happen_often(found, share):
    cases = [case for group in found.values() for case, _ in group]
    assert 100 * share < sum(case.asked is not None for case in cases) < len(cases) - 1000 * share


def test_an_interrupt_in_a_config_file_is_the_users_own(tmp_path):
    (tmp_path / "config.py").write_text("raise KeyboardInterrupt")
    assert tiny.outcomes([[f"--config={tmp_path}/config.py"]]) == [[130, "", "interrupted\n"]]


# Files and folders.


def test_a_name_that_is_too_long_is_no_folder_of_checkpoints():
    assert checkpoint.paths("a" * 5000) == []


def test_a_pipe_or_device_in_place_of_data_is_not_waited_for(tmp_path):
    path = tmp_path / "packed.npz"
    path.symlink_to("/dev/null")  # first, as it has an end
    test_data.assert_refused("packed.npz: it is not a file", tmp_path)
    path.unlink()
    os.mkfifo(path)
    test_data.assert_refused("packed.npz: it is not a file", tmp_path)


@pytest.mark.parametrize("form", ["texts", "npz", "cache"])
def test_data_damaged_anywhere_is_refused_or_whole(tmp_path, form, share):
    random, source = np.random.RandomState(0), test_data.small_source()
    make = test_data.write_texts if form == "texts" else test_data.write_cache
    folder = make(tmp_path / "data")
    files, refused = sorted(folder.iterdir()), 0
    for _ in range(int(300 * share)):
        path = files[random.randint(len(files))]
        good = path.read_bytes()
        at, size = random.randint(len(good)), random.randint(1, 50)
        flipped = bytes([good[at] ^ 1 << random.randint(8)])
        path.write_bytes(
            [
                good[:at] + flipped + good[at + 1 :],
                good[:at],
                good[:at] + good[at + size :],
                good[:at] + random.bytes(size) + good[at:],
                good + random.bytes(size),
                good[:at] + bytes(size) + good[at + size :],
            ][random.randint(6)]
        )
        where = {"cache_dir": folder} if form == "cache" else {"data_dir": folder}
        try:
            test_data.assert_is_stand_in(data.load("larochelle", source=source, **where))
        except VncaError as fault:
            assert str(path) in str(fault) and len(str(fault).splitlines()) == 1
            refused += 1
        path.write_bytes(good)
    assert refused > 200 * share
