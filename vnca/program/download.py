"""The download of the published data set by plain HTTP, block by block."""

import contextlib
import http.client
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator

from vnca.program import VncaError

BRING = (
    "provide the three .amat files with --config.data.dir=DIR, or use --config.data.name=bundled"
)


class Unavailable(VncaError):
    """The published set is not available. Only for this error does `auto` use the bundled set."""


def why(fault: Exception) -> str:
    """The reason of an error, on one line."""
    text = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
    return " ".join(text.split())


def blocks(url: str, connect_s: float, stall_s: float) -> Iterator[bytes]:
    """Yields the body at `url` in blocks. urllib follows redirects and uses proxies.

    Raises Unavailable if connecting takes longer than connect_s seconds, or if no byte arrives for
    stall_s seconds.
    """

    class Connection(http.client.HTTPConnection):
        def connect(self):
            super().connect()  # with the opener's timeout
            self.sock.settimeout(stall_s)

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(Connection, request)

    opener = urllib.request.build_opener(Handler)
    try:
        with opener.open(url, timeout=connect_s) as response:
            while block := response.read1(1 << 16):
                yield block
    except (OSError, http.client.HTTPException, ValueError) as fault:
        raise Unavailable(f"{url}: {why(fault)}; {BRING}") from fault


@contextlib.contextmanager
def progress(total: int, log) -> Iterator[Callable[[int], None]]:
    """A context that yields a function to call with the number of bytes done so far. It shows one
    updating line on a terminal, and otherwise logs a line for each 10%."""
    live = sys.stdout.isatty()
    start = time.monotonic()
    shown_at, shown = 0.0, 0  # time and bytes when the line was last shown

    def show(done: int) -> None:
        nonlocal shown_at, shown
        now = time.monotonic()
        if done < total and (now - shown_at < 0.2 if live else done - shown < total / 10):
            return
        shown_at, shown = now, done
        rate = done / max(now - start, 1e-3)
        line = (
            f"{100 * done // total:3d}%  {done / 1e6:.1f} of {total / 1e6:.1f} MB  "
            f"{rate / 1e6:.1f} MB/s  {(total - done) / rate:.0f} s left"
        )
        if live:
            print(f"\r{line}\x1b[K", end="", flush=True)
        else:
            log(line)

    try:
        yield show
    finally:
        if live and shown:
            print()
