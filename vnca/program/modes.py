"""The modes. A new one takes a line in MODES, and its function in a file of its name."""

from typing import NamedTuple


class Mode(NamedTuple):
    """What is known of a mode before it starts: the function NAME(run) in vnca/PACKAGE/NAME.py."""

    does: str  # in words, for --help
    package: str = "report"
    has_batch: bool = False  # batch and pool must fit the devices and the images
    has_params: bool = False  # its run has data, and a checkpoint or a packaged model


MODES = {
    "train": Mode("from the newest checkpoint in the workdir, or anew", "program", True, True),
    "evaluate": Mode(
        "the test IWELBO of the newest checkpoint, or of the packaged model",
        "program",
        has_params=True,
    ),
    "check": Mode("whether this machine computes the method right", "program", has_batch=True),
    "summary": Mode("parameters, arithmetic and memory", has_batch=True),
    "operations": Mode("a list of every operation of an update and of an evaluation"),
    "benchmark": Mode(
        "the speed of updates and evaluation, compared with a matrix product", has_batch=True
    ),
    "compile": Mode("memory and estimated time on TPUs or GPUs that need not be here"),
    "figures": Mode(
        "pictures, animations, plots, and a page to play with in a browser", has_params=True
    ),
    "study": Mode(
        "damage recovery, stability, and the IWELBO by samples and by class", has_params=True
    ),
}
