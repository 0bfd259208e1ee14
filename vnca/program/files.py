"""Stands in until `data` writes with `store` alone."""

from vnca.program import VncaError
from vnca.program.store import write, write_json  # noqa: F401


def cannot_read(path, fault):
    """The VncaError for storage that fails."""
    return VncaError(f"{path}: {fault.strerror}")
