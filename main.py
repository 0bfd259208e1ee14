"""python main.py --config=configs/NAME.py [--config.FIELD=VALUE …] [--workdir=DIR] [--mode=MODE]

Trains and measures a Variational Neural Cellular Automaton. The configs say what they do.

Exit status: 0, all is done. 1, one line says what is wrong. 130, 143 or 129, SIGINT (Ctrl-C),
SIGTERM or SIGHUP stopped it; training, evaluate and study are saved, and the same command resumes.
"""

import os
import sys
from functools import partial

from absl import flags
from ml_collections import config_flags

from vnca.program import Stopped, VncaError
from vnca.program.command import open_streams, parse, print_line, say, usage
from vnca.program.signals import die_at_once, end_at_once

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, a file of configs/; --config.FIELD=VALUE changes a field."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and pictures (default: runs/NAME of config)."
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "summary", "operations", "benchmark", "compile", "figures", "study"],
    "train: from the newest checkpoint in the workdir, or anew. evaluate: the test IWELBO of the "
    "newest checkpoint, or of the packaged model. summary: parameters, arithmetic and memory. "
    "operations: a list of every operation of an update and of an evaluation. "
    "benchmark: the time of an update and of an evaluation, against this machine's matrix product. "
    "compile: what TPUs that need not be here (--topology) are estimated to take for the same. "
    "figures: pictures, animations and plots of the newest checkpoint, and of the packaged models, "
    "and a page to play with them in a browser. "
    "study: damage recovery, stability, and the IWELBO by samples and by digit, of the same.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "The checkpoint that evaluate, figures and study take in place of the newest: the number of an "
    "update in the workdir, or a path.",
)
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "TPUs to compile for, or v3:2x2, v4:2x2x1, …")
PLAIN = flags.DEFINE_boolean(
    "plain",
    None,
    "Run the method as vnca/*.py states it, without its fast forms; slow on a CPU. The default is "
    "--plain for --mode=operations and --noplain for all other modes.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several hosts: HOST:PORT of process 0; auto: TPU pod, Slurm, Kubernetes."
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "Several hosts: how many processes there are.", upper_bound=2**31 - 1
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several hosts: the number of this, from 0.")
OURS = "config", "workdir", "mode", "checkpoint", "topology", "plain"
OURS += "coordinator", "processes", "process_id"


def main(argv):
    """Runs the program; returns its exit status, which the docstring of this file explains."""
    open_streams()
    try:
        if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv):
            say(usage(__file__, OURS))
            return 0
        parse(argv, OURS)
        run()
    except VncaError as fault:
        print("error:", *str(fault).splitlines(), file=sys.stderr)  # names and values may have more
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
    which = CHECKPOINT.value
    if which is not None and (MODE.value not in ("evaluate", "figures", "study") or not which):
        raise VncaError(
            f"--checkpoint={which}: it is an update or a path, for evaluate, figures and study"
        )
    if MODE.value == "compile":  # a TPU of this machine is not needed, nor taken
        os.environ["JAX_PLATFORMS"] = "cpu"
    die_at_once()
    try:  # JAX starts here, after the mistakes that are quick to find.
        import jax

        from vnca.program import evaluate, hosts, machine, method, train
        from vnca.report import benchmark, compile, figures, operations, packaged, study, summary
    except ValueError as fault:  # so JAX refuses what one of its environment variables says
        named = [name for name in os.environ if name.startswith("JAX_")]
        if not any(name.lower() in str(fault).lower() for name in named):
            raise
        raise VncaError(f"{fault}: set it to another value, or not at all") from fault
    except FileNotFoundError as fault:  # chex looks for a folder with room for temporary files
        raise VncaError(f"{fault.strerror}; make room, or set TMPDIR to another folder") from fault
    end_at_once()  # training, evaluate and study take the signals over later

    machine.pin_settings()
    machine.mend_cache()
    if MODE.value not in ("benchmark", "compile"):  # which measure how long compiling takes
        machine.keep_compiled()
    machine.wait_longer()
    if COORDINATOR.value is None:  # of several processes, each must have as many as the others
        machine.split_cpu(CONFIG.value)
    hosts.initialize(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)

    modes = {
        "train": partial(train.train, draw=figures.training_pictures),
        "evaluate": partial(evaluate.evaluate, packaged=packaged.stand_in, which=which),
        "summary": summary.summary,
        "operations": operations.operations,
        "benchmark": benchmark.benchmark,
        "compile": partial(compile.compile_for, TOPOLOGY.value),
        "figures": partial(figures.figures, which=which),
        "study": partial(study.study, which=which),
    }
    plain = MODE.value == "operations" if PLAIN.value is None else PLAIN.value
    make_method = partial(method.make_method, plain=plain)
    with hosts.ends_for_all():
        machine.find_devices()
        if plain and MODE.value != "operations" and jax.default_backend() == "cpu":
            print_line(
                "--plain: without the CPU's fast forms, an update takes several times as long"
            )
        modes[MODE.value](CONFIG.value, WORKDIR.value, log=print_line, make_method=make_method)


if __name__ == "__main__":
    status = main(sys.argv)
    if status > 128:  # a device call may still be running, and Python's own end would crash it
        os._exit(status)
    sys.exit(status)
