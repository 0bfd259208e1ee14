"""Ctrl-C and SIGTERM, for which loops look between device calls."""

import contextlib
import os
import signal
import socket
import threading
import time

from vnca.program import VncaError


@contextlib.contextmanager
def stop_signals(log):
    """Yields a function that says whether a signal has arrived, and a log to use instead of `log`.

    Loops call the function between device calls. The signals are SIGINT (Ctrl-C) and SIGTERM. A
    second one, at least a second later, ends the process at once with status 128 + its number.

    If `log` raises a VncaError, the new log behaves as if a signal had arrived, so that the run is
    saved. The error is raised at the end.
    """
    arrived, errors = [], []

    def patient_log(line):
        try:
            log(line)
        except VncaError as fault:
            errors.append(fault)

    read, write = socket.socketpair()
    write.setblocking(False)

    def listen():
        # Python runs a signal's handler in the main thread, which a device call can block for
        # minutes. The signal's number arrives here at once.
        first = None
        while number := read.recv(1):
            if first is None:
                first = time.monotonic()
                arrived.append(number)
                name = signal.Signals(number[0]).name
                patient_log(
                    f"{name}: stopping after this device call; send it again to stop at once"
                )
            elif time.monotonic() - first > 1:  # sooner, it is the same one, passed on by a wrapper
                os._exit(128 + number[0])

    listener = threading.Thread(target=listen, daemon=True)
    previous_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    previous = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    listener.start()
    try:
        yield lambda: bool(arrived or errors), patient_log
        if errors:
            raise VncaError(
                f"{errors[0]}; stopped: run the same command again to resume"
            ) from errors[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        write.close()
        listener.join()
        read.close()
