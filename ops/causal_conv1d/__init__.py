"""Stateful causal short convolution, one filter a channel, with an optional SiLU."""
