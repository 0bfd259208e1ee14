"""Runs of tiny models that something befalls: a kill at a chosen step or time, a signal, storage
that fails.

Each run is told its fate by its last argument, a dict in JSON (`befall`). A part of it happens at
the start; the rest waits for a step of the program (`trap`). Python calls an audit hook just before
a file is opened, renamed or removed, and there the deed is done.

Kills, signals, locks and files are real. What is pretended:

- Storage that fails is an OSError that the hook raises in place of the step.
- A full disk is a limit on the size of a file: EFBIG, where a disk says ENOSPC.
- A kill in the middle of a write is such a limit, too, with the signal SIGXFSZ left to kill.
- A lost terminal is an output that is open for reading only.
- A start is a fork of a process that has imported everything. It compiles without optimization. In
  its study, healing has one seed of 20 samples, and no packaged model takes single steps.
"""

import hashlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import tiny

import main
from vnca.program import runs
from vnca.report import study


def arguments(workdir, *args, name="baseline", **fields):
    """The arguments of main.py for the tiny config of a model in this workdir."""
    changed = (f"--config.{key}={value}" for key, value in tiny.settings(name, **fields).items())
    return [
        f"--config=configs/{tiny.FILES.get(name, name)}.py",
        *changed,
        f"--workdir={workdir}",
        *args,
    ]


def outcomes(*commands):
    """`tiny.outcomes` of pairs of arguments and a fate, {argument of `befall`: value}, on one
    device. A status −n is a death by signal n."""
    first = "import sys; sys.path.insert(0, 'tests'); import fates; fates.prepare()"
    return tiny.outcomes([[*args, json.dumps(fate)] for args, fate in commands], first)


def prepare():
    """Makes main.main take a fate, as JSON, as its last argument."""
    run = main.main

    def befallen(argv):
        befall(**json.loads(argv.pop()))
        return run(argv)

    main.main = befallen
    study.HEALING_SEEDS, study.PRIOR_SAMPLES = range(1), 20  # five seeds of 80 samples take minutes
    runs.packaged_names = lambda: ["baseline", "doubling"]  # healing takes minutes, too
    os.environ["XLA_FLAGS"] = f"{tiny.EMITTERS} --xla_force_host_platform_device_count=1"
    jax.config.update("jax_disable_most_optimizations", True)  # the environment is no longer read


def befall(before="true", held="nowhere", limit=None, ignored=(), **at_a_step):
    """Runs a shell's command, prints the `contents` of the folder `held`, limits the bytes of any
    file that is written, as a full disk does, ignores signals, and waits for a step."""
    subprocess.run(before, shell=True, check=True)
    print(json.dumps(contents(held)), flush=True)
    if limit:
        limit_files(limit)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if at_a_step:
        sys.addaudithook(trap(**at_a_step))


def trap(steps, path, nth=1, **deeds):
    """An audit hook that waits for the nth, or for every (None), of these steps ("open",
    "os.rename", …) on a file whose path has `path` in it. There, it does these of the `DEEDS`, in
    this order; if there are none, it kills the process."""
    count = itertools.count(1)

    def hook(step, paths):
        if step in steps and path in str(paths) and nth in (None, next(count)):
            for deed, value in (deeds or {"kill": True}).items():
                DEEDS[deed](value, paths)

    return hook


def fail(number, paths):
    raise OSError(number, os.strerror(number), paths[0])


def kill_in_a_write(size, _):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
    limit_files(size)


def lose_output(*_):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 1)


def send(signals, _):
    for delay, number in signals:
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()


DEEDS = {  # each is called with its value and the paths of the step
    "error": fail,  # the number of an OSError: the step raises it
    "cut": kill_in_a_write,  # bytes: the process is killed once a file that it writes has so many
    "shell": lambda command, _: subprocess.run(command, shell=True),
    "lost": lose_output,  # True: from now on, writing to the output fails
    "signals": send,  # (seconds from now, number) of each that the process gets
    "pause": lambda seconds, _: time.sleep(seconds),  # as a slow disk does
    "kill": lambda *_: os.kill(os.getpid(), signal.SIGKILL),  # True
}


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def contents(folder):
    """{path: SHA-256} of every file in a folder, but for one that says which process has it."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


POOL = {"pool_size", "pool_from", "pool_fresh", "damage_size", "encoder_from"}
# Of the fields of a pool, those that only these models had, before every config had all.
HAD = {"nondoubling": {"pool_size", "damage_size"}, "healing": POOL}


def older(config):
    """A config, nested dicts, as an earlier version saved it, which had fewer fields."""
    name = config["model"]["name"]
    later = {
        "model": {"likelihood", "size", "colours", "levels", "drawn_size"},
        "train": {"kl_weight"} | POOL - HAD.get(name, set()),
    }
    return config | {
        section: {field: value for field, value in config[section].items() if field not in fields}
        for section, fields in later.items()
    }


def is_one_line(outcome, *words):
    """Whether a command ended with status 1 and one line that has these words in it."""
    status, _, complaint = outcome
    assert (status, complaint.count("\n"), complaint[:7]) == (1, 1, "error: "), outcome
    assert all(str(word) in complaint for word in words), complaint
    return True
