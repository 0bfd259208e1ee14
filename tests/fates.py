"""Runs of tiny models that something befalls: a kill at a chosen step or time, a signal, storage
that fails."""

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


def trap(
    steps,
    path,
    nth=1,
    error=None,
    cut=None,
    shell="true",
    lost=False,
    signals=(),
    pause=0,
    kill=True,
):
    """An audit hook for the nth, or every, of these steps ("open", "os.rename", …) that has `path`
    in a path of it.

    There, it raises the OSError of the number `error`; or kills the process in a write, once a file
    has `cut` bytes; or runs a shell's command, makes writing to the output fail (lost), sends the
    process signals, (seconds from now, number), pauses, as a slow disk does, and kills it.
    """
    count = itertools.count(1)

    def hook(step, paths):
        if step not in steps or path not in str(paths) or nth not in (None, next(count)):
            return
        if error:
            raise OSError(error, os.strerror(error), paths[0])
        if cut:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
            return limit_files(cut)
        subprocess.run(shell, shell=True)
        if lost:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 1)
        for delay, number in signals:
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        time.sleep(pause)
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def contents(folder):
    """{path: SHA-256} of every file in a folder, but for one that says which process has it."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def is_one_line(outcome, *words):
    """Whether a command ended with status 1 and one line that has these words in it."""
    status, _, complaint = outcome
    assert (status, complaint.count("\n"), complaint[:7]) == (1, 1, "error: "), outcome
    assert all(str(word) in complaint for word in words), complaint
    return True
