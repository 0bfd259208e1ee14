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
    number."""
    came = []
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
                with contextlib.suppress(VncaError):  # of an output that is closed
                    log(f"{name}: stopping after this call; once more to stop at once")
            elif time.monotonic() - first > 1:  # not the same one, passed on by a wrapper
                os._exit(128 + number[0])

    listener = threading.Thread(target=listen, daemon=True)
    kept_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    kept = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    listener.start()
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(kept_fd)
        write.close()
        listener.join()
        read.close()
