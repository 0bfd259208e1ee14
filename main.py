"""python main.py --config=configs/NAME.py [--config.FIELD=VALUE …] [--workdir=DIR] [--mode=MODE]

Trains and measures a Variational Neural Cellular Automaton. The configs say what they do.
"""

import inspect
import os
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
    ["train", "evaluate", "summary", "benchmark", "figures", "study"],
    "train: from the newest checkpoint in the workdir, or anew. evaluate: the test IWELBO of the "
    "newest checkpoint, or of the packaged model. summary: parameters, arithmetic and memory. "
    "benchmark: the time of an update and of an evaluation, against this machine's matrix product. "
    "figures: pictures, animations and plots of the newest checkpoint, and of the packaged models. "
    "study: damage recovery, stability, and the IWELBO by samples and by digit, of the same.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several hosts: HOST:PORT of process 0 (not needed on TPU pods)."
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "Several hosts: how many processes there are.", upper_bound=2**31 - 1
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several hosts: the number of this, from 0.")
OURS = "config", "workdir", "mode", "coordinator", "processes", "process_id"


def main(argv):
    """Runs the program; returns its exit status: 0, or 1 after one line about a user's mistake."""
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv):
        print(usage())
        return 0
    try:
        parse(argv)
        # An exception, so that what was begun is cleaned up; training takes the signal over later.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        run()
    except VncaError as fault:
        print("error:", *str(fault).splitlines(), file=sys.stderr)  # names and values may have more
        return 1
    except KeyboardInterrupt:  # before there was anything to save
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run():
    """Does what the flags say."""
    # JAX starts here, after the mistakes that are quick to find.
    from vnca import benchmark, devices, evaluate, figures, study, summary, train
    from vnca.run import keep_compiled

    if MODE.value != "benchmark":  # which measures how long compiling takes
        keep_compiled()
    if PROCESSES.value is None:  # of several, each must have as many as the others
        devices.split_cpu(CONFIG.value)
    devices.initialize(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)

    def log(line):
        if not devices.is_first():
            return
        try:
            print(line, flush=True)
        except OSError as fault:
            # Python would try again to write the line as it exits, and complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise VncaError(
                f"cannot write to standard output: {fault.strerror}; "
                "the same command goes on from the last checkpoint"
            ) from fault

    modes = {
        "train": train.train,
        "evaluate": evaluate.evaluate,
        "summary": summary.summary,
        "benchmark": benchmark.benchmark,
        "figures": figures.figures,
        "study": study.study,
    }
    with devices.ends_for_all():
        modes[MODE.value](CONFIG.value, WORKDIR.value, log)


def parse(argv):
    """Reads the flags and checks the config. Raises VncaError for the first mistake."""
    from vnca import config

    logging.set_verbosity(logging.ERROR)  # a warning of ml_collections comes as our error below
    given, files = [], []
    for arg, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        name, equals, value = arg.lstrip("-").partition("=") if arg.startswith("-") else [""] * 3
        flag, _, field = name.removeprefix("no").partition(".")
        if flag == "config" and name != flag:
            given.append((field, equals + value))
            if field not in config.SECTIONS:
                config.check_known(field, equals + value)
        if flag in OURS and not equals and following.startswith("--"):
            raise VncaError(f"{arg} has no value: what follows it is {following}")
        if name == "config":
            files.append(value if equals else following)
    if not any(files):
        raise VncaError("--config is missing: for a start, --config=configs/quickstart.py")
    if len(files) > 1:
        raise VncaError(f"--config={files[1]} is one too many, after --config={files[0]}")
    file = files[0]
    if not os.path.isfile(file):
        raise VncaError(f"--config={file}: there is no such file; configs/ has some")
    try:
        with warnings.catch_warnings():  # ml_collections 1.1 loads a file by a deprecated method
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            rest = FLAGS(argv)[1:]
        if rest:
            raise VncaError(f"{rest[0]!r} is not a flag; did you mean --config={rest[0]}?")
        getattr(CONFIG.value, "keys", None)  # raises the OSError that kept the file from loading
        config.check(CONFIG.value)
        if not FLAGS["workdir"].present:
            FLAGS.workdir = str(Path("runs", Path(file).stem))
        if not WORKDIR.value:
            raise VncaError("--workdir is empty: give a folder, or leave it out")
    except (VncaError, KeyboardInterrupt):
        raise
    except flags.Error as fault:
        text, of_file = str(fault).strip(), f"flag --config={file}: "
        if text.startswith(of_file):  # so absl wraps a ValueError or TypeError of get_config
            raise VncaError(f"--config={file}: {_last_line(text.removeprefix(of_file))}") from fault
        field = re.search(r"--config\.([\w.]+)", text)
        would_do = field and field[1] in config.FIELDS and config.FIELDS[field[1]][2]
        remedy = f"; it must be {would_do}" if would_do else "; --help lists the flags"
        raise VncaError(text + remedy) from fault
    except AttributeError as fault:  # so ml_collections says that a config lacks a field
        lacks = re.match(r"\W*(\w*)", str(fault))[1]
        field = next((f + v for f, v in given if f.split(".")[-1] == lacks), None)
        raise VncaError(
            f"config.{field}: the model of {file} has no such field; leave it out"
            if field
            else f"--config={file}: {_last_line(fault)}"
        ) from fault
    except BaseException as fault:  # the config file is a program: anything may come, an exit too
        raise VncaError(f"--config={file}: {type(fault).__name__}: {_last_line(fault)}") from fault


def _last_line(fault):
    return (str(fault).strip().splitlines() or [""])[-1].strip()


def usage():
    """Our flags, then the fields of the config, each with what it is and what it may be."""
    from configs import doubling, nondoubling
    from vnca import config

    width = max(map(len, config.FIELDS)) + len("--config.")
    lines = [__doc__, "Flags:", *(f"  {'--' + name:{width}}  {FLAGS[name].help}" for name in OURS)]
    lines += ["", "Fields of the config (a model's own fields go with that model alone):"]
    # What a field is, a comment in the config files says.
    source = inspect.getsource(nondoubling) + inspect.getsource(doubling)
    said = re.findall(r"([\w.]+) = .*  # (.*)", source)
    meanings = {field.removeprefix("config."): meaning for field, meaning in said}
    for field, (_, _, must_be) in config.FIELDS.items():
        lines += [
            f"  {'--config.' + field:{width}}  {meanings[field]}",
            f"{'':{width}}    {must_be}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
