"""The command line: every mistake costs a moment and one line that names it."""

import os
import re
import subprocess
import sys

import pytest
import tiny

from vnca.program import config

GOOD = "--config=configs/doubling.py"
CONFIGS = {  # files of a user's
    "syntax": "def get_config(:\n",
    "empty": "",
    "none": "def get_config():\n    return None\n",
    "raises": "def get_config():\n    raise KeyError('no such thing')\n",
    "dict": "def get_config():\n    return {'seed': 0}\n",
    "bare": "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n",
    "extra": "from configs import doubling\ndef get_config():\n    config = doubling.get_config()\n"
    "    config.train.momentum = 0.9\n    return config\n",
}
MISTAKES = {  # name: arguments, with {} for the folder of CONFIGS; what the line has in it
    "unknown flag": ([GOOD, "--wrokdir=x"], ["wrokdir"]),
    "no config": ([], ["--config is missing"]),
    "config without a value": (["--config"], ["config"]),
    "no such config file": (["--config=configs/dubbling.py"], ["configs/dubbling.py"]),
    "config file that does not parse": (
        ["--config={}/syntax.py"],
        ["--config={}/syntax.py: SyntaxError"],
    ),
    "the same, its name apart": (
        ["--config", "{}/syntax.py"],
        ["--config={}/syntax.py: SyntaxError"],
    ),
    "config file without get_config": (
        ["--config={}/empty.py"],
        ["--config={}/empty.py: ", "get_config"],
    ),
    "get_config that returns nothing": (["--config={}/none.py"], ["get_config() returned None"]),
    "get_config that returns a dict": (["--config={}/dict.py"], ["ConfigDict"]),
    "get_config that returns a dict without the section of a flag": (
        ["--config={}/dict.py", "--config.train.updates=4"],
        ["ConfigDict", "train"],
    ),
    "a field unset that the model lacks": (
        [GOOD, "--config.train.encoder_from=None"],
        ["config.train.encoder_from=None", "no such field"],
    ),
    "a field unset that must be set": (
        [GOOD, "--config.train.updates=None"],
        ["config.train.updates", "None"],
    ),
    "checkpoint that is not there": (
        [GOOD, "--mode=evaluate", "--checkpoint=7", "--workdir={}/run"],
        ["--checkpoint=7: there is no file {}/run/checkpoint_00000007.npz"],
    ),
    "checkpoint in training": ([GOOD, "--checkpoint=7"], ["--checkpoint=7", "evaluate"]),
    "get_config that fails": (
        ["--config={}/raises.py"],
        ["--config={}/raises.py: ", "no such thing"],
    ),
    "config without fields": (["--config={}/bare.py"], ["config.seed is missing"]),
    "config with a field too many": (["--config={}/extra.py"], ["config.train.momentum"]),
    "mistyped field": (
        [GOOD, "--config.train.batchsize=8"],
        ["config.train.batchsize", "did you mean config.train.batch_size?"],
    ),
    "words for a number": ([GOOD, "--config.train.batch_size=many"], ["train.batch_size", "many"]),
    "field of another model": (
        [GOOD, "--config.model.name=baseline"],
        ["model.doublings", "baseline"],
    ),
    "section as a field": ([GOOD, "--config.train=3"], ["train"]),
    "stray argument": ([GOOD, "configs/doubling.py"], ["--config=configs/doubling.py"]),
    "stray word": ([GOOD, "train"], ["'train'"]),
    "unknown mode": ([GOOD, "--mode=dream"], ["mode", "dream"]),
    "empty workdir": ([GOOD, "--workdir="], ["--workdir"]),
    "words for a count of processes": ([GOOD, "--processes=two"], ["processes", "two"]),
    "a lone coordinator": ([GOOD, "--coordinator=localhost:1"], ["--processes", "--process_id"]),
    "a coordinator without a port": (
        [GOOD, "--coordinator=localhost", "--processes=1", "--process_id=0"],
        ["--coordinator=localhost:", "HOST:PORT"],
    ),
    "a coordinator whose port is a word": (
        [GOOD, "--coordinator=localhost:abc", "--processes=1", "--process_id=0"],
        ["--coordinator=localhost:abc", "HOST:PORT"],
    ),
    "batch that eight devices do not divide": (
        [GOOD, "--config.train.batch_size=12", "--workdir={}/run"],
        ["train.batch_size=12", "8 or 16 would do"],
    ),
    "workdir inside a file": ([GOOD, "--workdir={}/none.py/run"], ["none.py/run"]),
    "workdir that is a file": ([GOOD, "--workdir={}/none.py"], ["none.py"]),
    "data folder that is none": (
        [GOOD, "--config.data.dir={}/nowhere", "--config.data.name=larochelle", "--workdir={}/run"],
        ["data.dir={}/nowhere"],
    ),
    "nothing to evaluate": (
        [GOOD, "--mode=evaluate", "--config.data.name=bundled", "--workdir={}/run"],
        ["{}/run has no checkpoint"],
    ),
}
HELP = ["--help", "-help", "-h", "--helpfull", "--helpshort"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of each mistake and each cry for help: exit status, output, errors."""
    folder = tmp_path_factory.mktemp("cli")
    for name, text in CONFIGS.items():
        (folder / f"{name}.py").write_text(text)
    commands = [[arg.format(folder) for arg in args] for args, _ in MISTAKES.values()]
    commands += [[arg] for arg in HELP] + [[GOOD, "--config.train.batch_size=8", "--help"]]
    found = tiny.outcomes(commands)
    return folder, dict(zip(MISTAKES, found, strict=False)), found[len(MISTAKES) :]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_one_line_that_names_it(results, mistake):
    folder, outcomes, _ = results
    status, _, err = outcomes[mistake]
    assert status == 1, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    for words in MISTAKES[mistake][1]:
        assert words.format(folder) in err


def test_a_mistake_makes_no_folders_and_trains_nothing(results):
    folder, outcomes, _ = results
    assert not [name for name, (_, out, _) in outcomes.items() if "update" in out]
    assert {path.name for path in folder.iterdir() if path.suffix != ".py"} <= {
        "__pycache__",
        "run",
    }
    assert {path.name for path in folder.glob("run/*")} <= {".lock"}


def test_help_shows_our_flags_first_and_says_what_each_does(results):
    _, _, answers = results
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
