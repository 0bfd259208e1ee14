"""Several processes of one run: how they join, agree and end together."""

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

from vnca.program import VncaError


def initialize(coordinator=None, processes=None, process_id=None):
    """Joins the processes of one run. Without flags, this process is the only one.

    With coordinator="auto", JAX finds the others (TPU pods, Slurm, Open MPI, Kubernetes). Raises
    VncaError if the flags do not fit together or JAX refuses them. If process 0 does not answer,
    JAX waits for five minutes and then aborts the process itself.
    """
    given = [x is not None for x in (coordinator, processes, process_id)]
    if coordinator == "auto":
        if sum(given) > 1:
            raise VncaError("--coordinator=auto finds --processes and --process_id: leave them out")
        try:
            jax.distributed.initialize()
        except Exception as fault:  # a variable of the cluster can cause any kind
            raise VncaError(
                f"--coordinator=auto: JAX finds no cluster to join ({_first_line(fault)}); give "
                "--coordinator=HOST:PORT, --processes and --process_id, or, on one host, no flag"
            ) from fault
        return
    if any(given) and not all(given):
        raise VncaError("--coordinator, --processes and --process_id go together: give all three")
    if all(given):
        port = re.fullmatch(r"\S+:([1-9]\d{0,4})", coordinator)
        if not port or int(port[1]) > 65_535:
            raise VncaError(
                f"--coordinator={coordinator}: it must be HOST:PORT, such as host0:1234"
            )
        if not 0 <= process_id < processes:
            raise VncaError(
                f"--process_id={process_id}: it must be from 0 to below --processes={processes}"
            )
        try:
            jax.distributed.initialize(coordinator, processes, process_id)
        except (RuntimeError, ValueError) as fault:
            raise VncaError(
                f"cannot join the other processes at {coordinator}: {_first_line(fault)}; "
                "is process 0 running, and are --processes and --process_id right?"
            ) from fault


def _first_line(fault):
    return (str(fault).splitlines() or [type(fault).__name__])[0]


@contextlib.contextmanager
def ends_for_all():
    """Ends one of several processes outright if it fails, or finds that another has failed.

    Its status is 1, or 128 + the signal's number. JAX's own shutdown would wait for the others, and
    they for this one; now they lose the connection. JAX aborts a process that does not notice this
    inside a device call, after 100 seconds without a heartbeat.
    """
    try:
        yield
    except BaseException as fault:
        if not jax.distributed.is_initialized():
            raise
        disconnected = "Gloo|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED"
        if isinstance(fault, SystemExit):
            os._exit(fault.code if isinstance(fault.code, int) else 1)
        if isinstance(fault, KeyboardInterrupt):
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        if isinstance(fault, VncaError):
            print("error:", *str(fault).splitlines(), file=sys.stderr, flush=True)
            # Every process may have the same error to report. Process 0 ends last, since JAX
            # aborts the others when it does.
            time.sleep(5 if is_first() else 3)
        elif isinstance(fault, (ValueError, jax.errors.JaxRuntimeError)) and re.search(
            disconnected, str(fault)
        ):
            print(
                f"error: another process is lost ({_first_line(fault)}); start all processes again "
                "to resume from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        else:
            traceback.print_exc()
        os._exit(1)


def is_first():
    """Whether this is process 0, which alone writes files and prints."""
    return jax.process_index() == 0


def gather(local):
    """Joins the rows of all processes: NumPy [local devices, …] -> [all devices, …]."""
    if jax.process_count() == 1:
        return np.asarray(local)
    return np.concatenate(multihost_utils.process_allgather(np.asarray(local)))


@cache
def _largest():
    """A device call that gives every device the largest of all values, [local devices]."""
    return jax.pmap(lambda x: lax.pmax(x, "devices"), "devices")


def ask_all(ask):
    """Returns a function that says whether ask() is true on any process.

    With several processes, ask() is called now, and the devices exchange the answers after their
    current work. So the caller can give them more work before it waits for the answer.
    """
    if jax.process_count() == 1:
        return ask
    answer = _largest()(np.full(jax.local_device_count(), ask(), np.int32))
    return lambda: bool(answer.addressable_data(0)[0])


def any_process(flag):
    """Whether the flag is set on any process."""
    return ask_all(lambda: flag)()


def agree(decide):
    """Process 0 calls decide(), and every process returns the result, a value that JSON can hold.

    If decide() raises a VncaError, so does every process, so that none waits forever.
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
    padded = np.resize(text, length)  # only its shape matters on the other processes
    answer = json.loads(multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes())
    if "error" in answer:
        raise VncaError(answer["error"])
    return answer["value"]


def from_first(tree):
    """Process 0's arrays on every process."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)
