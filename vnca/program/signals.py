"""Ctrl-C and SIGTERM, as a question that loops ask between device calls."""

import contextlib
import os
import signal
import socket
import threading
import time

from vnca.program import VncaError


@contextlib.contextmanager
def stop_signals(log):
    """Gives a function that says whether SIGINT (Ctrl-C) or SIGTERM has come: loops ask it between
    device calls. One more, a second or more later, ends the process at once, with status 128 + its
    number.

    And a log in place of `log`: where that raises a VncaError, it is as if a signal had come, so
    that what was done is saved; the fault is raised at the end."""
    came, lost = [], []

    def patient_log(line):
        try:
            log(line)
        except VncaError as fault:
            lost.append(fault)

    read, write = socket.socketpair()
    write.setblocking(False)

    def listen():
        # Python runs a signal's handler in the main thread, which a device call can hold for
        # minutes; the number arrives here at once.
        first = None
        while number := read.recv(1):
            if first is None:
                first = time.monotonic()
                came.append(number)
                name = signal.Signals(number[0]).name
                patient_log(f"{name}: stopping after this call; once more to stop at once")
            elif time.monotonic() - first > 1:  # not the same one, passed on by a wrapper
                os._exit(128 + number[0])

    listener = threading.Thread(target=listen, daemon=True)
    kept_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    kept = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    listener.start()
    try:
        yield lambda: bool(came or lost), patient_log
        if lost:
            raise VncaError(f"{lost[0]}; stopped: the same command goes on from there") from lost[0]
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(kept_fd)
        write.close()
        listener.join()
        read.close()
