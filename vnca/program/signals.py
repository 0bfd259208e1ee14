"""Ctrl-C and SIGTERM as a flag that loops check between device calls."""

import contextlib
import os
import signal
import socket
import threading
import time

from vnca.program import VncaError


@contextlib.contextmanager
def stop_signals(log):
    """A context that yields a function stop_asked and a replacement for `log`.

    stop_asked() tells whether SIGINT (Ctrl-C) or SIGTERM has arrived. Loops call it between device
    calls. Another signal, at least one second later, ends the process at once with status 128 + its
    number. If `log` raises a VncaError, the replacement counts that as a signal, so that the loop
    saves its work. The error is raised at the end of the context.
    """
    arrived, faults = [], []

    def patient_log(line):
        try:
            log(line)
        except VncaError as fault:
            faults.append(fault)

    read, write = socket.socketpair()
    write.setblocking(False)

    def listen():
        # Python runs signal handlers in the main thread, which a device call can block for minutes.
        # This thread receives the number at once.
        first = None
        while number := read.recv(1):
            if first is None:
                first = time.monotonic()
                arrived.append(number)
                name = signal.Signals(number[0]).name
                patient_log(
                    f"{name}: stopping after this device call; send it again to stop at once"
                )
            elif time.monotonic() - first > 1:  # sooner, a wrapper may have passed on the first
                os._exit(128 + number[0])

    listener = threading.Thread(target=listen, daemon=True)
    previous_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    previous = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    listener.start()
    try:
        yield lambda: bool(arrived or faults), patient_log
        if faults:
            raise VncaError(
                f"{faults[0]}; stopped: run the same command again to resume"
            ) from faults[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        write.close()
        listener.join()
        read.close()
