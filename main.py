"""python main.py --config=configs/NAME.py [--config.FIELD=VALUE …] [--workdir=DIR] [--mode=MODE]

Trains and measures a Variational Neural Cellular Automaton. The configs say what they do.
"""

import contextlib
import os
import signal
import sys
from functools import partial

from absl import flags
from ml_collections import config_flags

from vnca.program import VncaError
from vnca.program.command import parse, print_line, say, usage
from vnca.program.quiet import quiet

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
    "compile: the same for TPUs or GPUs that need not be here (--topology), memory and time. "
    "figures: pictures, animations and plots of the newest checkpoint, and of the packaged models, "
    "and a page to play with them in a browser. "
    "study: damage recovery, stability, and the IWELBO by samples and by digit, of the same.",
)
TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:2x4", "TPUs to compile for, or v3:2x2, …; or GPUs: h100, h100:8, a100, t4, …"
)
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
OURS = "config", "workdir", "mode", "topology", "plain", "coordinator", "processes", "process_id"


def main(argv):
    """Runs the program; returns its exit status: 0, or 1 after one line about a user's mistake."""
    try:
        if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv):
            say(usage(__file__, OURS))
            return 0
        parse(argv, OURS)
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
    compiling = MODE.value == "compile"
    if compiling:  # an accelerator of this machine is not needed, nor taken
        os.environ["JAX_PLATFORMS"] = "cpu"
    silence = quiet if compiling else contextlib.nullcontext  # of a GPU's plugin without a driver
    try:  # JAX starts here, after the mistakes that are quick to find.
        with silence():
            import jax

            from vnca.program import evaluate, hosts, machine, method, train
            from vnca.report import benchmark, figures, gpu, operations, packaged, study, summary
    except ValueError as fault:  # so JAX refuses what one of its environment variables says
        raise VncaError(f"{fault}: set it to another value, or not at all") from fault

    machine.pin_settings()
    machine.mend_cache()
    if MODE.value not in ("benchmark", "compile"):  # which measure how long compiling takes
        machine.keep_compiled()
    machine.wait_longer()
    machine.join_all_reduces()
    if COORDINATOR.value is None:  # of several processes, each must have as many as the others
        machine.split_cpu(CONFIG.value)
    hosts.initialize(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)

    modes = {
        "train": partial(train.train, draw=figures.training_pictures),
        "evaluate": partial(evaluate.evaluate, packaged=packaged.stand_in),
        "summary": summary.summary,
        "operations": operations.operations,
        "benchmark": benchmark.benchmark,
        "compile": partial(gpu.compile_for, TOPOLOGY.value),
        "figures": figures.figures,
        "study": study.study,
    }
    plain = MODE.value == "operations" if PLAIN.value is None else PLAIN.value
    make_method = partial(method.make_method, plain=plain)
    with hosts.ends_for_all():
        with silence():
            machine.find_devices()
        if plain and MODE.value not in ("operations", "compile") and jax.default_backend() == "cpu":
            print_line(
                "--plain: without the CPU's fast forms, an update takes several times as long"
            )
        modes[MODE.value](CONFIG.value, WORKDIR.value, log=print_line, make_method=make_method)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
