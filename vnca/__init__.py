"""The Variational Neural Cellular Automaton on binarized MNIST, in plain JAX."""


class VncaError(Exception):
    """A fault that the user can mend: its message is one line, what is wrong and what to do."""
