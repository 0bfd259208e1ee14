"""The download of the published data set by plain HTTP, block by block."""

import http.client
import urllib.request
from collections.abc import Iterator

from vnca.program import VncaError

TIMEOUT = 10  # seconds without an answer or a byte; the whole transfer has no limit
BRING = (
    "provide the three .amat files with --config.data.dir=DIR, or use --config.data.name=bundled, "
    "or own for your own images"
)


class Unavailable(VncaError):
    """The published set is not available. Only for this error does `auto` use the bundled set."""


def why(fault: Exception) -> str:
    """The reason of an error, on one line."""
    text = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
    return " ".join(text.split())


def blocks(url: str) -> Iterator[bytes]:
    """Yields the body at `url` in blocks. urllib follows redirects and uses proxies.

    Raises Unavailable if the request fails, or if connecting or the next byte takes longer than
    TIMEOUT.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            while block := response.read1(1 << 16):
                yield block
    except (OSError, http.client.HTTPException, ValueError) as fault:
        raise Unavailable(f"{url}: {why(fault)}; {BRING}") from fault
