"""The command line: what may be wrong with it, --help, and the lines that it prints."""

import ast
import os
import re
import sys
import warnings
from pathlib import Path

from absl import flags, logging

from vnca.program import VncaError, config

FLAGS = flags.FLAGS


def parse(argv, ours):
    """Reads the flags, of which `ours` are the names, and checks the config.

    Raises VncaError for the first mistake.
    """
    logging.set_verbosity(logging.ERROR)  # a warning of ml_collections comes as our error below
    try:
        argv = [_at_home(arg) for arg in FLAGS.read_flags_from_files(argv, force_gnu=False)]
    except flags.Error as fault:
        raise VncaError(_last_line(fault)) from fault
    given, files = [], []
    for arg, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        name, equals, value = arg.lstrip("-").partition("=") if arg.startswith("-") else [""] * 3
        flag, _, field = name.removeprefix("no").partition(".")
        if flag == "config" and name != flag:
            given.append((field, equals + value))
            if field not in config.SECTIONS:
                config.check_known(field, equals + value)
        if flag in ours and not equals and following.startswith("--"):
            raise VncaError(f"{arg} has no value: what follows it is {following}")
        if name == "config":
            files.append(value if equals else following)
    if not any(files):
        raise VncaError("--config is missing: for a start, --config=configs/quickstart.py")
    if len(files) > 1:
        raise VncaError(f"--config={files[1]} is one too many, after --config={files[0]}")
    file = files[0]
    if not os.path.isfile(file):
        found = "it is not a file" if os.path.exists(file) else "there is no such file"
        raise VncaError(f"--config={file}: {found}; configs/ has some")
    try:
        with warnings.catch_warnings():  # ml_collections 1.1 loads a file by a deprecated method
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            rest = FLAGS(argv)[1:]
        if rest:
            raise VncaError(f"{rest[0]!r} is not a flag; did you mean --config={rest[0]}?")
        getattr(FLAGS.config, "keys", None)  # raises the OSError that kept the file from loading
        config.check(FLAGS.config)
        if not FLAGS["workdir"].present:
            FLAGS.workdir = str(Path("runs", Path(file).stem))
        FLAGS.workdir = os.path.expanduser(FLAGS.workdir)
        if not FLAGS.workdir:
            raise VncaError("--workdir is empty: give a folder, or leave it out")
    except (VncaError, KeyboardInterrupt):
        raise
    except flags.Error as fault:
        text, of_file = str(fault).strip(), f"flag --config={file}: "
        if text.startswith(of_file):  # so absl wraps a ValueError or TypeError of get_config
            raise VncaError(f"--config={file}: {_last_line(text.removeprefix(of_file))}") from fault
        field = re.search(r"--config\.([\w.]+)", text)
        known = field and config.FIELDS.get(field[1])
        remedy = f"; it must be {known.values.words}" if known else "; --help lists the flags"
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


def _at_home(arg):
    """An argument whose path begins with ~, which the shell leaves so after an equals sign."""
    flag, path = re.fullmatch(r"(--?config=)?(.*)", arg, re.DOTALL).groups("")
    return flag + os.path.expanduser(path)


def _last_line(fault):
    return (str(fault).strip().splitlines() or [""])[-1].strip()


def usage(program, ours):
    """The text of --help: the docstring of a program's file, our flags, and the config's fields."""
    source = Path(program).read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(source))  # `python -OO` leaves no __doc__
    width = max(map(len, config.FIELDS)) + len("--config.")
    lines = [doc, "Flags:", *(f"  {'--' + name:{width}}  {FLAGS[name].help}" for name in ours)]
    lines += ["", "Fields of the config:"]
    for field in config.FIELDS.values():
        of_models = "" if field.models == config.MODELS else f" ({' and '.join(field.models)} only)"
        lines += [
            f"  {'--config.' + field.name:{width}}  {field.meaning}",
            f"{'':{width}}    {field.values.words}{of_models}",
        ]
    return "\n".join(lines)


def print_line(line):
    """Prints a line for a person, on process 0. Raises VncaError where that cannot be."""
    from vnca.program.hosts import is_first

    if is_first():
        say(line)


def say(text):
    """Prints text at once. Raises VncaError where that cannot be."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a terminal without × or …
        encoding = sys.stdout.encoding
        say(text.encode(encoding, "replace").decode(encoding))
    except OSError as fault:
        # Python would try again to write the line as it exits, and complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise VncaError(f"cannot write to standard output: {fault.strerror}") from fault
