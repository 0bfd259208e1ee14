"""What runs the method: data, devices, checkpoints, the loops of training and evaluation."""


class VncaError(Exception):
    """A fault that the user can mend: its message is one line, what is wrong and what to do."""
