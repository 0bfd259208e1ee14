"""python main.py --config=configs/NAME.py [--config.FIELD=VALUE …] [--workdir=DIR] [--mode=MODE]

Trains and measures a Variational Neural Cellular Automaton. The configs say what they do.
"""

import re
import signal
import sys
import warnings
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from vnca import VncaError

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, a file of configs/; --config.FIELD=VALUE changes a field."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and pictures (default: runs/NAME of config)."
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "summary", "benchmark"],
    "train: from the newest checkpoint in the workdir, or anew. evaluate: the test IWELBO of the "
    "newest checkpoint. summary: parameters, arithmetic and memory. benchmark: the time of an "
    "update and of an evaluation, against this machine's matrix product.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several hosts: HOST:PORT of process 0 (not needed on TPU pods)."
)
PROCESSES = flags.DEFINE_integer("processes", None, "Several hosts: how many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several hosts: the number of this, from 0.")


def main(argv):
    """Runs the program; returns its exit status: 0, or 1 after one line about a user's mistake."""
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv):
        print(usage())
        return 0
    # An exception, so that what was begun is cleaned up; training takes the signal over later.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        parse(argv)
        run()
    except VncaError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was anything to save
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run():
    """Does what the flags say."""
    # JAX starts here, after the mistakes that are quick to find.
    from vnca import benchmark, devices, evaluate, summary, train
    from vnca.run import keep_compiled

    if MODE.value != "benchmark":  # which measures how long compiling takes
        keep_compiled()
    devices.initialize(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)

    def log(line):
        if devices.is_first():
            print(line, flush=True)

    modes = {
        "train": train.train,
        "evaluate": evaluate.evaluate,
        "summary": summary.summary,
        "benchmark": benchmark.benchmark,
    }
    with devices.ends_with_the_others():
        modes[MODE.value](CONFIG.value, WORKDIR.value, log)


def parse(argv):
    """Reads the flags and checks the config. Raises VncaError for the first mistake."""
    from vnca import config

    logging.set_verbosity(logging.ERROR)  # a warning of ml_collections comes as our error below
    given = re.findall(r"^--?config\.([\w.]+)(.*)$", "\n".join(argv[1:]), re.MULTILINE)
    for field, value in given:
        if field not in config.SECTIONS:
            config.check_known(field, value)
    named = re.search(r"^--?config[=\n](.*)", "\n".join(argv[1:]), re.MULTILINE)
    file = named[1] if named else None
    if not file:
        raise VncaError("--config is missing: for a start, --config=configs/quickstart.py")
    if not Path(file).is_file():
        raise VncaError(f"--config={file}: there is no such file; configs/ has some")
    try:
        with warnings.catch_warnings():  # ml_collections 1.1 loads a file by a deprecated method
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            rest = FLAGS(argv)[1:]
        if rest:
            raise VncaError(f"{rest[0]!r} is not a flag; did you mean --config={rest[0]}?")
        config.check(CONFIG.value)
        if not FLAGS["workdir"].present:
            FLAGS.workdir = str(Path("runs", Path(file).stem))
        if not WORKDIR.value:
            raise VncaError("--workdir is empty: give a folder, or leave it out")
    except VncaError:
        raise
    except flags.Error as fault:
        field = re.search(r"--config\.([\w.]+)", str(fault))
        would_do = field and field[1] in config.FIELDS and config.FIELDS[field[1]][2]
        remedy = f"; it must be {would_do}" if would_do else "; --help lists the flags"
        raise VncaError(_last_line(fault) + remedy) from fault
    except AttributeError as fault:  # so ml_collections says that a config lacks a field
        field = next((f + v for f, v in given if f.split(".")[-1] in str(fault)), None)
        raise VncaError(
            f"config.{field}: the model of {file} has no such field; leave it out"
            if field
            else f"--config={file}: {_last_line(fault)}"
        ) from fault
    except Exception as fault:  # the config file is a program of the user's: anything may come
        raise VncaError(f"--config={file}: {type(fault).__name__}: {_last_line(fault)}") from fault


def _last_line(fault):
    return (str(fault).strip().splitlines() or [""])[-1].strip()


def usage():
    """Our flags, then the fields of the config, each with what it may be."""
    from vnca import config

    ours = [FLAGS[name] for name in ("config", "workdir", "mode")]
    ours += [FLAGS[name] for name in ("coordinator", "processes", "process_id")]
    width = max(map(len, config.FIELDS)) + len("--config.")
    lines = [__doc__, "Flags:"]
    lines += [f"  {'--' + flag.name:{width}}  {flag.help}" for flag in ours]
    lines += ["", "Fields of the config (a model's own fields go with that model alone):"]
    lines += [
        f"  {'--config.' + f:{width}}  {must_be}" for f, (_, _, must_be) in config.FIELDS.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
