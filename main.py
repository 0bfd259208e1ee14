"""python main.py --config=configs/NAME.py [--config.FIELD=VALUE …] [--workdir=DIR] [--mode=MODE]

Trains and measures a Variational Neural Cellular Automaton. Each file in configs/ is an experiment.

Exit status: 0, all is done. 1, one line says what is wrong. 130, 143 or 129, SIGINT (Ctrl-C),
SIGTERM or SIGHUP stopped it; training, evaluate and study are saved, and the same command resumes.
"""

import contextlib
import os
import sys
from functools import partial

from absl import flags
from ml_collections import config_flags

from vnca.program import Stopped, VncaError
from vnca.program.command import open_streams, parse, print_line, say, start_jax, usage
from vnca.program.quiet import quiet
from vnca.program.signals import die_at_once, end_at_once

ARGV = []  # parse() fills it; ml_collections would read sys.argv, and its flag files, at import
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, a file of configs/; its fields are below.", sys_argv=ARGV
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and pictures (default: runs/NAME of config)."
)
MODES = {
    "train": "from the newest checkpoint in the workdir, or anew",
    "evaluate": "the test IWELBO of the newest checkpoint, or of the packaged model",
    "summary": "parameters, arithmetic and memory",
    "operations": "a list of every operation of an update and of an evaluation",
    "check": "whether this machine computes the method right, and what to do if it does not",
    "benchmark": "the speed of updates and evaluation, compared with a matrix product",
    "compile": "memory and estimated time on TPUs or GPUs that need not be here (--topology)",
    "figures": "pictures, animations, plots, and a page to play with in a browser",
    "study": "damage recovery, stability, and the IWELBO by samples and by class",
}
MODE = flags.DEFINE_enum(
    "mode", "train", list(MODES), "\n".join(f"{name}: {does}" for name, does in MODES.items())
)
TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:2x4", "compile: TPUs (v5e:2x4, v3:2x2, …) or GPUs (h100, h100:8, a100, t4, …)."
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "evaluate, figures, study: an update or a path, in place of the newest."
)
PLAIN = flags.DEFINE_boolean(
    "plain", None, "Use vnca/*.py as they are, without fast forms (default: for operations only)."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several hosts: HOST:PORT of process 0; auto: TPU pod, Slurm, Open MPI, …"
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "Several hosts: how many processes there are.", upper_bound=2**31 - 1
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several hosts: this process, from 0.")
OURS = "config", "workdir", "mode", "checkpoint", "topology", "plain"
OURS += "coordinator", "processes", "process_id"


def main(argv):
    """Runs the program; returns its exit status, which the docstring of this file explains."""
    open_streams()
    try:
        if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv):
            say(usage(__file__, OURS))
            return 0
        parse(argv, OURS, ARGV)
        run()
    except VncaError as fault:
        print("error:", *str(fault).splitlines(), file=sys.stderr)  # a name may span lines
        return 1
    except Stopped as stop:
        return stop.status
    except KeyboardInterrupt:  # before there was anything to save
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:  # by another signal
        return end.code
    return 0


def run():
    """Does what the flags say."""
    mode, which = MODE.value, CHECKPOINT.value
    if which is not None and (mode not in ("evaluate", "figures", "study") or not which):
        raise VncaError(f"--checkpoint={which}: an update or a path, for evaluate, figures, study")
    if flags.FLAGS["topology"].present and mode != "compile":
        raise VncaError(f"--topology={TOPOLOGY.value} needs --mode=compile, not --mode={mode}")
    if mode == "compile":  # an accelerator of this machine is not needed, nor taken
        os.environ["JAX_PLATFORMS"] = "cpu"
    silence = quiet if mode == "compile" else contextlib.nullcontext  # of a plugin without a driver
    die_at_once()
    with silence():  # JAX starts here, after the errors that are quick to find
        jax = start_jax()
        from vnca.program import evaluate, hosts, machine, method, train
        from vnca.report import benchmark, check, figures, gpu, operations, packaged, study, summary

    machine.prepare(CONFIG.value, mode, one_process=COORDINATOR.value is None)
    hosts.initialize(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)
    end_at_once()  # here, since JAX has taken SIGTERM; training, evaluate and study do it later
    modes = {
        "train": partial(train.train, draw=figures.training_pictures, packaged=packaged.stand_in),
        "evaluate": partial(evaluate.evaluate, packaged=packaged.stand_in, which=which),
        "summary": summary.summary,
        "operations": operations.operations,
        "check": check.check,
        "benchmark": benchmark.benchmark,
        "compile": partial(gpu.compile_for, TOPOLOGY.value),
        "figures": partial(figures.figures, which=which),
        "study": partial(study.study, which=which),
    }
    plain = mode == "operations" if PLAIN.value is None else PLAIN.value
    make_method = partial(method.make_method, plain=plain)
    with hosts.ends_for_all():
        with silence():
            machine.find_devices()
        if plain and mode not in ("operations", "compile") and jax.default_backend() == "cpu":
            print_line("--plain: without its fast forms, a CPU takes several times as long")
        modes[mode](CONFIG.value, WORKDIR.value, log=print_line, make_method=make_method)


if __name__ == "__main__":
    status = main(sys.argv)
    if status > 128:  # a device call may still be running, and Python's own end would crash it
        os._exit(status)
    sys.exit(status)
