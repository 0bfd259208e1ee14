"""Standard error without what libraries write to it."""

import contextlib
import os
import sys


@contextlib.contextmanager
def quiet():
    """Drops what is written to standard error, also by libraries that are not Python.

    Each library of JAX's CUDA plugin says, as it is loaded, that it has found no driver, and no
    setting keeps it from that.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
