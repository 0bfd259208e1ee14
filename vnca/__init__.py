"""The Variational Neural Cellular Automaton in plain JAX: the method (program/ runs it)."""
