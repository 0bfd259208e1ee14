"""Signals: each that asks for an end is obeyed, and no other is."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import tiny

from vnca.program import Stopped, VncaError, signals
from vnca.program.signals import die_at_once, stop_signals

STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

# A callback whose exceptions Python ignores, as those of JAX's callback of the garbage collector.
SWALLOWED = """
import os, sys, time
from vnca.program.signals import end_at_once

class Callback:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.1)

end_at_once()
try:
    Callback()
    time.sleep(10)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_whose_exception_a_callback_swallows_ends_the_program(number):
    with tiny.Process("-c", SWALLOWED, int(number)) as run:
        assert run.end() == 128 + number and not run.complained()


@pytest.fixture
def kept():
    """The handlers are put back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR1, *STOPS)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number, heard=None):
    """Sends this process a signal, which a thread hears, and waits until heard() is true. Without
    `heard`, it waits for as long as hearing takes on most machines."""
    os.kill(os.getpid(), number)
    if heard is None:
        return time.sleep(0.2)
    deadline = time.monotonic() + 30
    while not heard():
        assert time.monotonic() < deadline, "nobody heard the signal"
        time.sleep(0.01)


def test_a_signal_of_another_kind_is_no_request_to_stop(kept):
    signal.signal(signal.SIGUSR1, lambda *_: None)
    with stop_signals(print) as (stop_asked, _):
        send(signal.SIGUSR1)
        assert stop_asked() == 0


@pytest.mark.parametrize("number", STOPS)
def test_the_exit_status_names_the_signal_even_if_the_work_has_ended(number):
    with pytest.raises(Stopped) as stop, stop_signals(print) as (stop_asked, _):
        send(number, stop_asked)
        assert stop_asked() == 128 + number
    assert stop.value.status == 128 + number


def test_the_first_of_two_signals_counts(monkeypatch):
    # A wrapper may send both. The second ends the process if it comes more than a second later.
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: 0.0))
    with pytest.raises(Stopped) as stop, stop_signals(print) as (stop_asked, _):
        send(signal.SIGINT, stop_asked)
        send(signal.SIGTERM)
    assert stop.value.status == 130


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(kept, number):
    signal.signal(number, signal.SIG_IGN)
    die_at_once()
    with stop_signals(print) as (stop_asked, _):
        send(number)
        assert stop_asked() == 0
    send(number)


def full(line):
    raise VncaError("the disk is full")


def test_an_output_that_fails_asks_for_a_stop_and_is_reported_at_the_end():
    with (
        pytest.raises(VncaError, match="the disk is full; stopped"),
        stop_signals(full) as (ask, log),
    ):
        log("a line")
        raise Stopped(ask())


def test_a_lost_connection_is_what_counts_where_the_output_fails_with_it():
    for ends in (False, True):  # the work ends before it can stop
        with pytest.raises(Stopped) as stop, stop_signals(full) as (stop_asked, log):
            send(signal.SIGHUP, stop_asked)
            log("a line")
            if not ends:
                raise Stopped(stop_asked())
        assert stop.value.status == 129


IMPORTING = """
import os, sys, time
import main, jax
from vnca.program import signals

class Importer:
    def find_spec(self, name, *_):
        if name.startswith("vnca.program.evaluate"):
            try:
                os.kill(os.getpid(), int(sys.argv[1]))
                time.sleep(10)
            except KeyboardInterrupt:
                raise ImportError("as NumPy makes of it")

sys.meta_path.insert(0, Importer())
main.main([sys.argv[0], "--config=configs/quickstart.py", "--mode=summary"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_is_no_failed_import(number):
    with tiny.Process("-c", IMPORTING, int(number)) as run:
        assert run.end() == -number and not run.complained()  # a shell says 128 + number
