"""One program on several hosts: how they join, agree, and end together."""

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
    """Joins the hosts of one run: by the flags if given; with "auto" for coordinator, as JAX finds
    them (TPU pods, Slurm, Open MPI, Kubernetes); else this is one host.

    Raises VncaError where the flags do not fit together or JAX refuses them; but where process 0
    does not answer, JAX waits for five minutes and then aborts by itself.
    """
    given = [x is not None for x in (coordinator, processes, process_id)]
    if coordinator == "auto":
        if sum(given) > 1:
            raise VncaError("--coordinator=auto finds --processes and --process_id: leave them out")
        try:
            jax.distributed.initialize()
        except Exception as fault:  # of a variable of the cluster's, it may be any
            raise VncaError(
                f"--coordinator=auto: JAX finds no cluster to join ({_first_line(fault)}); "
                "give --coordinator=HOST:PORT, --processes and --process_id, or, for one host, none"
            ) from fault
        return
    if any(given) and not all(given):
        raise VncaError("--coordinator, --processes and --process_id go together: give all three")
    if all(given):
        port = re.fullmatch(r"\S+:([1-9]\d{0,4})", coordinator)
        if not port or int(port[1]) > 65_535:
            raise VncaError(f"--coordinator={coordinator}: it must be HOST:PORT, as in host0:1234")
        if not 0 <= process_id < processes:
            raise VncaError(
                f"--process_id={process_id}: it must be from 0 to --processes={processes} less 1"
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
    """Where one of several processes fails in any way, or finds that another has, ends it outright,
    with status 1 (128 + its number for a signal): JAX's own shutdown would wait for the others, and
    they for this one.

    So they find it lost. One that is not told so, inside a device call, is aborted by JAX when it
    has missed the heartbeat for 100 seconds.
    """
    try:
        yield
    except BaseException as fault:
        if not jax.distributed.is_initialized():
            raise
        lost = "Gloo|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED"
        if isinstance(fault, SystemExit):
            os._exit(fault.code if isinstance(fault.code, int) else 1)
        if isinstance(fault, KeyboardInterrupt):
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        if isinstance(fault, VncaError):
            print("error:", *str(fault).splitlines(), file=sys.stderr, flush=True)
            # It may be known to all, and each say so, if process 0, whose end aborts the others
            # in JAX, goes last.
            time.sleep(5 if is_first() else 3)
        elif isinstance(fault, (ValueError, jax.errors.JaxRuntimeError)) and re.search(
            lost, str(fault)
        ):
            print(
                f"error: another process is lost ({_first_line(fault)}); start all of them again, "
                "and they go on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        else:
            traceback.print_exc()
        os._exit(1)


def is_first():
    """Whether this is process 0, the only one that writes and prints."""
    return jax.process_index() == 0


def gather(local):
    """Rows from every process, NumPy [local devices, …] -> [all devices, …]."""
    if jax.process_count() == 1:
        return np.asarray(local)
    return np.concatenate(multihost_utils.process_allgather(np.asarray(local)))


@cache
def _largest():
    """The largest of all devices' numbers: [local devices] -> the same, each the largest of all."""
    return jax.pmap(lambda x: lax.pmax(x, "devices"), "devices")


def ask_all(ask):
    """Gives a function that says whether ask() is true on any process: all learn it at the same
    call.

    With several, ask() is called here, and the devices get it behind what they have to do, so that
    they can be given more before the answer is waited for.
    """
    if jax.process_count() == 1:
        return ask
    answer = _largest()(np.full(jax.local_device_count(), ask(), np.int32))
    return lambda: bool(answer.addressable_data(0)[0])


def any_process(flag):
    """Whether the flag is set on any process."""
    return ask_all(lambda: flag)()


def agree(decide):
    """What process 0 decides: its decide(), a value of JSON's types, on every process.

    A VncaError in it is raised on every process, so that none waits for the others in vain.
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
    padded = np.resize(text, length)  # the others' text is of no interest, only its length
    answer = json.loads(multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes())
    if "error" in answer:
        raise VncaError(answer["error"])
    return answer["value"]


def from_first(tree):
    """Process 0's arrays on every process."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)
