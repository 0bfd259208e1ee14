"""Several processes that run one program: they join, agree, and end together."""

import contextlib
import json
import os
import re
import sys
import time
import traceback
from functools import cache

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from vnca.program import Stopped, VncaError, first_line


def initialize(coordinator, processes, process_id):
    """Connects the processes of one run.

    If all three flags are given, they define the processes. If the coordinator is "auto", JAX finds
    the processes by itself (TPU pods, Slurm, Open MPI, Kubernetes). Without flags there is one
    process. Raises VncaError if the flags do not fit together or JAX refuses them. If process 0
    does not answer, JAX waits for five minutes and then aborts the process.
    """
    given = [x is not None for x in (coordinator, processes, process_id)]
    if coordinator == "auto":
        if sum(given) > 1:
            raise VncaError("--coordinator=auto sets --processes and --process_id: leave them out")
        try:
            jax.distributed.initialize()
        except Exception as fault:  # a bad environment variable of the cluster can raise any type
            raise VncaError(
                f"--coordinator=auto: JAX finds no cluster to join ({first_line(fault)}). Give "
                "--coordinator=HOST:PORT, --processes and --process_id, or none of them on one host"
            ) from fault
        return
    if any(given) and not all(given):
        raise VncaError(
            "--coordinator, --processes and --process_id go together: give all three or none"
        )
    if all(given):
        port = re.fullmatch(r"\S+:([1-9]\d{0,4})", coordinator)
        if not port or int(port[1]) > 65_535:
            raise VncaError(f"--coordinator={coordinator}: it must be HOST:PORT, as in host0:1234")
        if not 0 <= process_id < processes:
            raise VncaError(
                f"--process_id={process_id}: it must be at least 0 and less than "
                f"--processes={processes}"
            )
        try:
            jax.distributed.initialize(coordinator, processes, process_id)
        except (RuntimeError, ValueError) as fault:
            remedy = (
                "Check that process 0 is running and that --processes and --process_id are right"
            )
            if "RPC server" in str(fault):  # process 0 itself
                remedy = "Its port may be in use on this host: give --coordinator another one"
            raise VncaError(
                f"cannot join the other processes at {coordinator}: {first_line(fault)}. {remedy}"
            ) from fault


OUT_OF_MEMORY = (
    "a device has too little memory: stop other programs that use it, or lower "
    "config.train.micro_batch (in a new --workdir, since a run keeps its own) or, in an "
    "evaluation, config.eval.chunk"
)


@contextlib.contextmanager
def ends_for_all():
    """A context in which a fault of one process ends all processes of a run.

    If this process fails, or finds that another one is lost, it exits at once, without cleanup. The
    exit status is 1, or 128 + the number of a signal. JAX's own shutdown would wait for the other
    processes, and they would wait for this one. The others then find this process lost. If one of
    them is inside a device call that does not fail, JAX aborts it after 100 seconds without a
    heartbeat. A single process fails as usual.
    """
    try:
        yield
    except Stopped:  # every process has stopped, so JAX's shutdown need not wait
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
        raise
    except BaseException as fault:
        if isinstance(fault, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(fault):
            fault = VncaError(OUT_OF_MEMORY)
        if not jax.distributed.is_initialized():
            raise fault
        lost = "Gloo|NCCL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED"
        if isinstance(fault, SystemExit):
            os._exit(fault.code if isinstance(fault.code, int) else 1)
        if isinstance(fault, KeyboardInterrupt):
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        if isinstance(fault, VncaError):
            print("error:", *str(fault).splitlines(), file=sys.stderr, flush=True)
            # All processes may have this error, and each should print it. JAX aborts the others
            # when process 0 ends, so process 0 ends last.
            time.sleep(5 if is_first() else 3)
        elif isinstance(fault, (ValueError, jax.errors.JaxRuntimeError)) and re.search(
            lost, str(fault)
        ):
            print(
                f"error: another process is lost ({first_line(fault)}). Start all processes "
                "again to resume from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        else:
            traceback.print_exc()
        os._exit(1)


def is_first():
    """Whether this is process 0, the only process that writes files and prints."""
    return jax.process_index() == 0


def gather(local):
    """Gathers rows from all processes, [local devices, …] -> NumPy [all devices, …]."""
    if jax.process_count() == 1:
        return np.asarray(local)
    return np.concatenate(multihost_utils.process_allgather(np.asarray(local)))


@cache
def _largest():
    """A function that maps [local devices] to the maximum over all devices, repeated."""
    return jax.pmap(lambda x: lax.pmax(x, "devices"), "devices")


def ask_all(ask):
    """Returns a function that returns the largest answer of any process to ask(), an integer. All
    processes get the same answer at the same call.

    With several processes, ask() is called now, and the devices exchange the answers after the work
    that they have queued. More work can be queued before the returned function waits for the
    answer.
    """
    if jax.process_count() == 1:
        return ask
    answer = _largest()(np.full(jax.local_device_count(), ask(), np.int32))
    return lambda: int(answer.addressable_data(0)[0])


def agree(decide):
    """Calls decide() on process 0 and returns its value, of JSON's types, on every process.

    If decide() raises a VncaError, every process raises it, so that no process waits forever.
    """
    if jax.process_count() == 1:
        return decide()
    answer = {}
    if is_first():
        try:
            answer = {"value": decide()}
        except VncaError as fault:
            answer = {"error": str(fault)}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(text.size)))
    padded = np.resize(text, length)  # only the length matters on the other processes
    answer = json.loads(multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes())
    if "error" in answer:
        raise VncaError(answer["error"])
    return answer["value"]


def from_first(tree, shapes):
    """Sends process 0's pytree of arrays to every process. shapes: the same pytree of shapes and
    dtypes. Other processes may give anything as `tree`."""
    if jax.process_count() == 1:
        return tree
    if not is_first():
        tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return multihost_utils.broadcast_one_to_all(tree)
