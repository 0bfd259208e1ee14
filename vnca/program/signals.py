"""Signals that ask the program to end: SIGINT (Ctrl-C), SIGTERM and SIGHUP (a lost connection)."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

from vnca.program import Stopped, VncaError


def _stops():
    """The signals to obey. One that is ignored at the start stays ignored: SIGHUP under nohup, and
    SIGINT in a script's background job, where Ctrl-C is meant for the job in the foreground."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def die_at_once():
    """Gives the signals their default effect while modules are imported: NumPy turns an exception
    of a handler into an ImportError."""
    for number in _stops():
        signal.signal(number, signal.SIG_DFL)


def end_at_once():
    """Makes SIGTERM and SIGHUP raise SystemExit with status 128 + the signal's number, as SIGINT
    raises KeyboardInterrupt.

    An exception lets the program remove its temporary files. Python ignores an exception in a
    callback, of which JAX has one. Then the signal is sent again.
    """
    for number in set(_stops()) - {signal.SIGINT}:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    show = sys.unraisablehook

    def send_again(ignored):
        fault, number = ignored.exc_value, signal.SIGINT
        if isinstance(fault, SystemExit) and isinstance(fault.code, int) and fault.code > 128:
            number = fault.code - 128
        elif not isinstance(fault, KeyboardInterrupt):
            return show(ignored)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()  # after the callback

    sys.unraisablehook = send_again


@contextlib.contextmanager
def stop_signals(log):
    """Yields a function that says whether to stop, and a log to use instead of `log` until the end.

    Loops call the function between device calls, and raise Stopped when they have saved what is
    done. It returns the exit status to end with: 0 means go on; 128 + n means that signal n
    arrived. A second signal, at least a second later, ends the process at once with that status.

    If the work ends before it can stop, Stopped is raised at the end. If `log` raises a VncaError,
    the new log asks for a stop with status 1. The error is raised at the end.
    """
    arrived, errors, stops = [], [], _stops()

    def patient_log(line):
        try:
            log(line)
        except VncaError as fault:
            errors.append(fault)

    def stop_asked():
        return 128 + arrived[0] if arrived else int(bool(errors))

    read, write = socket.socketpair()
    write.setblocking(False)

    def listen():
        # Python runs a signal's handler in the main thread, which a device call can block for
        # minutes. The signal's number arrives here at once, as do those of all other signals that
        # Python handles.
        first = None
        while number := read.recv(1):
            number = number[0]
            if number not in stops:
                continue
            if first is None:
                first = time.monotonic()
                arrived.append(number)
                name = signal.Signals(number).name
                patient_log(
                    f"{name}: stopping after this device call; send it again to stop at once"
                )
            elif time.monotonic() - first > 1:  # sooner, it is the same one, passed on by a wrapper
                os._exit(128 + number)

    listener = threading.Thread(target=listen, daemon=True)
    previous_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    previous = {n: signal.signal(n, lambda *_: None) for n in stops}
    listener.start()
    try:
        try:
            yield stop_asked, patient_log
        except Stopped:
            if arrived or not errors:  # a lost connection also makes the output fail
                raise
        if arrived:
            raise Stopped(stop_asked())
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
