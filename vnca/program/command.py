"""The command line: its checks, --help, and printing."""

import ast
import itertools
import os
import re
import sys
import warnings
from pathlib import Path

from absl import flags, logging

from vnca.program import VncaError, config

FLAGS = flags.FLAGS


def parse(argv, ours, seen):
    """Reads the flags and checks the config. ours: the names of the program's own flags; seen: the
    list in which ml_collections looks for the fields, to be filled.

    Raises VncaError for the first error.
    """
    logging.set_verbosity(logging.ERROR)  # a warning of ml_collections becomes an error below
    try:
        argv = [_expand_home(arg) for arg in FLAGS.read_flags_from_files(argv, force_gnu=False)]
    except flags.Error as fault:
        raise VncaError(_last_line(fault).removeprefix("ERROR:: ")) from fault
    except UnicodeDecodeError as fault:
        raise VncaError(f"--flagfile: it is not UTF-8 ({fault})") from fault
    file, given = _find_config(argv, ours)
    seen[:] = argv
    argv, unset = _split_unset(argv)
    try:
        with warnings.catch_warnings():  # ml_collections 1.1 uses a deprecated method
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            rest = FLAGS(argv)[1:]
        if rest:
            raise VncaError(f"{rest[0]!r} is not a flag: {_meant(rest[0], ours)}")
        getattr(FLAGS.config, "keys", None)  # raises the OSError if the file could not be loaded
        for field in unset:
            section, name = field.split(".")
            FLAGS.config[section][name]  # raises an error if the model lacks it
            FLAGS.config[section][name] = None
        config.check(FLAGS.config)
        if not FLAGS["workdir"].present:
            FLAGS.workdir = str(Path("runs", Path(file).stem))
        FLAGS.workdir = os.path.expanduser(FLAGS.workdir)
        if not FLAGS.workdir:
            raise VncaError("--workdir is empty: give a folder, or leave it out")
    except (VncaError, KeyboardInterrupt):
        raise
    except flags.Error as fault:
        text = str(fault).strip()
        prefix = f"flag --config={file}: "  # of a ValueError or TypeError in get_config
        if text.startswith(prefix):
            raise VncaError(f"--config={file}: {_last_line(text.removeprefix(prefix))}") from fault
        field = re.search(r"--config\.([\w.]+)", text)
        known = field and config.FIELDS.get(field[1])
        remedy = f"; it must be {known.values.words}" if known else "; --help lists the flags"
        if "before a value for --config" in text:
            remedy = f"; put --config={file} first"
        raise VncaError(text + remedy) from fault
    except AttributeError as fault:  # ml_collections raises it if a config lacks a field
        missing = re.match(r"\W*(\w*)", str(fault))[1]
        field = next((f + v for f, v in given if f.split(".")[-1] == missing), None)
        raise VncaError(
            f"config.{field}: the model of {file} has no such field; leave it out"
            if field
            else f"--config={file}: {_last_line(fault)}"
        ) from fault
    except KeyError as fault:
        if fault.args[:1] not in [(section,) for section in config.SECTIONS]:
            raise VncaError(f"--config={file}: KeyError: {_last_line(fault)}") from fault
        raise VncaError(
            f"--config={file}: get_config() returned nothing named {fault}: it must return an "
            f"ml_collections.ConfigDict with the sections {', '.join(config.SECTIONS)}"
        ) from fault
    except BaseException as fault:  # a config file is a program, and may raise anything
        raise VncaError(f"--config={file}: {type(fault).__name__}: {_last_line(fault)}") from fault


def _meant(arg, ours):
    """What to do about an argument that is no flag, nor the value of one."""
    name = arg.partition("=")[0]
    if arg.startswith("-"):
        return "leave out the -- before it"
    if name in ours or name.startswith("config."):
        return f"did you mean --{arg}?"
    if arg in FLAGS["mode"].parser.enum_values and not FLAGS["mode"].present:
        return f"did you mean --mode={arg}?"
    if arg.lower() in ("true", "false"):
        return "give a flag its value after an equals sign"
    return "leave it out"


def _find_config(argv, ours):
    """The config file that the arguments name, and the config's fields in them: [(name, "=value")].

    Raises VncaError for an unknown field, a flag without a value, and unless there is one file.
    """
    files, fields = [], []
    for arg, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        name, equals, value = _split(arg)
        flag, _, field = name.removeprefix("no").partition(".")
        if flag == "config" and name != flag:
            fields.append((field, equals + value))
            if field not in config.SECTIONS:
                config.check_known(field, equals + value)
        is_switch = field in config.FIELDS and config.FIELDS[field].values is config.FLAG
        needs_value = flag in ours and not FLAGS[flag].boolean and not is_switch
        if needs_value and not equals and following.startswith("--"):
            raise VncaError(f"{arg} has no value: the next argument is {following}")
        if name == "config":
            files.append(value if equals else following)
    if not any(files):
        bare = [arg for arg in argv[1:] if arg.endswith(".py") and not arg.startswith("-")]
        remedy = "for a start, --config=configs/quickstart.py"
        if bare:
            remedy = f"did you mean --config={bare[0]}?"
        raise VncaError(f"--config is missing: {remedy}")
    if len(files) > 1:
        raise VncaError(f"--config={files[1]} is one too many, after --config={files[0]}")
    file = files[0]
    if not os.path.isfile(file):
        found = "it is not a file" if os.path.exists(file) else "there is no such file"
        raise VncaError(f"--config={file}: {found}; configs/ has some")
    return file, fields


def _split_unset(argv):
    """The arguments without those that set an optional field of the config to None, and the names
    of the fields that are None in the end. ml_collections takes None only for fields that the file
    leaves unset."""
    optional = {f"config.{name}" for name, field in config.FIELDS.items() if field.optional}
    kept, unset, rest = [], set(), iter(argv)
    for arg in rest:
        name, equals, value = _split(arg)
        following = [] if equals or name not in optional else [*itertools.islice(rest, 1)]
        if name in optional and ("".join(following) or value) == "None":
            unset.add(name)
        else:
            kept += [arg, *following]
            unset.discard(name)  # the last value counts
    return kept, [name.removeprefix("config.") for name in unset]


def _split(arg):
    """A flag's name, its equals sign and its value; three empty texts for another argument."""
    return arg.lstrip("-").partition("=") if arg.startswith("-") else ("", "", "")


def _expand_home(arg):
    """An argument with its ~ expanded, which the shell does not do after an equals sign."""
    flag, path = re.fullmatch(r"(--?config=)?(.*)", arg, re.DOTALL).groups("")
    return flag + os.path.expanduser(path)


def _last_line(fault):
    return (str(fault).strip().splitlines() or [""])[-1].strip()


def usage(program, ours):
    """The text of --help: the docstring of a program's file, our flags, and the config's fields."""
    source = Path(program).read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(source))  # `python -OO` leaves no __doc__
    width = max(map(len, config.FIELDS)) + len("--config.")
    lines = [doc, "", "Flags:"]
    for name in ours:
        first, *others = re.sub(r"^<.*?>: ", "", FLAGS[name].help).split("\n")  # <the modes>
        lines += [f"  {'--' + name:{width}}  {first}", *(f"{'':{width}}    {o}" for o in others)]
    lines += ["", "Fields of the config:"]
    for field in config.FIELDS.values():
        of_models = "" if field.models == config.MODELS else f" ({' and '.join(field.models)} only)"
        lines += [
            f"  {'--config.' + field.name:{width}}  {field.meaning}",
            f"{'':{width}}    {field.values.words}{of_models}",
        ]
    return "\n".join(lines)


def start_jax():
    """Imports JAX and chex, and returns JAX. Raises VncaError if JAX refuses the value of one of
    its environment variables, or if there is no room for temporary files."""
    try:
        import chex  # noqa: F401 (chex looks for a temporary folder)
        import jax
    except ValueError as fault:
        named = [name for name in os.environ if name.startswith("JAX_")]
        if not any(name.lower() in str(fault).lower() for name in named):
            raise
        raise VncaError(f"{fault}: set it to another value, or not at all") from fault
    except FileNotFoundError as fault:  # a module looks for a folder with room for temporary files
        raise VncaError(f"{fault.strerror}; make room, or set TMPDIR to another folder") from fault
    return jax


def open_streams():
    """Opens /dev/null in place of a standard stream that is closed. Otherwise a file that is opened
    later would take its number, and receive what XLA writes to standard error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def print_line(line):
    """Prints a line for a person, on process 0. Raises VncaError if that fails."""
    from vnca.program.hosts import is_first

    if is_first():
        say(line)


def say(text):
    """Prints text and flushes it. Raises VncaError if that fails."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # the terminal has no × or …
        encoding = sys.stdout.encoding
        say(text.encode(encoding, "replace").decode(encoding))
    except OSError as fault:
        # Otherwise Python would try to write the line again at exit, and report the error twice.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise VncaError(f"cannot write to standard output: {fault.strerror}") from fault
