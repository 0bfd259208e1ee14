"""The Variational Neural Cellular Automaton on binarized MNIST, in plain JAX: the method.

What runs it is `vnca.program`, what is told of it `vnca.report`; it knows nothing of either.
"""
